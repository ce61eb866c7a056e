"""What is said of MiMo-V2 alone, and what llama.cpp computes otherwise there."""

from pathlib import Path

import pytest

from dashq import PlanError
from dashq_plugins.formats.gguf.mimo2 import check_mimo2
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


def test_windows_that_turn_another_part_of_each_head_are_refused() -> None:
    half, all_of_it = (PLAIN_ROPE | {"partial_rotary_factor": share} for share in (0.5, 1.0))
    config = config_of("mimo_v2_flash", rope_parameters={"full_attention": half, "sliding_attention": all_of_it})
    with pytest.raises(PlanError, match="the same part of each head in all layers of mimo2, and this model"):
        check_mimo2(layout_of(config))
