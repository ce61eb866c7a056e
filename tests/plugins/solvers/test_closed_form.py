"""`closed_form` loses to no other solver in any group, and comes close to the optimum."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dashq import Diagonal, Grid, Grouping, Quantized
from dashq.data import Zero
from dashq.solving.arithmetic import group_importance
from dashq.solving.certificate import certify
from dashq.testing.examples import Problem, grids, importances, problems, weights
from recipes import REGISTRY

SOLVERS = REGISTRY.solvers
OTHERS = [SOLVERS["rtn"](), SOLVERS["irls"](), SOLVERS["irls"].model_validate({"preset": "paper"})]
few = settings(max_examples=20)


def errors(problem: Problem, q: Quantized) -> Tensor:
    """The root of Σ h (w - ŵ)² of each row and group, as solvers see it."""
    h = group_importance(problem.curvature, problem.grouping)
    w = problem.grouping.split(problem.weight)
    return (h * (w - q.scale.float()[..., None] * q.codes - q.offset.float()[..., None]).square()).sum(-1).sqrt()


def indistinguishable(problem: Problem) -> Tensor:
    """What float32 cannot tell apart at the size of a group's weights."""
    return 4 * torch.finfo(torch.float32).eps * problem.grouping.split(problem.weight).abs().amax(-1)


@few
@given(problems())
def test_no_group_is_worse_than_with_another_solver(problem: Problem) -> None:
    arguments = (problem.weight, problem.curvature, problem.grouping, problem.grid)
    own_errors = errors(problem, SOLVERS["closed_form"]().solve(*arguments))
    rounding = indistinguishable(problem)
    for other in OTHERS:
        assert bool((own_errors <= errors(problem, other.solve(*arguments)) * (1 + 1e-4) + rounding).all())


@few
@given(weights(3, 12), importances(12), grids(("real",)))
def test_weights_of_another_scale_give_the_same_codes(w: Tensor, h: Tensor, grid: Grid) -> None:
    wide = Grid(bits=grid.bits, dtype=torch.float32)
    grouping = Grouping(columns=12, size=12)
    small, large = (SOLVERS["closed_form"]().solve(f * w, Diagonal(h), grouping, wide).dequantize() for f in (1.0, 8.0))
    assert large.equal(8 * small)


@few
@given(st.integers(0, 999), importances(12), st.integers(1, 4), st.floats(-2, 2))
def test_neither_a_shift_nor_the_order_of_columns_matters(seed: int, h: Tensor, bits: int, shift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    w, order = torch.randn(3, 12, generator=generator), torch.randperm(12, generator=generator)
    grid, grouping = Grid(bits=bits, dtype=torch.float32), Grouping(columns=12, size=12)
    here = Problem(w, Diagonal(h), grouping, grid)
    there = Problem((w + shift)[:, order], Diagonal(h[order]), grouping, grid)
    both_errors = [
        errors(p, SOLVERS["closed_form"]().solve(p.weight, p.curvature, grouping, grid)) for p in (here, there)
    ]
    torch.testing.assert_close(*both_errors, rtol=1e-2, atol=1e-5)


@few
@given(st.integers(0, 999), importances(12), grids(("real",)), st.sampled_from([1, 12]))
def test_a_constant_group_is_reproduced(seed: int, h: Tensor, grid: Grid, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(3, 1, generator=generator).to(grid.dtype).float().expand(3, 12)
    grouping = Grouping(columns=12, size=size)
    assert SOLVERS["closed_form"]().solve(w, Diagonal(h), grouping, grid).dequantize().equal(w)


@few
@given(weights(3, 12), grids())
def test_no_importance_at_all_is_as_good_as_flat(w: Tensor, grid: Grid) -> None:
    grouping, solver = Grouping(columns=12, size=12), SOLVERS["closed_form"]()
    none, flat = (solver.solve(w, Diagonal(h), grouping, grid).dequantize() for h in (torch.zeros(12), torch.ones(12)))
    assert none.equal(flat)


@pytest.mark.parametrize("zero", ["real", "integer", "symmetric"])
def test_at_2_bits_it_is_within_one_percent_of_the_optimum(zero: Zero) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 192, generator=generator)
    curvature = Diagonal((1.5 * torch.randn(192, generator=generator)).exp())
    grouping, grid = Grouping(columns=192, size=64), Grid(bits=2, dtype=torch.float16, zero=zero)
    quantized = SOLVERS["closed_form"]().solve(weight, curvature, grouping, grid)
    certificate = certify("layer", weight, quantized, curvature, 40)
    assert certificate is not None
    assert certificate.gap < 0.01
