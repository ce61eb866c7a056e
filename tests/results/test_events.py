"""A run tells its listener when it starts, each layer that is done, and each block when all of its layers are."""

from itertools import groupby
from pathlib import Path

from dashq import run
from dashq.results.events import BlockDone, Event, LayerDone, PhaseBegun, RunBegun, RunDone, RunStarted
from recipes import build_recipe


def test_a_run_starts_once_and_goes_from_block_to_block(model: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    run(build_recipe(model, tmp_path / "out", device="cpu", dtype="float32"), events.append)
    begun, *phases, done = (event for event in events if not isinstance(event, (RunStarted, LayerDone, BlockDone)))
    assert isinstance(begun, RunBegun)
    assert isinstance(done, RunDone)
    assert all(isinstance(event, PhaseBegun) for event in phases)
    start, *rest = (event for event in events if isinstance(event, (RunStarted, LayerDone, BlockDone)))
    layers = [event.report for event in rest if isinstance(event, LayerDone)]
    blocks = [event for event in rest if isinstance(event, BlockDone)]
    assert start == RunStarted(blocks=3, layers=len(layers), tokens=3 * 40, computed="on cpu in float32")
    assert blocks == [BlockDone(f"model.layers.{index}", index) for index in range(3)]
    # Seven layers, then their block; and so on.
    assert [(kind, len(list(group))) for kind, group in groupby(map(type, rest))] == [
        (LayerDone, 7),
        (BlockDone, 1),
    ] * 3
    assert [layer.layer.block for layer in layers] == [block.name for block in blocks for _ in range(7)]


def test_what_of_the_model_will_not_be_in_the_result_is_said_at_the_start() -> None:
    assert RunStarted(blocks=1, layers=1, tokens=1, computed="").warnings == ()
