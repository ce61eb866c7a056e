"""Windows are told where llama.cpp has an entry for them, and elsewhere the context is no longer than they reach."""

from pathlib import Path
from typing import Any

import pytest

from dashq import PlanError
from dashq_plugins.formats.gguf.names import layout_of
from dashq_plugins.formats.gguf.windows import check_windows
from gguf_results import FAMILIES, WINDOWS, config_of, said


def test_windows_and_both_rotary_bases_of_gemma_are_told(tmp_path: Path) -> None:
    name, changes = FAMILIES["gemma3-linear"]
    entries = said(tmp_path, config_of(name, **changes))
    assert entries["attention.sliding_window"] == 16
    assert entries["attention.sliding_window_pattern"] == [True, False]
    assert (entries["rope.freq_base"], entries["rope.freq_base_swa"]) == (1e4, 1e3)
    assert (entries["rope.scaling.type"], entries["rope.scaling.factor"]) == ("linear", 8.0)


@pytest.mark.parametrize(
    ("layers", "context"), [(["full_attention"] * 2, 256), (["full_attention", "sliding_attention"], 128)]
)
def test_a_window_that_no_layer_has_does_not_shorten_the_context(
    layers: list[str], context: int, tmp_path: Path
) -> None:
    assert said(tmp_path, config_of("cwm", layer_types=layers))["context_length"] == context


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gpt_oss", {"layer_types": ["full_attention"] * 2}, "all layers of gpt-oss a window but each whose number 2 "),
        ("cohere2", {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}, "each whose number 4 divides"),
        (
            "exaone4",
            WINDOWS | {"layer_types": ["sliding_attention", "full_attention"]},
            "exaone4 where there are 64 lay",
        ),
        ("exaone4", {"sliding_window": 16}, "windows in exaone4 where there are 64 layers, and nowhere else"),
        *(
            (
                family,
                {"layer_types": ["full_attention"] * 2},
                "wants layers with a window in .* and no layer of this mod",
            )
            for family in ("gemma2", "gemma3", "gemma4", "olmo3", "exaone_moe", "mimo_v2_flash")
        ),
    ],
)
def test_other_windows_than_those_of_llama_cpp_are_refused(family: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        check_windows(layout_of(config_of(family, **changes)))


def test_a_model_that_does_not_attend_has_no_bound_on_texts(tmp_path: Path) -> None:
    config: Any = config_of("mamba", intermediate_size=128)
    del config.max_position_embeddings  # which our tables of sizes give all models
    assert said(tmp_path, config)["context_length"] == 2**20
