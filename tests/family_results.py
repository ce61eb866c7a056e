"""Pico models of every family for tests to share, and what the smallest recipe makes of them."""

from pathlib import Path

from dashq import run
from pico import MIXTURES, pico_model
from recipes import build_recipe, mixture_recipe


class FamilyResults:
    """Models and results by family, written when they are first asked for; none may be changed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def model(self, family: str) -> Path:
        """The folder of a model in float32."""
        folder = self._folder / family / "model"
        if not folder.exists():
            pico_model(family, folder)
        return folder

    def result(self, family: str) -> Path:
        """The folder of the quantized model."""
        folder = self._folder / family / "result"
        if not (folder / "report.json").exists():
            build = mixture_recipe if family in MIXTURES else build_recipe
            run(build(self.model(family), folder))
        return folder
