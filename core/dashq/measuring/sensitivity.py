"""The cost to the model of storing each of its layers in one way or another, measured in one walk."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from dashq.calibration.layers import Observation, watching
from dashq.calibration.observe import observe_block
from dashq.calibration.outside import observe_outside
from dashq.calibration.shell import Shell
from dashq.calibration.stream import Stream
from dashq.calibration.tokens import draw_for
from dashq.curvature import Curvature
from dashq.data import Layer, Quantized, Role
from dashq.device import in_words
from dashq.measuring.gradients import SAMPLES, TOKENS, Errors, expected_losses
from dashq.measuring.noise import NoiseWatcher, SignalToNoise
from dashq.model.decoder import OUTSIDE, Block, Model
from dashq.recipe.plan import LayerPlan
from dashq.recipe.recipe import Recipe
from dashq.results.events import Listener, Measuring
from dashq.results.files import read_sealed, write_sealed
from dashq.results.fingerprint import differences
from dashq.results.folder import ANALYSIS
from dashq.results.report import versions
from dashq.results.shards import ShardWriter
from dashq.solving.arithmetic import zeros_where_nearer
from dashq.strict import Strict

# Rows are solved independently of one another: a sample stands for all, larger where layers and choices are few.
ROWS = 256
KEPT = 2**29  # numbers in two bytes each: the errors of these rows wait for the gradients
Choices = Mapping[str, Sequence[LayerPlan]]
Keep = Callable[[LayerPlan, Quantized], None]


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
        grouper = plan.scheme.grouper.model_dump(mode="json")
        return next(
            (choice for choice in self.choices if choice.bits == plan.scheme.bits and choice.grouper == grouper), None
        )


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


@torch.no_grad()
def analyze(
    recipe: Recipe,
    model: Model,
    choices: Choices,
    listen: Listener = lambda event: None,
    keep: Keep | None = None,
    tokens: Int64[Tensor, "samples tokens"] | None = None,
    parts: ShardWriter | None = None,
) -> Analysis:
    """Measure every choice of every layer, on what the original model feeds it.

    `choices` are plans by the layer's name, at least one for each. Of large layers only a sample of the rows is solved,
    unless there is a `keep` to call with each whole result. Without `tokens` the recipe's are drawn. Blocks that
    `parts` hold are not solved again, and those that are solved are added to them.
    """
    start, steps = time.perf_counter(), 3 * len(model.blocks)
    if tokens is None:
        tokens = draw_for(model, recipe.calibration).samples
    numbers = sum(len(plans) * plans[0].layer.columns for plans in choices.values())
    rows = max(1, min(ROWS, KEPT // numbers))
    stream = Stream(model, tokens)
    pairs: list[tuple[LayerAnalysis, Errors]] = []
    for block in model.walk():
        own_choices = {name: plans for name, plans in choices.items() if plans[0].layer.block == block.name}
        if parts and block.name in parts.finished_parts:
            stream.advance(block)
            measured = _restored(parts, block.name, own_choices)
        else:
            measured = list(_analyze_block(block, own_choices, stream, rows, keep))
            if parts:
                _save(parts, block.name, measured)
        pairs += measured
        listen(Measuring("layers", block.index + 1, steps))
    outside = {name: plans for name, plans in choices.items() if plans[0].layer.role != "linear"}
    if parts and OUTSIDE in parts.finished_parts:
        pairs += _restored(parts, OUTSIDE, outside)
    elif outside:
        measured = list(_analyze_outside(model, outside, stream, tokens, rows, keep))
        pairs += measured
        if parts:
            _save(parts, OUTSIDE, measured)
    errors = {layer.name: layer_errors for layer, layer_errors in pairs}

    def listen_to_gradients(done: int) -> None:
        listen(Measuring("gradients", len(model.blocks) + done, steps))

    losses = expected_losses(model, errors, tokens, recipe.calibration.seed, listen_to_gradients)
    return Analysis(
        asked=asked(recipe),
        computed=in_words(model.device, model.dtype),
        seconds=time.perf_counter() - start,
        versions=versions(),
        layers=tuple(_weighed(layer, losses[layer.name]) for layer, _ in pairs),
    )


def _analyze_block(
    block: Block, choices: Choices, stream: Stream, rows: int, keep: Keep | None
) -> Iterator[tuple[LayerAnalysis, Errors]]:
    """Each layer's analysis, still without sensitivities, and the errors of a sample of `rows`; moves the stream on."""
    first_plans = [plans[0] for plans in choices.values()]
    sample_tokens = stream.batches[0].shape[1]  # noise is between samples
    watchers = {plan.layer.name: NoiseWatcher(sample_tokens) for plan in first_plans if plan.layer.expert is None}
    with watching(block.linears, {name: watcher.see for name, watcher in watchers.items()}):
        observations = observe_block(block, first_plans, stream, one_pass=True)
    for name, plans in choices.items():
        layer, weight = plans[0].layer, block.weight(name).to(block.device)
        sample = torch.linspace(0, layer.rows - 1, min(layer.rows, rows)).round().long()
        noise = watchers[name].signal_to_noise() if name in watchers else None
        row_weights = torch.full((len(sample),), layer.rows / len(sample))
        yield _analyze_layer(plans, weight.float(), observations.pop(name), (sample, row_weights), keep, noise)


