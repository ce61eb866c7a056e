"""`k_quant` is the search on super-blocks as a solver, and takes no other grids."""

import pytest
import torch

from dashq import Diagonal, Grid, Grouping, PlanError
from dashq.testing.comparison import equal
from dashq_plugins.solvers.block_search import search_blocks
from dashq_plugins.solvers.k_quant import KQuantSolver
from recipes import REGISTRY
from tensors import noise

SOLVER = KQuantSolver()
SUPER_BLOCKS = tuple(REGISTRY.serializers["gguf"]().grid(bits) for bits in (2, 3, 4, 6))


@pytest.mark.parametrize("grid", SUPER_BLOCKS, ids=lambda grid: f"{grid.bits} bits")
def test_it_returns_what_the_search_finds(grid: Grid) -> None:
    assert grid.super_blocks
    grouping = Grouping(columns=256, size=grid.super_blocks.size)
    weight, curvature = noise(0, 2, 256), Diagonal(noise(1, 256).exp())
    found = search_blocks(weight, curvature, grouping, grid)
    assert equal(SOLVER.solve(weight, curvature, grouping, grid), found)


def test_plain_grids_and_other_sizes_of_groups_are_refused() -> None:
    with pytest.raises(PlanError, match="super-blocks"):
        SOLVER.check(16, Grid(bits=2, dtype=torch.float16))
    for grid in SUPER_BLOCKS:
        assert grid.super_blocks
        SOLVER.check(grid.super_blocks.size, grid)
        with pytest.raises(PlanError, match=f"groups of {grid.super_blocks.size} at {grid.bits} bits, not of 64"):
            SOLVER.check(64, grid)
