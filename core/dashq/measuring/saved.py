"""Measurements on disk while they go on, so that one that was interrupted is resumed."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from dashq.measuring.analysis import Choices, asked
from dashq.recipe.recipe import Recipe
from dashq.results.clock import Clock
from dashq.results.folder import MEASURING, listed_files
from dashq.results.journal import Journal
from dashq.results.shards import ShardWriter


@contextmanager
def saved_measurement(
    folder: Path, recipe: Recipe, choices: Choices, inputs: Mapping[str, str]
) -> Generator[ShardWriter]:
    """The parts of a measurement, those of an interrupted one of the same choices and `inputs` among them.

    They go when the `with` statement ends without an error.
    """
    measured = {
        name: [[plan.scheme.bits, plan.scheme.type, plan.scheme.grouper.model_dump(mode="json")] for plan in plans]
        for name, plans in choices.items()
    }
    settings = {"asked": asked(recipe), "choices": measured}
    journal = Journal(folder, settings, inputs, Clock(torch.device("cpu")), MEASURING)
    journal.resume(overwrite=True)
    parts = ShardWriter(journal, "measured")
    parts.resume(listed_files(folder, MEASURING), overwrite=True)
    try:
        yield parts
    except KeyboardInterrupt:
        parts.save()
        raise
    parts.remove()
    journal.remove()
