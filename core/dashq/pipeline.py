"""The run: one straight walk over the model's blocks."""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from dashq.calibration.layers import Observation
from dashq.calibration.observe import observe_block
from dashq.calibration.sequential import Original, corrected_target, in_sequence
from dashq.calibration.stream import Stream
from dashq.calibration.tokens import calibration_tokens
from dashq.data import Curvature, Full, Grouping, Quantized
from dashq.device import choose_device, choose_dtype, give_back_memory, in_words, limit_kernel_caches, wait_for
from dashq.errors import CheckpointError
from dashq.measuring.choosing import decide
from dashq.model.decoder import OUTSIDE, Block, Model
from dashq.model.location import locate
from dashq.recipe.plan import LayerPlan, make_plan
from dashq.recipe.recipe import Recipe
from dashq.results.output import Output
from dashq.results.report import (
    BlockDone,
    Clock,
    LayerDone,
    LayerReport,
    Listener,
    RunStarted,
    Selection,
    digest,
    summarize,
)
from dashq.solving.arithmetic import groups_without_importance, round_to_nearest, weighted_error
from dashq.solving.certificate import certify


def open_model(recipe: Recipe) -> Model:
    """The recipe's model on the recipe's device; only headers are read."""
    limit_kernel_caches()
    device = choose_device(recipe.device)
    location = locate(recipe.model, recipe.trust_remote_code)
    return Model(location, device, choose_dtype(recipe.dtype, device))


def plan_model(recipe: Recipe, model: Model) -> tuple[LayerPlan, ...]:
    """A plan for each layer; raises `PlanError` for whatever the layers or the format do not allow."""
    plans = make_plan(recipe, model.layers(), model.unclear_weights())
    recipe.serializer.check_model(model.network, model.tokenizer(), [plan.stored for plan in plans])
    return plans


@torch.no_grad()
def run(recipe: Recipe, listen: Listener = lambda event: None, overwrite: bool = False) -> Path:
    """Quantize a model as the recipe says; returns the folder of the result.

    What the recipe leaves to measurement is measured first, or read from the output folder if it was before.
    A run that was interrupted goes on after its last shard on disk when it is started again.
    Raises a `DashqError` for whatever the recipe, the model, the text or the folder does not allow.
    """
    clock = Clock(choose_device(recipe.device))
    with clock.measuring("load"):
        model = open_model(recipe)
    recipe, selections = _measured(recipe, model, clock, listen, overwrite)
    with clock.measuring("load"):
        plans = plan_model(recipe, model)
        output = Output(recipe, clock, overwrite)
        tokenizer = model.tokenizer()
        text = recipe.calibration
        tokens = calibration_tokens(
            text.dataset, tokenizer, text.samples, text.sequence_length, text.seed, text.packing
        )
        output.begin()
    computed = in_words(model.device, model.dtype)
    listen(RunStarted(blocks=len(model.blocks), layers=len(plans), tokens=tokens.numel(), computed=computed))
    with clock.measuring("calibrate"), model.outside() as outside:
        if OUTSIDE not in output.finished_parts:
            output.add(OUTSIDE, outside)
        stream = Stream(model, tokens)
        original = stream.twin() if text.corrects else None
    del outside  # embeddings and head would stay in memory
    for index, name in enumerate(model.blocks):
        give_back_memory()
        block_plans = [plan for plan in plans if plan.layer.block == name]
        with ExitStack() as stack:
            with clock.measuring("load"):
                block = stack.enter_context(model.block(index))
            if name in output.finished_parts:
                with clock.measuring("calibrate"):
                    if original:
                        original.advance(block.module, index)
                    _restore(recipe, block, block_plans, output)
                    stream.advance(block.module, index)
            else:
                found = _quantize_block(recipe, block, block_plans, len(plans), stream, original, index, clock, listen)
                with clock.measuring("write"):
                    output.add(name, *found)
                del found
        del block  # it, and the files that parts of it are views of, would stay in memory beside the next one
        listen(BlockDone(name, index))
    with clock.measuring("write"):
        output.finish(model, tokenizer)
    output.report(summarize(output.layers, clock, output.bytes_on_disk, computed, selections))
    return output.folder


def _measured(
    recipe: Recipe, model: Model, clock: Clock, listen: Listener, overwrite: bool
) -> tuple[Recipe, Sequence[Selection]]:
    """The recipe with nothing left to measurement, and what was chosen."""
    if not recipe.measures:
        return recipe, ()
    with clock.measuring("measure"):
        return decide(recipe, model, listen, overwrite)


