"""The contract that dashq expects of every estimator, and what this one is for."""

import torch

from dashq import Full, Layer
from dashq.testing import check_strategy
from dashq_spatial_sign import SpatialSignEstimator


def second_moments(strength: float, x: torch.Tensor) -> torch.Tensor:
    estimator = SpatialSignEstimator(strength=strength)
    state = estimator.start(Layer(name="example", rows=1, columns=x.shape[1]))
    return estimator.finish(estimator.update(state, x, torch.ones(len(x)))).dense()


def test_the_contract_is_kept() -> None:
    check_strategy(SpatialSignEstimator)
    check_strategy(SpatialSignEstimator(strength=0.3))


def test_one_long_token_moves_it_by_no_more_than_its_share() -> None:
    x = torch.randn(99, 4, generator=torch.Generator().manual_seed(0))
    long = torch.tensor([[1e4, 0.0, 0.0, 0.0]])
    alone, together = second_moments(1.0, x), second_moments(1.0, torch.cat([x, long]))
    assert (together - alone).abs().max() <= 1.0001
    ordinary = second_moments(0.0, torch.cat([x, long])).diagonal()
    assert ordinary[0] > 1e5 * ordinary[1]


def test_without_strength_it_is_the_ordinary_second_moment() -> None:
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(second_moments(0.0, x), Full(x.T @ x).dense())
