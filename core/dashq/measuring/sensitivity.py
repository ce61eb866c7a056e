"""The cost to the model of storing each of its layers in one way or another, measured in one walk."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from dashq.calibration.layers import Observation, watching
from dashq.calibration.observe import observe_block
from dashq.calibration.outside import observe_outside
from dashq.calibration.shares import Shares
from dashq.calibration.shell import Shell
from dashq.calibration.stream import Stream
from dashq.calibration.strips import solvers_of
from dashq.calibration.tokens import draw_for
from dashq.curvature import Curvature
from dashq.data import Quantized
from dashq.device import in_words
from dashq.measuring.analysis import Analysis, Choice, Choices, LayerAnalysis, asked
from dashq.measuring.gradients import SAMPLES, TOKENS, Errors, expected_losses
from dashq.measuring.noise import NoiseWatcher, SignalToNoise
from dashq.model.decoder import OUTSIDE, Block, Model
from dashq.processes.group import here
from dashq.recipe.plan import LayerPlan
from dashq.recipe.recipe import Recipe
from dashq.results.events import Listener, Measuring
from dashq.results.report import versions
from dashq.results.shards import ShardWriter
from dashq.solving.arithmetic import zeros_where_nearer

# Rows are solved independently of one another: a sample stands for all, larger where layers and choices are few.
ROWS = 256
KEPT = 2**29  # numbers in two bytes each: the errors of these rows wait for the gradients
Keep = Callable[[LayerPlan, Quantized], None]
Measured = tuple[LayerAnalysis, Errors]  # still without sensitivities, and the errors of a sample of the rows


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
    `parts` hold are not solved again, and those that are solved are added to them; only the first process has any.
    Raises a `ProcessesError` where there are more processes than shares of the samples.
    """
    start, steps = time.perf_counter(), 3 * len(model.blocks)
    if tokens is None:
        tokens = draw_for(model, recipe.calibration).samples
    numbers = sum(len(plans) * plans[0].layer.columns for plans in choices.values())
    rows = max(1, min(ROWS, KEPT // numbers))
    first_plans = [plans[0] for plans in choices.values()]
    text = recipe.calibration.model_copy(update={"samples": len(tokens), "sequence_length": tokens.shape[1]})
    shares = Shares.of(first_plans, text)
    shares.check(here().count)
    stream = Stream(model, tokens, shares=shares)
    finished = here().of_first(lambda: [*parts.finished_parts] if parts else [])
    pairs: list[Measured] = []

    def take_in(block: str, own_choices: Choices, measure: Callable[[], Iterator[Measured]]) -> None:
        """The measurements of a part of the model: those on disk, or those that processes make now."""
        if block in finished:
            own = _restored(parts, block, own_choices) if parts else []
            solvers = dict.fromkeys(own_choices, 0)
        else:
            own, solvers = [*measure()], _solvers(own_choices)
        measured = _of_all(own, own_choices, solvers)
        if parts and block not in finished:
            _save(parts, block, measured)
        pairs.extend(measured)

    for block in model.walk():
        own_choices = {name: plans for name, plans in choices.items() if plans[0].layer.block == block.name}
        take_in(block.name, own_choices, partial(_analyze_block, block, own_choices, stream, rows, keep))
        if block.name in finished:
            stream.advance(block)
        listen(Measuring("layers", block.index + 1, steps))
    outside = {name: plans for name, plans in choices.items() if plans[0].layer.role != "linear"}
    if outside:
        take_in(OUTSIDE, outside, partial(_analyze_outside, model, outside, stream, tokens, rows, keep))
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


def _solvers(choices: Choices) -> dict[str, int]:
    """The process that solves a sample of each layer's rows, by the layer's name."""
    solvers = solvers_of([plans[0] for plans in choices.values()], here().count)
    return {name: own[0] for name, own in solvers.items()}


def _of_all(own: Sequence[Measured], choices: Choices, solvers: Mapping[str, int]) -> list[Measured]:
    """The measurements of all layers, each from the process that has made it."""
    if here().count == 1:
        return list(own)
    known, measured = {layer.name: (layer, errors) for layer, errors in own}, []
    for name, plans in choices.items():
        layer, errors = known.get(name, (None, None))
        told = (layer.model_dump(mode="json"), [*errors.values.shape]) if layer and errors else None
        record, (ways, rows, columns) = here().of(solvers[name], told)
        if errors is None:
            errors = Errors(
                plans[0].layer,
                torch.empty(rows, dtype=torch.int64),
                torch.empty(rows),
                torch.empty(ways, rows, columns, dtype=torch.bfloat16),
            )
        here().broadcast([errors.rows, errors.row_weights, errors.values], solvers[name])
        measured.append((LayerAnalysis.model_validate(record), errors))
    return measured


def _analyze_block(block: Block, choices: Choices, stream: Stream, rows: int, keep: Keep | None) -> Iterator[Measured]:
    """Each layer's analysis, still without sensitivities, and the errors of a sample of `rows`; moves the stream on."""
    first_plans = [plans[0] for plans in choices.values()]
    sample_tokens = stream.batches[0].shape[-2]  # noise is between samples
    watchers = {plan.layer.name: NoiseWatcher(sample_tokens) for plan in first_plans if plan.layer.expert is None}
    solvers = _solvers(choices)

    def end_share() -> None:
        for watcher in watchers.values():
            watcher.end_share()

    with watching(block.linears, {name: watcher.see for name, watcher in watchers.items()}):
        observations = observe_block(block, first_plans, stream, one_pass=True, end_share=end_share)
    if stream.is_spread:
        for name, watcher in watchers.items():
            watcher.collect(solvers[name], block.device)
    for name, plans in choices.items():
        if solvers[name] != here().rank:
            continue
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
) -> Iterator[Measured]:
    """The analyses of embeddings and head, as those of a block's layers, when the stream has passed all blocks.

    The sample has the rows of all tokens that gradients are taken on: in those lie most of the gradients.
    """
    with model.outside(head=True) as outside:
        observations = observe_outside(model, Shell(model), [plans[0] for plans in choices.values()], tokens, stream)
        for name, plans in choices.items():
            if _solvers(choices)[name] != here().rank:
                continue
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


def _save(parts: ShardWriter, block: str, measured: Sequence[Measured]) -> None:
    """Add what was measured of a block to the parts on disk."""
    tensors: dict[str, Tensor] = {}
    for layer, errors in measured:
        tensors |= {
            f"{layer.name}.rows": errors.rows,
            f"{layer.name}.row_weights": errors.row_weights,
            f"{layer.name}.errors": errors.values,
        }
    parts.add(block, tensors, [layer.model_dump(mode="json") for layer, _ in measured])


def _restored(parts: ShardWriter, block: str, choices: Choices) -> list[Measured]:
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
            type=scheme.type,
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
