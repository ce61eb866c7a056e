"""What it costs the model to store each of its layers in one way or another, measured in one walk."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from pydantic import ValidationError
from torch import Tensor

from dashq.calibration.layers import watching
from dashq.calibration.observe import observe_block
from dashq.calibration.stream import Stream
from dashq.calibration.tokens import calibration_tokens
from dashq.data import Curvature, Full, Layer, Quantized
from dashq.device import give_back_memory, in_words
from dashq.measuring.gradients import Errors, expected_losses
from dashq.measuring.noise import NoiseWatcher, SignalToNoise
from dashq.model.decoder import Block, Model
from dashq.recipe.plan import LayerPlan
from dashq.recipe.recipe import Recipe
from dashq.results.output import ANALYSIS, write_text
from dashq.results.report import Listener, Measuring, versions
from dashq.strict import Strict

# Rows are solved independently of one another: some stand for all, more where there are fewer layers and choices.
ROWS = 256
KEPT = 2**29  # numbers in two bytes each: the errors of these rows wait for the gradients
Choices = Mapping[str, Sequence[LayerPlan]]


class Choice(Strict):
    """One way to store a layer, and what it costs.

    `error` is tr(E H Eᵀ) / tr(W H Wᵀ) with E = W - Ŵ: the layer's output error relative to its output. `sensitivity` is
    what the model's predictions are expected to lose by it, in nats per token.
    """

    bits: int
    grouper: Mapping[str, Any]
    size: int
    bytes: int
    error: float
    sensitivity: float


Keep = Callable[[LayerPlan, Quantized], None]


class LayerAnalysis(Strict):
    """What was measured of one layer; its first choice is that of its scheme.

    `divergence` is what the model's predictions really lost with the first choice in this layer alone, where that was
    measured.
    """

    name: str
    rows: int
    columns: int
    expert: int | None
    tokens: int
    signal_to_noise: SignalToNoise | None
    choices: tuple[Choice, ...]
    divergence: float | None = None

    @property
    def layer(self) -> Layer:
        """The layer that was measured."""
        return Layer(name=self.name, rows=self.rows, columns=self.columns, expert=self.expert)

    def choice(self, plan: LayerPlan) -> Choice | None:
        """What was measured of the choice that a plan makes, if it was."""
        grouper = plan.scheme.grouper.model_dump(mode="json")
        return next((c for c in self.choices if c.bits == plan.scheme.bits and c.grouper == grouper), None)


class Analysis(Strict):
    """What was measured of a model's layers; `asked` is all of the recipe that it depends on."""

    asked: Mapping[str, Any]
    computed: str
    seconds: float
    versions: Mapping[str, str]
    layers: tuple[LayerAnalysis, ...]
    rank_correlation: float | None = None

    @property
    def by_name(self) -> Mapping[str, LayerAnalysis]:
        return {layer.name: layer for layer in self.layers}

    def fits(self, recipe: Recipe, choices: Choices) -> bool:
        """Whether it answers for these choices of this recipe."""
        layers = self.by_name
        return self.asked == _asked(recipe) and all(
            name in layers and all(layers[name].choice(plan) for plan in plans) for name, plans in choices.items()
        )

    def save(self, folder: Path) -> Path:
        """Write it into a folder, all or nothing; returns the file."""
        return write_text(folder / ANALYSIS, self.model_dump_json(indent=1))

    @classmethod
    def load(cls, folder: Path) -> "Analysis | None":
        """What lies in a folder; None where there is nothing, or what another version wrote."""
        try:
            return cls.model_validate_json((folder / ANALYSIS).read_text())
        except (OSError, ValidationError):
            return None


