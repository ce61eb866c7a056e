"""What is said of MiMo-V2 alone, and what llama.cpp computes otherwise there."""

from pathlib import Path
from typing import Any

import pytest

from dashq import PlanError
from dashq_plugins.formats.gguf.checks import check_config
from dashq_plugins.formats.gguf.names import layout_of
from gguf_results import config_of, said
from pico import PLAIN_ROPE


def test_windows_twice_as_many_keys_and_values_that_are_scaled_are_told(tmp_path: Path) -> None:
    entries = said(tmp_path, config_of("mimo_v2_flash"))
    assert entries["attention.sliding_window_pattern"] == [False, True]
    assert entries["attention.head_count_kv"] == [1, 2]
    assert (entries["attention.key_length"], entries["attention.value_length"]) == (16, 8)
    assert entries["attention.value_scale"] == pytest.approx(0.707)
    assert (entries["rope.freq_base"], entries["rope.freq_base_swa"]) == (1e4, 1e3)
    unscaled = said(tmp_path / "unscaled", config_of("mimo_v2_flash", attention_value_scale=None))
    assert "attention.value_scale" not in unscaled


HALF, WHOLE = (PLAIN_ROPE | {"partial_rotary_factor": share} for share in (0.5, 1.0))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"rope_parameters": {"full_attention": HALF, "sliding_attention": WHOLE}},
            "all layers of mimo2, and in this model partial_rotary_factor is 0.5 without a window and 1.0 with one",
        ),
        (
            {"rope_parameters": {"full_attention": PLAIN_ROPE, "sliding_attention": PLAIN_ROPE}},
            "partial_rotary_factor is None without a window and None with one",
        ),
        ({"routed_scaling_factor": 2.5}, "computes mimo2 with routed_scaling_factor = 1.0, and here it is 2.5"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        check_config(layout_of(config_of("mimo_v2_flash", **changes)))


def test_layers_without_experts_may_lie_between_others() -> None:
    kinds = ["sparse", "dense", "sparse"]
    check_config(layout_of(config_of("mimo_v2_flash", num_hidden_layers=3, mlp_layer_types=kinds)))
