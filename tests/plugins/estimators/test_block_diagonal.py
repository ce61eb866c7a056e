"""`block_diagonal` keeps what lies within blocks of columns."""

import torch

from dashq import Full, Layer
from recipes import REGISTRY
from tensors import noise


def test_block_diagonal_forgets_what_lies_between_blocks() -> None:
    x = noise(0, 30, 10)
    estimator = REGISTRY.estimators["block_diagonal"].model_validate({"size": 4})
    state = estimator.update(estimator.start(Layer(name="l", rows=1, columns=10)), x, torch.ones(30))
    curvature = estimator.finish(state)
    assert isinstance(curvature, Full)
    block = torch.arange(10) // 4
    expected = torch.where(block[:, None] == block, x.T @ x / 30, 0.0)
    torch.testing.assert_close(curvature.matrix, expected)
