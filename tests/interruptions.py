"""Runs that are stopped, for tests of what they leave behind."""

import itertools
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import dashq.results.shards
from dashq import Recipe
from dashq.model.decoder import OUTSIDE
from dashq.quantizing.opening import open_model
from dashq.results.clock import Clock
from dashq.results.events import Event, LayerDone, PhaseBegun, RunBegun
from dashq.results.output import Output
from dashq.results.report import LayerReport, summarize
from dashq.results.workplace import workplace
from recipes import build_recipe


class Interruption(Exception):
    """What a test raises in the middle of a run."""


def interrupt(event: object, *_: object) -> None:
    """Raise once the run has opened its output; what is called with no event raises at once."""
    if not isinstance(event, (RunBegun, PhaseBegun)):
        raise Interruption


def after_layers(count: int) -> Callable[[Event], None]:
    """A listener that interrupts the run when so many layers are done."""
    done: list[Event] = []

    def listen(event: Event) -> None:
        if isinstance(event, LayerDone):
            done.append(event)
            if len(done) == count:
                raise Interruption

    return listen


def contents(folder: Path) -> dict[str, bytes]:
    """All files in a folder and below, by their relative names."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def weights(folder: Path) -> dict[str, bytes]:
    """The files of weights and their index."""
    return {name: content for name, content in contents(folder).items() if ".safetensors" in name}


LAYER = LayerReport(
    name="model.layers.0.mlp.up_proj",
    rows=80,
    columns=48,
    bits=3,
    group_size=16,
    ordered=False,
    bytes=1,
    digest="",
    solver="irls",
    estimator="diagonal",
    tokens=1,
    error=0.0,
    minmax_error=0.0,
    seconds=0.0,
)


class Steps:
    """All that a run does to its output folder, with a network whose weights do not matter."""

    def __init__(self, model: Path, tmp_path: Path) -> None:
        self.recipe: Recipe = build_recipe(model, tmp_path / "out")
        self._network = open_model(self.recipe)
        self._tokenizer = self._network.tokenizer

    def go(self, folder: Path, overwrite: bool = False) -> None:
        """A run into that folder."""
        clock = Clock(torch.device("cpu"))
        recipe = self.recipe.model_copy(update={"output": folder})
        with workplace(folder, overwrite, recipe.format_files) as place:
            output = Output(place, recipe, {"text": "one"}, clock, overwrite)
            for part in (OUTSIDE, *self._network.blocks):
                tensors = {f"{part}.x": torch.arange(len(part) + 1)}
                if part in output.finished_parts:
                    assert output.read(part, f"{part}.")[f"{part}.x"].equal(tensors[f"{part}.x"])
                else:
                    output.add(part, tensors, [LAYER])
            output.finish(self._network.network, self._tokenizer, self._network.location)
            output.report(summarize(output.layers, clock, output.bytes_on_disk, "on cpu in float32", 1000))


@contextmanager
def failing_at(moment: int, done: bool, error: type[BaseException], *details: object) -> Generator[None]:
    """Raise an error at one of the changes on disk, before or after it is done."""
    moments = itertools.count()

    def change(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        this = next(moments) == moment
        result = function(*args, **options) if done or not this else None
        if this:
            raise error(*details)
        return result

    def unlink(self: Path, original: Callable[..., None], missing_ok: bool = False) -> None:
        change(original, self, missing_ok)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", partial(change, os.replace))
        patch.setattr(os, "rename", partial(change, os.rename))
        patch.setattr(dashq.results.shards, "save_file", partial(change, save_file))
        patch.setattr(Path, "unlink", partialmethod(unlink, Path.unlink))
        yield
