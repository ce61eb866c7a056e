"""Patterns under a full curvature: nearly the best of all choices, and none for the worse."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dashq import Codebook, Full, Grouping
from dashq.solving import round_to_nearest
from dashq.testing.examples import CODEBOOK_GRIDS, Problem, block_problems
from dashq_plugins.solvers.feedback.error_feedback import Succession, feed_back
from dashq_plugins.solvers.feedback.joint import Joint, in_group_order
from dashq_plugins.solvers.feedback.patterns import choose_patterns, move_patterns, round_patterns
from dashq_plugins.solvers.feedback.successive import round_in_turn
from tensors import noise

few = settings(max_examples=20)


def codebooks() -> list[Codebook]:
    return [grid.codebook for grid in CODEBOOK_GRIDS if grid.codebook]


def metric_of(seed: int, width: int) -> Tensor:
    x = noise(seed, 40, width) + noise(seed + 1, 40, 1)
    return x.T @ x / 40 + 0.01 * torch.eye(width)


def costs(levels: Tensor, target: Tensor, metric: Tensor, scale: Tensor) -> Tensor:
    """(t - s c)ᵀ M (t - s c) for choices [choices, width]: [choices, rows]."""
    off = target - levels[..., None] * scale
    return (off * (metric @ off)).sum(1)


@few
@given(st.sampled_from(codebooks()), st.integers(0, 99))
def test_no_pattern_is_better_with_the_same_signs(codebook: Codebook, seed: int) -> None:
    target, scale = 3 * noise(seed, codebook.width, 5), noise(seed + 1, 5).abs() + 0.5
    metric = metric_of(seed + 2, codebook.width)
    chosen = choose_patterns(target, metric, scale, codebook)
    entries = codebook.entries(torch.device("cpu"))
    for row in range(5):
        signs = torch.where(chosen[:, row] < 0, -1.0, 1.0) if codebook.signs else torch.ones(codebook.width)
        others = costs(entries * signs, target[:, row : row + 1], metric, scale[row : row + 1])
        own = costs(chosen[None, :, row], target[:, row : row + 1], metric, scale[row : row + 1])
        assert own <= others.min() * (1 + 1e-4) + 1e-5


def test_under_a_diagonal_the_best_choice_of_all_is_found() -> None:
    for codebook in codebooks():
        target, scale, metric = 3 * noise(0, codebook.width, 20), torch.ones(20), torch.eye(codebook.width)
        entries = codebook.entries(torch.device("cpu"))
        if codebook.signs:
            signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=codebook.width)))
            entries = (entries[:, None] * signs).flatten(0, 1)
        chosen = choose_patterns(target, metric, scale, codebook)
        least = costs(entries, target, metric, scale).amin(0)
        torch.testing.assert_close((target - chosen).square().sum(0), least)


@few
@given(st.sampled_from(codebooks()), st.integers(0, 99))
def test_errors_are_those_of_columns_rounded_in_turn(codebook: Codebook, seed: int) -> None:
    width = codebook.width
    target, links = 3 * noise(seed, width, 5), 0.3 * noise(seed + 1, width, width)
    variances, scale = noise(seed + 2, width).exp(), torch.full((width, 5), 0.7)
    levels, errors = round_patterns(target, links, variances, scale, codebook)
    for column in range(width):
        # What the column should have been, after the errors of those before it.
        own = target[column] - links[column, :column] @ errors[:column]
        torch.testing.assert_close(errors[column], levels[column] * scale[column] - own, rtol=1e-4, atol=1e-4)


@few
@given(block_problems(needs=Full, codebooks=True))
def test_no_move_raises_the_error_of_any_row(problem: Problem) -> None:
    joint = joint_of(problem)
    for group in range(joint.grouping.groups):
        before, part = joint.objective(), joint.part(slice(group, group + 1))
        move_patterns(joint, group, (joint.h @ (joint.w - joint.approximation))[part])
        assert (joint.objective() <= before * (1 + 1e-4) + 1e-9 * joint.w.square().sum()).all()


def test_fed_back_errors_are_smaller_than_rounding_alone() -> None:
    for grid in CODEBOOK_GRIDS[:2]:
        assert grid.super_blocks
        columns = 2 * grid.super_blocks.columns
        x = noise(0, 300, columns) + 2 * noise(1, 300, 1)
        joint = joint_of(
            Problem(
                noise(2, 6, columns), Full(x.T @ x / 300), Grouping(columns=columns, size=grid.super_blocks.size), grid
            )
        )
        before = joint.objective().sum()
        turns = Succession.of(joint.h, grid)
        assert turns
        feed_back(joint, turns)
        assert turns.damping == 0.0
        assert joint.objective().sum() < 0.9 * before


def test_a_codebook_of_evenly_spaced_levels_rounds_as_codes_do() -> None:
    levels = Codebook(levels=(0.0, 1.0, 2.0, 3.0), patterns=bytes(range(4)))
    target, links, scale = 2 * noise(0, 1, 9).abs(), torch.zeros(1, 1), torch.ones(1, 9)
    codes, errors = round_patterns(target, links, torch.ones(1), scale, levels)
    expected = round_in_turn(target, links, scale, torch.zeros(1, 9), torch.tensor(3.0))
    assert codes.equal(expected[0])
    torch.testing.assert_close(errors, expected[1])


@few
@given(st.integers(0, 99))
def test_single_levels_are_rounded_in_turn_as_patterns_of_one_column_are(seed: int) -> None:
    """The general way, a column at a time, gives the same levels and errors."""
    for codebook in (codebook for codebook in codebooks() if codebook.is_scalar):
        levels, columns = torch.tensor(codebook.levels), 6
        target, links = 3 * noise(seed, columns, 5), 0.3 * noise(seed + 1, columns, columns)
        scale, nothing = noise(seed + 2, 5).expand(columns, -1), torch.zeros(columns, 5)
        codes, errors = round_in_turn(target, links, scale, nothing, levels[-1], None, levels)
        for column in range(columns):
            own = target[column] - links[column, :column] @ errors[:column]
            alone, error = round_patterns(own[None], links[:1, :1], torch.ones(1), scale[:1], codebook)
            torch.testing.assert_close(codes[column], alone[0])
            torch.testing.assert_close(errors[column], error[0], rtol=1e-4, atol=1e-4)


def joint_of(problem: Problem) -> Joint:
    w, grouping, grid = problem.weight, problem.grouping, problem.grid
    start = round_to_nearest(grouping.split(w), grid, grouping)
    return Joint.of(w, in_group_order(problem.curvature, grouping, 0.01), start)
