"""The contract that dashq expects of every estimator."""

from dashq_clipped import ClippedEstimator

from dashq.testing import check_strategy


def test_the_contract_is_kept() -> None:
    check_strategy(ClippedEstimator)
