"""Pico models of every family for tests to share, and what the smallest recipe makes of them."""

from pathlib import Path

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
        """The folder of the quantized model."""
        build = mixture_recipe if family in MIXTURES else build_recipe
        return written_once(self._folder / family / "result", lambda folder: run(build(self.model(family), folder)))
