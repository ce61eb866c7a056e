"""What is said of Gemma 4 alone, and what llama.cpp computes otherwise there."""

from pathlib import Path
from typing import Any

import pytest

from dashq import PlanError
from dashq_plugins.formats.gguf.gemma4 import check_gemma4
from dashq_plugins.formats.gguf.names import layout_of
from gguf_results import SHARED, config_of, said


def test_heads_with_a_window_shared_keys_and_inputs_of_layers_are_told(tmp_path: Path) -> None:
    entries = said(tmp_path, config_of("gemma4", **SHARED))
    assert (entries["attention.key_length"], entries["attention.key_length_swa"]) == (16, 8)
    assert (entries["attention.value_length"], entries["attention.value_length_swa"]) == (16, 8)
    assert (entries["attention.shared_kv_layers"], entries["embedding_length_per_layer_input"]) == (2, 32)
    assert entries["attention.sliding_window_pattern"] == [True, False, True, False]


@pytest.mark.parametrize(("cap", "expected"), [(None, 0.0), (20.0, 20.0)])
def test_no_cap_of_logits_is_said_too(cap: float | None, expected: float, tmp_path: Path) -> None:
    """Without an entry llama.cpp takes one of 30."""
    assert said(tmp_path, config_of("gemma4", final_logit_softcapping=cap))["final_logit_softcapping"] == expected


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (SHARED | {"layer_types": ["full_attention", "sliding_attention"] * 2}, "those of the last two with keys"),
        (SHARED | {"vocab_size_per_layer_input": 100}, "for all tokens in gemma4, and this model has fewer"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        check_gemma4(layout_of(config_of("gemma4", **changes)))
