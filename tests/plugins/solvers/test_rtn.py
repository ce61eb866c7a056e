"""`rtn` spreads the codes over each group's range and knows nothing of the curvature."""

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from dashq import Diagonal, Grid, Grouping
from dashq.testing.comparison import equal
from dashq.testing.examples import Problem, curvatures, problems
from dashq_plugins.solvers.rtn import RoundToNearestSolver
from tensors import noise

SOLVER = RoundToNearestSolver()


@settings(max_examples=30)
@given(problems(columns=16), curvatures(16))
def test_the_curvature_changes_nothing(problem: Problem, other: Diagonal) -> None:
    one, same = (
        SOLVER.solve(problem.weight, curvature, problem.grouping, problem.grid)
        for curvature in (problem.curvature, other)
    )
    assert equal(one, same)


@pytest.mark.parametrize(
    ("grid", "codes", "values"),
    [
        # Scale 2 and offset -1: the range of the group, in three steps.
        (Grid(bits=2, dtype=torch.float32), [0, 1, 2, 3], [-1, 1, 3, 5]),
        # The same scale, and the code that stands for 0 is the even one of the two nearest to 1 / 2.
        (Grid(bits=2, dtype=torch.float32, zero="integer"), [0, 0, 2, 2], [0, 0, 4, 4]),
        # Code 2 stands for 0, and three steps reach from -5 to 5.
        (Grid(bits=2, dtype=torch.float32, zero="symmetric"), [2, 2, 3, 3], [0, 0, 10 / 3, 10 / 3]),
    ],
    ids=["real", "integer", "symmetric"],
)
def test_a_group_by_hand(grid: Grid, codes: list[int], values: list[float]) -> None:
    weight = torch.tensor([[-1.0, 0.9, 3.1, 5.0]])
    result = SOLVER.solve(weight, Diagonal(torch.ones(4)), Grouping(columns=4, size=4), grid)
    assert result.codes.flatten().tolist() == codes
    torch.testing.assert_close(result.dequantize(), torch.tensor([values], dtype=torch.float32))


def test_every_group_has_a_range_of_its_own() -> None:
    weight = torch.cat([noise(0, 5, 8), 100 * noise(1, 5, 8)], dim=1)
    grouping, grid = Grouping(columns=16, size=8), Grid(bits=8, dtype=torch.float32)
    result = SOLVER.solve(weight, Diagonal(torch.ones(16)), grouping, grid)
    error: Tensor = (weight - result.dequantize()).abs()
    half_a_step = 0.5 * (grouping.split(weight).amax(-1) - grouping.split(weight).amin(-1)) / 255
    assert bool((grouping.split(error).amax(-1) <= half_a_step * 1.001).all())
    torch.testing.assert_close(result.scale, 2 * half_a_step)