@torch.no_grad()
def analyze(
    recipe: Recipe,
    model: Model,
    choices: Choices,
    listen: Listener = lambda event: None,
    keep: Keep | None = None,
) -> Analysis:
    """Measure every choice of every layer, on what the original model feeds it.

    `choices` are plans by the layer's name, at least one for each. Of large layers only some rows are solved, unless
    there is someone to `keep` the results.
    """
    start, text, blocks = time.perf_counter(), recipe.calibration, len(model.blocks)
    tokens = calibration_tokens(
        text.dataset, model.tokenizer(), text.samples, text.sequence_length, text.seed, text.packing
    )
    numbers = sum(len(plans) * plans[0].layer.columns for plans in choices.values())
    rows = max(1, min(ROWS, KEPT // numbers))
    with model.outside():
        stream = Stream(model, tokens)
    layers: list[LayerAnalysis] = []
    errors: dict[str, Errors] = {}
    for index, name in enumerate(model.blocks):
        give_back_memory()
        mine = {layer: plans for layer, plans in choices.items() if plans[0].layer.block == name}
        with model.block(index) as block:
            for layer, error in _analyze_block(block, mine, stream, index, text.sequence_length, rows, keep):
                layers.append(layer)
                errors[layer.name] = error
        listen(Measuring("layers", index + 1, 3 * blocks))
    losses = expected_losses(
        model, errors, tokens, text.seed, lambda done: listen(Measuring("gradients", blocks + done, 3 * blocks))
    )
    return Analysis(
        asked=_asked(recipe),
        computed=in_words(model.device, model.dtype),
        seconds=time.perf_counter() - start,
        versions=versions(),
        layers=tuple(_weighed(layer, losses[layer.name] / len(errors[layer.name].rows)) for layer in layers),
    )


def _analyze_block(
    block: Block, choices: Choices, stream: Stream, index: int, batch: int, rows: int, keep: Keep | None
) -> Iterator[tuple[LayerAnalysis, Errors]]:
    """What there is to say of a block's layers before their errors are weighed; noise is between such batches."""
    plans = [mine[0] for mine in choices.values()]
    watchers = {plan.layer.name: NoiseWatcher(batch) for plan in plans if plan.layer.expert is None}
    with watching(block.linears, watchers):
        observations = observe_block(block, plans, stream, index, one_pass=True)
    for name, mine in choices.items():
        layer, weight, observation = mine[0].layer, block.weight(name).to(block.device), observations.pop(name)
        some = torch.linspace(0, layer.rows - 1, min(layer.rows, rows)).round().long()
        found, errors = _solved(mine, weight.float(), observation.curvature, some, keep)
        analysis = LayerAnalysis(
            name=name,
            rows=layer.rows,
            columns=layer.columns,
            expert=layer.expert,
            tokens=observation.tokens,
            signal_to_noise=watchers[name].signal_to_noise() if name in watchers else None,
            choices=found,
        )
        yield analysis, Errors(some, errors)


def _solved(
    plans: Sequence[LayerPlan],
    weight: Float[Tensor, "rows columns"],
    curvature: Curvature,
    rows: Int[Tensor, " some"],
    keep: Keep | None,
) -> tuple[tuple[Choice, ...], Float[Tensor, "choices some columns"]]:
    """A layer solved as each plan says, not yet weighed, and the errors of some of its rows."""
    some = weight[rows]
    power = row_errors(some, curvature).sum()
    choices, errors = [], []
    for plan in plans:
        scheme, solved = plan.scheme, weight if keep else some
        grouping = scheme.grouper.group(weight, curvature)
        quantized = scheme.solver.solve(solved, curvature, grouping, plan.grid)
        if keep:
            keep(plan, quantized)
        error = some - (quantized.dequantize()[rows] if keep else quantized.dequantize())
        lost = row_errors(error, curvature).sum()
        choice = Choice(
            bits=scheme.bits,
            grouper=scheme.grouper.model_dump(mode="json"),
            size=plan.size,
            bytes=plan.bytes,
            error=float(lost / power) if power > 0 else 0.0,
            sensitivity=0.0,
        )
        choices.append(choice)
        errors.append(error.bfloat16().cpu())
    return tuple(choices), torch.stack(errors)


def _weighed(layer: LayerAnalysis, losses: Float[Tensor, " choices"]) -> LayerAnalysis:
    """With what the choices are expected to cost, given the mean over the layer's rows."""
    pairs = zip(layer.choices, losses.tolist(), strict=True)
    choices = tuple(choice.model_copy(update={"sensitivity": loss * layer.rows}) for choice, loss in pairs)
    return layer.model_copy(update={"choices": choices})


def row_errors(error: Float[Tensor, "rows columns"], curvature: Curvature) -> Float[Tensor, " rows"]:
    """E H Eᵀ of each row, with the whole H where it is there, in float64."""
    if isinstance(curvature, Full):
        products = error @ curvature.matrix.float()
        return (products * error).sum(1, dtype=torch.float64).clamp_min(0)
    return (error.square() * curvature.diagonal().float()).sum(1, dtype=torch.float64)


def _asked(recipe: Recipe) -> Mapping[str, Any]:
    """The part of a recipe that decides what is measured."""
    asked: dict[str, Any] = json.loads(recipe.model_dump_json(exclude={"output", "certificate_groups", "budget"}))
    asked["calibration"].pop("propagate")  # always of the original model
    return asked | {"overrides": [override for override in asked["overrides"] if not override["critical"]]}
