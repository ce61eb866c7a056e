"""What llama.cpp computes otherwise of Llama 4 is refused."""

from typing import Any

import pytest

from dashq import PlanError
from dashq_plugins.formats.gguf.checks import check_config
from dashq_plugins.formats.gguf.llama4 import check_llama4
from dashq_plugins.formats.gguf.names import layout_of
from gguf_results import config_of

EVERY: dict[str, Any] = {"num_hidden_layers": 4}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_hidden_layers": 3}, "no llama4 of less than 4 layers, of which one sees all of a text"),
        (
            {"no_rope_layer_interval": 2},
            "every 4th see chunks of a text and turn queries and keys, and this model othe",
        ),
        ({"layer_types": ["full_attention"] * 4}, "every 4th see chunks of a text and turn queries and keys"),
        ({"moe_layers": [1]}, r"number interleave_moe_layer_step = 1 divides, .* moe_layers = \[1\]"),
        ({"use_qk_norm": False}, "where there are other than 128 experts, and here use_qk_norm is False with 4"),
        ({"num_local_experts": 128}, "where there are other than 128 experts, and here use_qk_norm is True with 128"),
        ({"attention_chunk_size": 64}, "computes llama4 with attention_chunk_size = 8192, and here it is 64"),
        ({"attn_temperature_tuning": False}, "llama4 with attn_temperature_tuning = True, and here it is False"),
        ({"floor_scale": 64}, "computes llama4 with floor_scale = 8192, and here it is 64"),
        ({"attn_scale": 0.2}, "computes llama4 with attn_scale = 0.1, and here it is 0.2"),
        ({"attention_bias": True}, "no place for the biases of llama4, which attention_bias gives it"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        check_config(layout_of(config_of("llama4", **(EVERY | changes))))


def test_experts_in_every_second_layer_and_128_without_norms_are_known() -> None:
    check_llama4(layout_of(config_of("llama4", **EVERY, interleave_moe_layer_step=2)))
    check_llama4(layout_of(config_of("llama4", **EVERY, num_local_experts=128, use_qk_norm=False)))
