"""The nearest patterns of a codebook are the best of all, one column's sign at a time."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dashq import Codebook, Grid
from dashq.solving import encode, nearest_levels, nearest_patterns, round_to_nearest
from dashq.testing.examples import CODEBOOK_GRIDS, Problem, block_problems
from tensors import noise


def codebooks() -> list[Codebook]:
    return [grid.codebook for grid in CODEBOOK_GRIDS if grid.codebook]


def every_choice(codebook: Codebook) -> Tensor:
    """All that the columns of a pattern can hold together: [choices, width]."""
    entries = codebook.entries(torch.device("cpu"))
    if not codebook.signs:
        return entries
    signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=codebook.width)))
    return (entries[:, None] * signs).flatten(0, 1)


@given(st.sampled_from(codebooks()), st.integers(0, 99))
def test_no_level_is_nearer(codebook: Codebook, seed: int) -> None:
    x, levels = 1.5 * codebook.levels[-1] * noise(seed, 4, 7), torch.tensor(codebook.levels)
    nearest = nearest_levels(x, codebook)
    torch.testing.assert_close((x - nearest).abs(), (x[..., None] - levels).abs().amin(-1))
    assert torch.isin(nearest, levels).all()


@given(st.sampled_from(codebooks()), st.integers(0, 99))
def test_no_pattern_with_any_signs_is_nearer(codebook: Codebook, seed: int) -> None:
    x, h = 3 * noise(seed, 2, 3, 8), noise(seed + 1, 3, 8).exp()
    nearest = nearest_patterns(x, h, codebook)
    choices = every_choice(codebook)
    targets, chosen = (values.unflatten(-1, (-1, codebook.width)) for values in (x, nearest))
    importance = h.unflatten(-1, (-1, codebook.width))
    least = (importance[..., None, :] * (targets[..., None, :] - choices).square()).sum(-1).amin(-1)
    torch.testing.assert_close((importance * (targets - chosen).square()).sum(-1), least)
    assert (chosen[..., None, :] == choices).all(-1).any(-1).all()


@given(block_problems(codebooks=True))
def test_rounding_takes_patterns_of_the_codebook(problem: Problem) -> None:
    grid, grouping = problem.grid, problem.grouping
    assert grid.codebook
    q = round_to_nearest(grouping.split(problem.weight), grid, grouping)
    levels = q.numbers(q.codes)
    choices = every_choice(grid.codebook)
    parts = levels.unflatten(-1, (-1, grid.codebook.width))
    assert (parts[..., None, :] == choices).all(-1).any(-1).all()


def test_a_weight_that_is_a_pattern_keeps_it() -> None:
    for grid in CODEBOOK_GRIDS:
        assert grid.codebook
        assert grid.super_blocks
        entries = every_choice(grid.codebook)
        size = grid.super_blocks.size
        levels = entries[torch.arange(4 * size // grid.codebook.width) % len(entries)].view(1, 4, size)
        scale = torch.tensor([[1.0, 2.0, 0.5, 4.0]])
        codes = encode(levels * scale[..., None], scale, torch.zeros_like(scale), grid)
        assert grid.codebook.values(codes.to(torch.uint8)).equal(levels)


def test_a_grid_without_a_codebook_rounds_as_ever() -> None:
    w = torch.tensor([[[0.0, 0.4, 0.6, 9.0]]])
    codes = encode(w, torch.ones(1, 1), torch.zeros(1, 1), Grid(bits=2, dtype=torch.float16))
    assert codes.tolist() == [[[0.0, 0.0, 1.0, 3.0]]]
