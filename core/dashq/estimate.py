"""What a run will take: memory and time, from shapes and from how fast this machine multiplies."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dashq.data import Full
from dashq.model import Model
from dashq.plan import LayerPlan
from dashq.recipe import Recipe
from dashq.stream import TOKENS_PER_BATCH

# On one or two CPU cores, compiled: of slower solvers that need a diagonal, and of those that need the whole matrix.
SOLVE_NANOSECONDS_PER_WEIGHT = {False: 150, True: 500}
PASSES = {"original": 1, "quantized": 2, "sequential": 3}  # of all tokens through a block, some of them part of the way
STARTED = 200e6  # bytes that the first pass through a block leaves behind: kernels, buffers, modules
PROBE = 768  # columns and rows of the product that is timed


@dataclass(frozen=True)
class Estimate:
    """Peak memory in bytes beyond the interpreter, run time in seconds, bytes of what is not quantized."""

    memory: float
    seconds: float
    other_bytes: int


def estimate(model: Model, plans: Sequence[LayerPlan], recipe: Recipe) -> Estimate:
    """Rough figures, good to a factor of two: one matrix product is timed, nothing is read."""
    text = recipe.calibration
    tokens = text.samples * text.tokens
    itemsize = model.dtype.itemsize
    planned = sum(plan.layer.rows * plan.layer.columns for plan in plans)
    tied = model.network.all_tied_weights_keys
    parameters = {name: p for name, p in model.network.named_parameters() if name not in tied}
    in_files = sum(p.numel() * p.element_size() for p in parameters.values())
    other = in_files - planned * model.network.dtype.itemsize
    in_blocks = {name: p.numel() for name, p in parameters.items() if name.startswith(tuple(model.blocks))}
    block = max(sum(n for name, n in in_blocks.items() if name.startswith(f"{b}.")) for b in model.blocks)
    outside = sum(p.numel() for name, p in parameters.items() if name not in in_blocks)
    width = max(plan.layer.columns for plan in plans)
    streams = 2 if text.corrects else 1  # the original model's beside the quantized one's
    activations = streams * tokens * model.network.config.get_text_config().hidden_size
    full = [plan for plan in plans if issubclass(plan.scheme.estimator.produces, Full)]
    curvature = max(
        sum(8 * plan.layer.columns**2 for plan in full if plan.layer.name.startswith(f"{b}.")) for b in model.blocks
    )
    solving = max(16 * plan.layer.rows * plan.layer.columns for plan in plans)
    in_type = outside + (1 + streams) * block + activations + 8 * TOKENS_PER_BATCH * width
    memory = STARTED + itemsize * in_type + curvature + solving
    passes = streams * PASSES[text.propagate]
    calibrate = 2 * tokens * passes * sum(in_blocks.values()) / _products_per_second(model, model.dtype)
    folded = streams * sum(2 * tokens * plan.layer.columns**2 for plan in full)
    fold = folded / _products_per_second(model, torch.float32)
    solve = sum(
        plan.layer.rows * plan.layer.columns * SOLVE_NANOSECONDS_PER_WEIGHT[plan.scheme.solver.needs is Full]
        for plan in plans
    )
    return Estimate(memory, calibrate + fold + solve / 1e9, other)


def _products_per_second(model: Model, dtype: torch.dtype) -> float:
    x = torch.ones(2048, PROBE, device=model.device, dtype=dtype)
    w = torch.ones(PROBE, PROBE, device=model.device, dtype=dtype)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        float((x @ w).sum())
        seconds.append(time.perf_counter() - start)
    return 2 * 2048 * PROBE * PROBE / min(seconds)