def _analyze_outside(
    model: Model,
    choices: Choices,
    stream: Stream,
    tokens: Int64[Tensor, "samples tokens"],
    rows: int,
    keep: Keep | None,
) -> Iterator[tuple[LayerAnalysis, Errors]]:
    """The analyses of embeddings and head, as those of a block's layers, when the stream has passed all blocks.

    The sample has the rows of all tokens that gradients are taken on: in those lie most of the gradients.
    """
    with model.outside(head=True) as outside:
        observations = observe_outside(model, Shell(model), [plans[0] for plans in choices.values()], tokens, stream)
        for name, plans in choices.items():
            occurs = torch.zeros(plans[0].layer.rows, dtype=torch.bool)
            occurs[tokens[:SAMPLES, :TOKENS].flatten()] = True
            own, others = occurs.nonzero().flatten(), (~occurs).nonzero().flatten()
            sampled = others[torch.linspace(0, len(others) - 1, min(len(others), rows)).round().long()]
            each = len(others) / max(1, len(sampled))
            row_weights = torch.cat([torch.ones(len(own)), torch.full((len(sampled),), each)])
            weight = outside[f"{name}.weight"].to(model.device).float()
            sample = (torch.cat([own, sampled]), row_weights)
            yield _analyze_layer(plans, weight, observations[name], sample, keep, None)


def _analyze_layer(
    plans: Sequence[LayerPlan],
    weight: Float[Tensor, "rows columns"],
    observation: Observation,
    sample: tuple[Int[Tensor, " sample"], Float[Tensor, " sample"]],
    keep: Keep | None,
    noise: SignalToNoise | None,
) -> tuple[LayerAnalysis, Errors]:
    """One layer's analysis, and the errors of a sample of rows, each with the number of those that it stands for."""
    layer, (rows, row_weights) = plans[0].layer, sample
    solved, errors = _solve(plans, weight, observation.curvature, rows, keep)
    analysis = LayerAnalysis(
        name=layer.name,
        rows=layer.rows,
        columns=layer.columns,
        expert=layer.expert,
        role=layer.role,
        tokens=observation.tokens,
        signal_to_noise=noise,
        choices=solved,
    )
    return analysis, Errors(layer, rows, row_weights, errors)


def _save(parts: ShardWriter, block: str, measured: Sequence[tuple[LayerAnalysis, Errors]]) -> None:
    """Add what was measured of a block to the parts on disk."""
    tensors: dict[str, Tensor] = {}
    for layer, errors in measured:
        tensors |= {
            f"{layer.name}.rows": errors.rows,
            f"{layer.name}.row_weights": errors.row_weights,
            f"{layer.name}.errors": errors.values,
        }
    parts.add(block, tensors, [layer.model_dump(mode="json") for layer, _ in measured])


def _restored(parts: ShardWriter, block: str, choices: Choices) -> list[tuple[LayerAnalysis, Errors]]:
    """The measurements of a block that an interrupted run has left."""
    layers = {str(record["name"]): record for record in parts.records}
    measured = []
    for name in choices:
        layer, tensors = LayerAnalysis.model_validate(layers[name]), parts.read(block, f"{name}.")
        rows, row_weights, values = (tensors[f"{name}.{part}"] for part in ("rows", "row_weights", "errors"))
        measured.append((layer, Errors(layer.layer, rows, row_weights, values)))
    return measured


def _solve(
    plans: Sequence[LayerPlan],
    weight: Float[Tensor, "rows columns"],
    curvature: Curvature,
    sample: Int[Tensor, " sample"],
    keep: Keep | None,
) -> tuple[tuple[Choice, ...], Float[Tensor, "choices sample columns"]]:
    """A layer solved as each plan says, still without sensitivities, and the errors of a sample of its rows.

    Only these rows are solved, unless there is a `keep` to call with the whole result.
    """
    sampled = weight[sample]
    power = curvature.row_errors(sampled).sum()
    choices, errors = [], []
    for plan in plans:
        scheme = plan.scheme
        grouping = scheme.grouper.group(weight, curvature)
        target = weight if keep else sampled
        solved = scheme.solver.solve(target, curvature, grouping, plan.grid)
        quantized = zeros_where_nearer(target, solved, curvature)
        approximation = quantized.dequantize()
        if keep:
            keep(plan, quantized)
            approximation = approximation[sample]
        error = sampled - approximation
        lost = curvature.row_errors(error).sum()
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
    """The analysis with the expected cost of each choice."""
    pairs = zip(layer.choices, losses.tolist(), strict=True)
    choices = tuple(choice.model_copy(update={"sensitivity": loss}) for choice, loss in pairs)
    return layer.model_copy(update={"choices": choices})


def asked(recipe: Recipe) -> Mapping[str, Any]:
    """The part of a recipe that decides what is measured."""
    settings: dict[str, Any] = json.loads(recipe.model_dump_json(exclude={"output", "certificate_groups", "budget"}))
    settings["calibration"].pop("propagate")  # always of the original model
    return settings | {"overrides": [override for override in settings["overrides"] if not override["critical"]]}
