"""`feedback` never loses to what it starts from, and tells what it took."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from dashq import Coupled, Curvature, Full, Grid, Grouping, Layer, PlanError, Quantized
from dashq.solving.arithmetic import round_to_nearest
from dashq.testing.examples import CODEBOOK_GRIDS, Problem, block_problems, curvatures, problems
from dashq_plugins.formats.gguf.blocks import named
from dashq_plugins.solvers.feedback.joint import in_group_order
from dashq_plugins.solvers.feedback.solver import FeedbackSolver
from recipes import REGISTRY
from tensors import noise

few = settings(max_examples=10)
SUPER_BLOCKS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
GRID, GROUPING = Grid(bits=2, dtype=torch.float16), Grouping(columns=48, size=16)


def correlated(columns: int = 48) -> Full:
    x = noise(0, 200, columns) + 2 * noise(1, 200, 1) * torch.linspace(-1, 2, columns)
    return Full(x.T @ x / 200)


def objective(problem: Problem, q: Quantized, damping: float = 0.01) -> Tensor:
    """(w - ŵ)ᵀ (H + damping) (w - ŵ) of each row, with H scaled to a mean diagonal of 1."""
    e = problem.weight.double() - q.dequantize().double()
    plain = Grouping(columns=problem.grouping.columns, size=problem.grouping.columns)
    return ((e @ in_group_order(problem.curvature, plain, damping).double()) * e).sum(1)


def solve(problem: Problem, **parameters: float) -> Quantized:
    solver = FeedbackSolver.model_validate(parameters)
    return solver.solve(problem.weight, problem.curvature, problem.grouping, problem.grid)


@few
@given(problems(columns=16, needs=Coupled))
def test_no_row_is_worse_than_with_what_it_starts_from(problem: Problem) -> None:
    own = objective(problem, solve(problem))
    w = problem.grouping.split(problem.weight)
    closed_form = REGISTRY.solvers["closed_form"]()
    starts = [
        round_to_nearest(w, problem.grid, problem.grouping),
        closed_form.solve(problem.weight, problem.curvature, problem.grouping, problem.grid),
    ]
    rounding = 1e-6 * problem.weight.double().square().sum(1) * 16
    for start in starts:
        assert bool((own <= objective(problem, start) * (1 + 1e-3) + rounding).all())


@few
@given(block_problems(needs=Coupled))
def test_in_super_blocks_no_row_is_worse_than_with_k_quant(problem: Problem) -> None:
    own = objective(problem, solve(problem))
    start = REGISTRY.solvers["k_quant"]().solve(problem.weight, problem.curvature, problem.grouping, problem.grid)
    rounding = 1e-6 * problem.weight.double().square().sum(1) * problem.grouping.columns
    assert bool((own <= objective(problem, start) * (1 + 1e-3) + rounding).all())


@pytest.mark.parametrize("label", ["Q5_K", "Q6_K"])  # of more bits than `block_problems` has
@few
@given(curvature=curvatures(256, Coupled), seed=st.integers(0, 99))
def test_in_super_blocks_of_five_and_six_bits_no_row_is_worse_than_with_k_quant(
    label: str, curvature: Curvature, seed: int
) -> None:
    grid = named(label).grid
    problem = Problem(noise(seed, 2, 256), curvature, Grouping(columns=256, size=named(label).size), grid)
    own = objective(problem, solve(problem))
    start = REGISTRY.solvers["k_quant"]().solve(problem.weight, curvature, problem.grouping, grid)
    assert bool((own <= objective(problem, start) * (1 + 1e-3) + 1e-9).all())


@pytest.mark.parametrize("label", SUPER_BLOCKS)
def test_in_super_blocks_it_lowers_the_error_and_more_with_every_sweep(label: str) -> None:
    grid = named(label).grid
    assert grid.super_blocks
    grouping = Grouping(columns=512, size=grid.super_blocks.size)
    problem = Problem(noise(2, 16, 512), correlated(512), grouping, grid)
    start = REGISTRY.solvers["k_quant"]().solve(problem.weight, problem.curvature, grouping, grid)
    errors = [float(objective(problem, q).sum()) for q in (start, *(solve(problem, sweeps=n) for n in (0, 1, 3)))]
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 0.8 * errors[0]


def test_in_super_blocks_groups_have_their_size() -> None:
    grid = REGISTRY.serializers["gguf"]().grid(2)
    FeedbackSolver().check(16, grid)
    with pytest.raises(PlanError, match="needs groups of 16 in super-blocks of 2 bits, not of 64"):
        FeedbackSolver().check(64, grid)


def test_it_lowers_the_error_of_correlated_inputs_and_more_with_every_sweep() -> None:
    problem = Problem(noise(2, 40, 48), correlated(), GROUPING, GRID)
    start = REGISTRY.solvers["closed_form"]().solve(problem.weight, problem.curvature, GROUPING, GRID)
    errors = [float(objective(problem, q).sum()) for q in (start, *(solve(problem, sweeps=n) for n in (0, 1, 3)))]
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 0.9 * errors[0]


def test_without_sweeps_scales_and_offsets_are_those_of_the_start() -> None:
    problem = Problem(noise(2, 40, 48), correlated(), GROUPING, GRID)
    start = REGISTRY.solvers["closed_form"]().solve(problem.weight, problem.curvature, GROUPING, GRID)
    codes_alone = solve(problem, sweeps=0)
    assert codes_alone.scale.equal(start.scale)
    assert codes_alone.offset.equal(start.offset)
    assert not codes_alone.codes.equal(start.codes)


def test_it_tells_its_damping_and_the_share_of_the_error_that_is_left() -> None:
    problem = Problem(noise(2, 40, 48), correlated(), GROUPING, GRID)
    start = REGISTRY.solvers["closed_form"]().solve(problem.weight, problem.curvature, GROUPING, GRID)
    q = solve(problem, damping=0.05)
    assert q.statistics["damping"] == 0.05
    left = objective(problem, q, 0.05).sum() / objective(problem, start, 0.05).sum()
    assert q.statistics["objective"] == pytest.approx(float(left), rel=0.02)
    assert q.fallbacks == ()


def test_what_cannot_be_factorized_is_told_and_still_no_worse_than_its_start() -> None:
    indefinite = Full(3 * torch.ones(16, 16) - 2 * torch.eye(16))
    problem = Problem(noise(3, 4, 16), indefinite, Grouping(columns=16, size=16), GRID)
    q = solve(problem)
    assert q.fallbacks == ("H could not be factorized: no error feedback",)
    assert q.statistics["damping"] == 0.01


def test_where_nothing_is_left_to_lower_nothing_is_lowered() -> None:
    constant = Problem(torch.ones(3, 16), Full(torch.eye(16)), Grouping(columns=16, size=16), GRID)
    q = solve(constant)
    assert q.dequantize().equal(constant.weight)
    assert q.statistics["objective"] == 1.0


def test_it_needs_what_lies_off_the_diagonal_and_answers_for_whole_rows() -> None:
    assert FeedbackSolver.needs is Coupled
    assert FeedbackSolver.objective == "rows"


@pytest.mark.parametrize("field", [{"damping": 0.0}, {"damping": 1.5}, {"sweeps": -1}])
def test_parameters_outside_their_range_are_refused(field: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(field))):
        FeedbackSolver.model_validate(field)


def test_a_weight_takes_longer_in_few_rows_and_in_many_columns() -> None:
    def nanoseconds(rows: int, columns: int) -> float:
        return FeedbackSolver().nanoseconds(Layer(name="layer", rows=rows, columns=columns), 64, GRID)

    assert nanoseconds(192, 576) > nanoseconds(576, 576) < nanoseconds(576, 1536)


def test_a_weight_takes_longer_in_super_blocks_and_longest_where_patterns_are_chosen() -> None:
    layer = Layer(name="layer", rows=576, columns=1536)
    scalar, patterns = (
        min(FeedbackSolver().nanoseconds(layer, 32, grid) for grid in CODEBOOK_GRIDS if is_scalar(grid) == wanted)
        for wanted in (True, False)
    )
    assert FeedbackSolver().nanoseconds(layer, 32, GRID) < scalar < patterns


def is_scalar(grid: Grid) -> bool:
    assert grid.codebook
    return grid.codebook.is_scalar
