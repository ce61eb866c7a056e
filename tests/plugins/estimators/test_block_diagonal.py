"""`block_diagonal` keeps what lies within blocks of columns."""

import pytest
import torch
from torch import Tensor

from dashq import Layer
from dashq.testing import check_curvature
from dashq_plugins.estimators.block_diagonal import BlockDiagonal, BlockDiagonalEstimator
from tensors import noise

BLOCK = torch.arange(10) // 4


def learned(x: Tensor) -> BlockDiagonal:
    estimator = BlockDiagonalEstimator(size=4)
    state = estimator.start(Layer(name="l", rows=1, columns=10))
    return estimator.finish(estimator.update(state, x, torch.ones(len(x))))


def test_block_diagonal_forgets_what_lies_between_blocks() -> None:
    x = noise(0, 30, 10)
    expected = torch.where(BLOCK[:, None] == BLOCK, x.T @ x / 30, 0.0)
    torch.testing.assert_close(learned(x).dense(), expected)


def test_it_keeps_no_more_than_its_blocks() -> None:
    assert learned(noise(0, 30, 10)).blocks.shape == (3, 4, 4)


def test_what_lies_between_blocks_counts_as_taken_away() -> None:
    between = int((BLOCK[:, None] != BLOCK).sum())
    assert learned(noise(0, 30, 10)).shrinkage == pytest.approx(between / 90)


def test_it_answers_as_a_whole_curvature_does_alone_and_blended() -> None:
    check_curvature(learned(noise(0, 30, 10)), learned(noise(1, 30, 10)))
    check_curvature(learned(noise(0, 30, 10)))
