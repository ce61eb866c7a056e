"""A measurement that was interrupted goes on after the last block on disk, and leaves nothing but its result."""

from pathlib import Path
from typing import Any

import pytest

import dashq.measuring.sensitivity
import dashq.results.shards
from dashq import run
from dashq.measuring.analysis import Analysis
from dashq.model.decoder import Block
from dashq.results.events import Event, Measuring
from recipes import build_recipe

MEASURED: dict[str, Any] = {"overrides": [{"critical": {"share": 0.1}, "solver": "closed_form"}], "budget": 4.6}


def test_an_interrupted_measurement_goes_on(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashq.results.shards, "PIECE_SECONDS", 0)
    whole = run(build_recipe(model, tmp_path / "whole", **MEASURED))
    recipe = build_recipe(model, tmp_path / "out", **MEASURED)
    solve = dashq.measuring.sensitivity._analyze_block
    solved: list[int] = []

    def note(block: Block, *arguments: Any) -> Any:
        solved.append(block.index)
        return solve(block, *arguments)

    def interrupt(event: Event) -> None:
        if isinstance(event, Measuring) and event.done == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(dashq.measuring.sensitivity, "_analyze_block", note)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, interrupt)
    assert "dashq_measuring.json" in {path.name for path in (tmp_path / "out").iterdir()}
    run(recipe)
    assert solved == [0, 1, 2]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in whole.iterdir()}
    measured, other = (Analysis.load(folder) for folder in (whole, tmp_path / "out"))
    assert measured
    assert other
    assert measured.layers == other.layers
    assert (whole / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()
