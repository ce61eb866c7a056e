"""Pico models of every family for tests to share, and what the smallest recipe makes of them."""

from pathlib import Path

import pytest

from dashq import run
from once import written_once
from pico import MIXTURES, pico_model
from recipes import build_recipe, mixture_recipe


class FamilyResults:
    """Models and results by family, written when they are first asked for; none may be changed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def model(self, family: str) -> Path:
        """The folder of a model in float32."""
        return written_once(self._folder / family / "model", lambda folder: pico_model(family, folder))

    def result(self, family: str) -> Path:
        """The folder of the quantized model, whose report has a sentence of both."""
        return written_once(self._folder / family / "result", lambda folder: self._quantize(family, folder))

    def _quantize(self, family: str, folder: Path) -> None:
        build = mixture_recipe if family in MIXTURES else build_recipe
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dashq.measuring.continuation.LARGEST", 2e9)
            run(build(self.model(family), folder))
