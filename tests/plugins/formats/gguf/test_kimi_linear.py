"""What llama.cpp computes otherwise of Kimi Linear is refused, and its file says what there is besides latents."""

from pathlib import Path
from typing import Any

import pytest

from dashq import PlanError
from dashq_plugins.formats.gguf.checks import check_config
from dashq_plugins.formats.gguf.names import layout_of
from gguf_results import KIMI, config_of, said


def test_the_sizes_of_linear_attention_are_told_beside_those_of_latents(tmp_path: Path) -> None:
    entries = said(tmp_path, config_of("kimi_linear", **KIMI))
    expected = {
        "kda.head_dim": 32,
        "ssm.conv_kernel": 4,
        "attention.head_count_kv": [0, 1],
        "attention.kv_lora_rank": 16,
        "attention.key_length_mla": 32,
        "attention.value_length_mla": 16,
        "leading_dense_block_count": 1,
    }
    assert {key: entries.get(key) for key in expected} == expected
    assert entries["expert_weights_scale"] == pytest.approx(2.446)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layer_types": ["linear_attention"] * 2}, "in kimi-linear, and this model has linear_attention$"),
        ({"linear_num_heads": 3}, "all layers of kimi-linear, and this model 3 of linear attention and 4 others"),
        ({"q_lora_rank": 32}, "makes queries in one step in kimi-linear, and this model in two"),
        ({"n_group": 2}, "among all experts in kimi-linear, and this model in 2 groups"),
        ({"norm_topk_prob": False}, "lets the weights of a token's experts add up to 1, and this model does not"),
        ({"tie_word_embeddings": True}, "wants a head of its own in kimi-linear"),
        ({"attention_bias": True}, "no place for the biases of kimi-linear, which attention_bias gives it"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        check_config(layout_of(config_of("kimi_linear", **(KIMI | changes))))