def _quantize_block(
    recipe: Recipe,
    block: Block,
    plans: Sequence[LayerPlan],
    layers: int,
    stream: Stream,
    original: Stream | None,
    index: int,
    clock: Clock,
    listen: Listener,
) -> tuple[Mapping[str, Tensor], list[LayerReport]]:
    """One block of a model of so many layers: what they see, their codes, and the streams moved on behind the block."""
    text, beside = recipe.calibration, Original.of(original, block) if original else None
    one_pass, sequential = text.propagate == "original", text.propagate == "sequential"
    sample = -(-recipe.certificate_groups // layers)
    with clock.measuring("calibrate"):
        stages = in_sequence(block, plans, stream, index) if sequential else [plans]
    tensors = block.tensors_without([plan.layer.name for plan in plans])
    reports = []
    for stage in stages:
        until = stage[-1].layer.name if sequential and stage[-1].layer.expert is None else ""
        with clock.measuring("calibrate"):
            observations = observe_block(block, stage, stream, index, one_pass, beside, until)
        for plan in stage:
            name = plan.layer.name
            with clock.measuring("solve"):
                observation = observations.pop(name)
                weight = corrected_target(
                    block.weight(name).to(block.device).float(), observation, text.error_correction
                )
                quantized, report = quantize_layer(plan, weight, observation)
            if sample and not issubclass(plan.scheme.solver.needs, Full):  # one that does not aim at that optimum
                with clock.measuring("certify"):
                    certificate = certify(name, weight, quantized, observation.curvature, sample)
                report = replace(report, certificate=certificate)
            tensors |= {f"{name}.{key}": value for key, value in recipe.serializer.pack(quantized).items()}
            if not one_pass:
                block.replace_weight(name, quantized.dequantize())
            reports.append(report)
            listen(LayerDone(report))
    with clock.measuring("calibrate"):
        if not one_pass:
            stream.advance(block.module, index)
        if beside:
            beside.stream.advance(beside.block.module, index)
    return tensors, reports


def quantize_layer(
    plan: LayerPlan, weight: Float[Tensor, "rows columns"], observation: Observation
) -> tuple[Quantized, LayerReport]:
    """Group, solve and judge one layer."""
    start = time.perf_counter()
    layer, scheme, grid = plan.layer, plan.scheme, plan.grid
    largest, limit = float(weight.abs().max()), torch.finfo(grid.dtype).max
    if largest > limit:
        raise CheckpointError(f"{layer.name}: weights up to {largest:g} do not fit the format's {grid.dtype} numbers")
    curvature = observation.curvature
    grouping = scheme.grouper.group(weight, curvature)
    quantized = scheme.solver.solve(weight, curvature, grouping, grid)
    wait_for(weight.device)
    seconds = time.perf_counter() - start
    minmax = round_to_nearest(grouping.split(weight), grid, grouping)
    report = LayerReport(
        name=layer.name,
        rows=layer.rows,
        columns=layer.columns,
        bits=grid.bits,
        group_size=grouping.size,
        ordered=grouping.order is not None,
        bytes=plan.bytes,
        digest=digest(quantized),
        solver=scheme.solver.name,
        estimator=scheme.estimator.name,
        tokens=observation.tokens,
        expert=layer.expert,
        effective_tokens=observation.effective_tokens,
        shrinkage=observation.shrinkage,
        error=weighted_error(weight, quantized.dequantize(), curvature),
        minmax_error=weighted_error(weight, minmax.dequantize(), curvature),
        seconds=seconds,
        statistics={**curvature.report, **quantized.statistics},
        fallbacks=(*_flat_groups(curvature, grouping), *quantized.fallbacks),
    )
    return quantized, report


def _flat_groups(curvature: Curvature, grouping: Grouping) -> tuple[str, ...]:
    flat = groups_without_importance(curvature, grouping)
    return (f"{flat} of {grouping.groups} groups of columns saw no input: treated as flat",) if flat else ()


def _restore(recipe: Recipe, block: Block, plans: Sequence[LayerPlan], output: Output) -> None:
    """Where the stream sees quantized blocks, put back what an interrupted run has left on disk."""
    if recipe.calibration.propagate == "original":
        return
    tensors = output.read(block.name)
    for plan in plans:
        name = plan.layer.name
        packed = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        quantized = recipe.serializer.unpack(packed, plan.layer.columns, plan.size, plan.grid)
        block.replace_weight(name, quantized.dequantize())
