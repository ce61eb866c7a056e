"""Every installed strategy keeps the contract of its kind, and the contracts notice when one does not."""

import re
from typing import Any, ClassVar

import pytest

from broken_strategies import BROKEN, LosesToRounding, TurnsTheScale
from dashq import Solver, load_registry
from dashq.strategies import KINDS, Strategy
from dashq.testing import check_strategy
from dashq_plugins.formats.native import NativeSerializer
from dashq_plugins.groupers.contiguous import ContiguousGrouper
from dashq_plugins.solvers.irls import IrlsSolver
from dashq_plugins.tuners.distill import Distill

INSTALLED = [cls for kind in KINDS for cls in getattr(load_registry(), kind).values()]
OTHER_PARAMETERS = [
    IrlsSolver(preset="paper"),
    IrlsSolver(p=1.0),
    ContiguousGrouper(size=100, uneven="divisor"),
    ContiguousGrouper(size=40, uneven="pad"),
    NativeSerializer(dtype="bfloat16"),
    Distill(temperature=2.0, next_token_share=0.5),
    Distill(scales=0.0, offsets=0.0),
]


@pytest.mark.parametrize("strategy", INSTALLED, ids=lambda cls: cls.name)
def test_every_installed_strategy_keeps_its_contract(strategy: type[Strategy]) -> None:
    check_strategy(strategy)


@pytest.mark.parametrize("strategy", OTHER_PARAMETERS, ids=repr)
def test_other_parameters_change_nothing_about_that(strategy: Strategy) -> None:
    check_strategy(strategy)


@pytest.mark.parametrize(("strategy", "law"), BROKEN, ids=[strategy.name for strategy, _ in BROKEN])
def test_a_broken_strategy_is_told_which_law_it_breaks(strategy: type[Strategy] | Strategy, law: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(f"{strategy.name!r} must {law}")):
        check_strategy(strategy)


class ClaimsNothing(LosesToRounding):
    name = "claims_nothing"
    claims: ClassVar[Any] = ()


def test_a_solver_may_lose_to_rounding_where_it_does_not_claim_otherwise() -> None:
    check_strategy(ClaimsNothing)


@pytest.mark.parametrize("solver", load_registry().solvers.values(), ids=lambda cls: cls.name)
def test_every_installed_solver_claims_never_to_lose_to_rounding(solver: type[Solver]) -> None:
    assert "never_worse_than_minmax" in solver.claims


def test_the_message_shows_the_shape_of_the_smallest_example() -> None:
    shape = "Problem(weight=[1, 1], curvature=Diagonal(values=[1]), grouping=Grouping(columns=1, size=1, order=None), "
    with pytest.raises(AssertionError, match=f"^solver 'turns_the_scale' must .* {re.escape(shape)}grid=Grid"):
        check_strategy(TurnsTheScale)
