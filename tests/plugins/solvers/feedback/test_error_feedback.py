"""Error feedback on a frozen grid is GPTQ by the textbook, and what cannot be factorized is left as it is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dashq import Curvature, Diagonal, Full, Grid, Grouping
from dashq.solving.arithmetic import round_to_nearest
from dashq.testing.examples import Problem, curvatures, problems
from dashq_plugins.solvers.feedback import error_feedback
from dashq_plugins.solvers.feedback.error_feedback import Succession, factorize, feed_back
from dashq_plugins.solvers.feedback.joint import Joint, in_group_order
from tensors import noise

few = settings(max_examples=20)
DAMPING = 0.01


def fed_back(joint: Joint) -> float | None:
    """Choose a layer's codes anew, where H can be factorized; returns the damping that it took."""
    turns = Succession.of(joint.h, joint.grid)
    if turns is None:
        return None
    feed_back(joint, turns)
    return turns.damping


def joint_of(problem: Problem, damping: float = DAMPING) -> Joint:
    w, grouping, grid = problem.weight, problem.grouping, problem.grid
    h = in_group_order(problem.curvature, grouping, damping)
    return Joint.of(w, h, round_to_nearest(grouping.split(w), grid, grouping))


def correlated(columns: int, seed: int = 0) -> Full:
    """The second moment of columns that have much in common."""
    x = noise(seed, 4 * columns, columns) + 2 * noise(seed + 1, 4 * columns, 1) * torch.linspace(0.5, 2, columns)
    return Full(x.T @ x / len(x))


def textbook(joint: Joint) -> Tensor:
    """GPTQ column by column in float64, from the most important on, with a new inverse after each."""
    w, h = joint.w.double().clone(), joint.h.double()
    group, codes = torch.arange(len(w)) // joint.grouping.size, torch.empty_like(joint.codes)
    left = h.diagonal().argsort(descending=True, stable=True).tolist()
    while left:
        column = left[0]
        scale, offset = joint.scale[group[column]].double(), joint.offset[group[column]].double()
        code = ((w[column] - offset) / scale).round().clamp(0, joint.grid.top)
        codes[column] = code.float()
        inverse = torch.linalg.inv(h[left][:, left])
        error = (w[column] - (scale * code + offset)) / inverse[0, 0]
        w[left] -= inverse[:, :1] * error
        left = left[1:]
    return codes


@pytest.mark.parametrize(("columns", "size"), [(12, 5), (24, 8), (40, 16), (48, 48)])
@pytest.mark.parametrize("block", [128, 16])
def test_it_is_gptq_by_the_textbook(columns: int, size: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(error_feedback, "BLOCK", block)
    grid, grouping = Grid(bits=3, dtype=torch.float32), Grouping(columns=columns, size=size)
    joint = joint_of(Problem(noise(7, 6, columns), correlated(columns), grouping, grid))
    filled = joint.h.diagonal() > 0
    joint.h[~filled, ~filled] = 1.0  # what fills up a group is by itself
    expected, rounded = textbook(joint), joint.codes.clone()
    assert fed_back(joint) == 0.0
    assert float((joint.codes[filled] != expected[filled]).float().mean()) < 0.02  # seldom a tie falls otherwise
    assert not joint.codes.equal(rounded)


def test_what_later_columns_make_up_for_lowers_the_error_of_the_output() -> None:
    grid, grouping = Grid(bits=2, dtype=torch.float32), Grouping(columns=64, size=16)
    joint = joint_of(Problem(noise(3, 32, 64), correlated(64), grouping, grid))
    before = joint.objective().sum()
    fed_back(joint)
    assert joint.objective().sum() < 0.5 * before


@few
@given(problems(columns=12), st.integers(0, 99))
def test_under_a_diagonal_it_is_rounding(problem: Problem, seed: int) -> None:
    h = torch.rand(12, generator=torch.Generator().manual_seed(seed)) + 0.1
    joint = joint_of(Problem(problem.weight, Diagonal(h), problem.grouping, problem.grid))
    before = joint.codes.clone()
    assert fed_back(joint) == 0.0
    assert joint.codes.equal(before)


@few
@given(problems(columns=12))
def test_nothing_but_the_codes_changes_and_they_stay_on_the_grid(problem: Problem) -> None:
    joint = joint_of(problem)
    before = joint.w.clone(), joint.h.clone(), joint.scale.clone(), joint.offset.clone()
    fed_back(joint)
    assert all(now.equal(then) for now, then in zip((joint.w, joint.h, joint.scale, joint.offset), before, strict=True))
    assert bool(((joint.codes >= 0) & (joint.codes <= problem.grid.top)).all())
    assert joint.codes.equal(joint.codes.round())


@few
@given(curvatures(16, Full))
def test_any_curvature_is_factorized_with_enough_damping(curvature: Curvature) -> None:
    h = in_group_order(curvature, Grouping(columns=16, size=16), 0.0)
    factors = factorize(h, 0.0)
    assert factors is not None
    upper, damping = factors
    assert upper.equal(upper.triu())
    inverse = torch.linalg.inv((h + damping * torch.eye(16)).double())
    torch.testing.assert_close((upper.T @ upper).double(), inverse, rtol=1e-2, atol=1e-2 * float(inverse.abs().max()))


def test_a_wide_matrix_is_factorized_stripe_by_stripe() -> None:
    columns = 2 * error_feedback.BLOCK + 5
    h = correlated(columns).matrix + torch.eye(columns)
    factors = factorize(h, 0.0)
    assert factors is not None
    upper, damping = factors
    assert damping == 0
    torch.testing.assert_close(upper @ h @ upper.T, torch.eye(columns), rtol=0, atol=2e-3)


def test_damping_grows_tenfold_from_what_is_given_until_it_helps() -> None:
    singular = torch.ones(4, 4) - 0.005 * torch.eye(4)  # its other eigenvalues are -0.005
    assert [factors and pytest.approx(factors[1]) for factors in (factorize(singular, d) for d in (0.0, 0.002))] == [
        0.01,
        0.02,
    ]
    assert factorize(torch.ones(4, 4) - 3 * torch.eye(4), 0.0) is None


def test_what_cannot_be_factorized_keeps_its_codes_and_says_so() -> None:
    indefinite = 3 * torch.ones(8, 8) - 2 * torch.eye(8)
    problem = Problem(noise(0, 2, 8), Full(indefinite), Grouping(columns=8, size=8), Grid(bits=2, dtype=torch.float32))
    joint = joint_of(problem)
    before = joint.codes.clone()
    assert fed_back(joint) is None
    assert joint.codes.equal(before)


def test_columns_without_any_input_are_rounded_by_themselves() -> None:
    matrix = correlated(8).matrix
    matrix[5], matrix[:, 5] = 0, 0
    joint = joint_of(
        Problem(noise(1, 4, 8), Full(matrix), Grouping(columns=8, size=8), Grid(bits=2, dtype=torch.float32)), 0.0
    )
    rounded = joint.codes[5].clone()
    assert fed_back(joint) is not None
    assert joint.codes[5].equal(rounded)
