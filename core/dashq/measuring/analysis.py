"""The measurements of layers: how exact each is when stored in some ways, and what the predictions lose by it."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from dashq.data import Layer, Role
from dashq.measuring.noise import SignalToNoise
from dashq.recipe.plan import LayerPlan
from dashq.recipe.recipe import Recipe
from dashq.results.files import read_sealed, write_sealed
from dashq.results.fingerprint import differences
from dashq.results.folder import ANALYSIS
from dashq.strict import Strict

Choices = Mapping[str, Sequence[LayerPlan]]


class Choice(Strict):
    """One way to store a layer, and what it costs.

    `error` is tr(E H Eᵀ) / tr(W H Wᵀ) with E = W - Ŵ: the layer's output error relative to its output. `sensitivity` is
    what the model's predictions are expected to lose by it, in nats per token.
    """

    bits: int
    type: str | None = None
    grouper: Mapping[str, Any]
    size: int
    bytes: int
    error: float
    sensitivity: float


class LayerAnalysis(Strict):
    """The measurements of one layer; its first choice is that of its scheme.

    `divergence` is what the model's predictions really lost with the first choice in this layer alone, where that was
    measured.
    """

    name: str
    rows: int
    columns: int
    expert: int | None
    role: Role = "linear"
    tokens: int
    signal_to_noise: SignalToNoise | None
    choices: tuple[Choice, ...]
    divergence: float | None = None

    @property
    def layer(self) -> Layer:
        """The layer that was measured."""
        return Layer(name=self.name, rows=self.rows, columns=self.columns, expert=self.expert, role=self.role)

    def choice(self, plan: LayerPlan) -> Choice | None:
        """The choice that a plan makes, if it was measured."""
        scheme = plan.scheme
        wanted = (scheme.bits, scheme.type, scheme.grouper.model_dump(mode="json"))
        return next((choice for choice in self.choices if (choice.bits, choice.type, choice.grouper) == wanted), None)


class Analysis(Strict):
    """The measurements of a model's layers; `asked` is all of the recipe that they depend on, `inputs` all else."""

    asked: Mapping[str, Any]
    inputs: Mapping[str, str] = {}
    computed: str
    seconds: float
    versions: Mapping[str, str]
    layers: tuple[LayerAnalysis, ...]
    rank_correlation: float | None = None

    @cached_property
    def by_name(self) -> Mapping[str, LayerAnalysis]:
        """The layers by their names."""
        return {layer.name: layer for layer in self.layers}

    def misfits(self, recipe: Recipe, choices: Choices, inputs: Mapping[str, str]) -> list[str]:
        """The reasons why it does not answer for these choices of this recipe, with these `inputs` among others."""
        layers = self.by_name
        reasons = [] if self.asked == asked(recipe) else ["the recipe has changed"]
        reasons += differences({key: value for key, value in self.inputs.items() if key in inputs}, inputs)
        if any(name not in layers or not all(map(layers[name].choice, plans)) for name, plans in choices.items()):
            reasons.append("other choices were measured")
        return reasons

    def expected_loss(self, plans: Sequence[LayerPlan]) -> float:
        """The cost in nats per token of layers stored as planned, all of which were measured so."""
        choices = [self.by_name[plan.layer.name].choice(plan) for plan in plans]
        return sum(choice.sensitivity for choice in choices if choice)

    def save(self, folder: Path) -> Path:
        """Write it into a folder, all or nothing; returns the file."""
        return write_sealed(folder / ANALYSIS, self.model_dump(mode="json"))

    @classmethod
    def load(cls, folder: Path) -> "Analysis | None":
        """The analysis in a folder; None where there is none that this version wrote."""
        try:
            return cls.model_validate(read_sealed(folder / ANALYSIS))
        except (OSError, ValueError):  # those of validation among them
            return None


def asked(recipe: Recipe) -> Mapping[str, Any]:
    """The part of a recipe that decides what is measured."""
    settings: dict[str, Any] = json.loads(recipe.model_dump_json(exclude={"output", "certificate_groups", "budget"}))
    settings["calibration"].pop("propagate")  # always of the original model
    settings["calibration"].pop("keep")
    return settings | {"overrides": [override for override in settings["overrides"] if not override["critical"]]}
