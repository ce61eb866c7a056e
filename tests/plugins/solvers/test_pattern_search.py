"""The search on codebooks: what it gives can be stored, and no super-block is worse than min-max rounding."""

import torch
from hypothesis import given, settings
from torch import Tensor

from dashq import Diagonal, Grouping, Quantized
from dashq.solving import round_to_nearest
from dashq.solving.super_blocks import factor
from dashq.testing.examples import Problem, block_problems
from dashq_plugins.formats.gguf.blocks import named
from dashq_plugins.solvers.block_search import _importance, search_blocks
from dashq_plugins.solvers.pattern_search import search_patterns
from tensors import noise


def solved(problem: Problem) -> Quantized:
    h = _importance(problem.curvature, problem.grouping)
    return search_patterns(problem.weight, h, problem.grouping, problem.grid)


def errors(q: Quantized, problem: Problem) -> Tensor:
    """Σ h (w - ŵ)² of each super-block in float64."""
    blocks = problem.grid.super_blocks
    assert blocks
    h = _importance(problem.curvature, problem.grouping).double()
    off = problem.grouping.split(problem.weight.double() - q.dequantize().double())
    sums: Tensor = (h * off.square()).sum(-1).unflatten(1, (-1, blocks.groups)).sum(-1)
    return sums


@settings(max_examples=20)
@given(block_problems(codebooks=True))
def test_no_super_block_is_worse_than_min_max_rounding(problem: Problem) -> None:
    minmax = round_to_nearest(problem.grouping.split(problem.weight), problem.grid, problem.grouping)
    size = problem.grouping.split(problem.weight).abs().amax().square() * problem.grouping.columns
    assert (errors(solved(problem), problem) <= errors(minmax, problem) * (1 + 1e-4) + 1e-10 * size).all()


@settings(max_examples=20)
@given(block_problems(codebooks=True))
def test_scales_are_allowed_multiples_of_a_float16_unit(problem: Problem) -> None:
    q, blocks = solved(problem), problem.grid.super_blocks
    assert blocks
    scales = q.scale.unflatten(1, (-1, blocks.groups)).flatten(0, 1)
    unit, multiple = factor(scales, blocks, blocks.signed)
    assert (unit.float() * multiple).equal(scales)
    assert torch.isin(multiple, blocks.multiples).all()
    assert (q.offset == 0).all()


def test_weights_that_a_codebook_holds_are_found() -> None:
    grid = named("IQ3_S").grid
    assert grid.codebook
    assert grid.super_blocks
    entries = grid.codebook.entries(torch.device("cpu"))
    w = 0.01 * entries[torch.arange(2 * 64) * 3 % len(entries)].view(2, 256)
    q = search_blocks(w, Diagonal(torch.ones(256)), Grouping(columns=256, size=32), grid)
    torch.testing.assert_close(q.dequantize(), w, rtol=2e-3, atol=0)


def test_patterns_of_two_bits_beat_super_blocks_of_their_size() -> None:
    w, curvature = noise(0, 32, 512), Diagonal(noise(1, 512).exp())
    errors = {}
    for name in ("IQ2_S", "Q2_K"):
        q = search_blocks(w, curvature, Grouping(columns=512, size=16), named(name).grid)
        errors[name] = float(((w - q.dequantize()).square() * curvature.values).sum())
    assert errors["IQ2_S"] < errors["Q2_K"]
