"""A law that is broken becomes an error that says by whom, and on which example."""

import pytest
import torch

from dashq import Diagonal
from dashq.testing.laws import BrokenLaw, naming, require
from recipes import REGISTRY

IRLS = REGISTRY.solvers["irls"]


def test_a_law_that_holds_says_nothing() -> None:
    require(True, "never be told")
    with naming(IRLS, Diagonal(torch.ones(3))):
        require(True, "never be told")


def test_a_law_that_does_not_hold_is_raised_in_its_words() -> None:
    with pytest.raises(BrokenLaw, match=r"^keep its codes$"):
        require(False, "keep its codes")


@pytest.mark.parametrize(
    ("subject", "title"),
    [
        (IRLS, "solver 'irls'"),
        (IRLS(), "solver 'irls'"),
        (REGISTRY.estimators["full"], "estimator 'full'"),
        (REGISTRY.groupers["channel"](), "grouper 'channel'"),
        (REGISTRY.routers["gated"], "router 'gated'"),
        (REGISTRY.serializers["dashq"](), "serializer 'dashq'"),
        (Diagonal(torch.ones(2)), "curvature 'Diagonal'"),
    ],
    ids=str,
)
def test_the_subject_is_named_by_its_kind_and_its_name(subject: object, title: str) -> None:
    with pytest.raises(AssertionError, match=f"^{title} must keep its word$"), naming(subject):  # type: ignore[arg-type]
        require(False, "keep its word")


def test_the_example_is_told_by_its_shapes() -> None:
    message = r"^solver 'irls' must keep its word\. Example: Diagonal\(values=\[3\]\)$"
    with pytest.raises(AssertionError, match=message) as error, naming(IRLS, Diagonal(torch.ones(3))):
        require(False, "keep its word")
    assert isinstance(error.value.__cause__, BrokenLaw)


def test_whatever_else_goes_wrong_is_a_law_too() -> None:
    with (
        pytest.raises(AssertionError, match=r"^solver 'irls' must run without ZeroDivisionError: no tokens$"),
        naming(IRLS),
    ):
        raise ZeroDivisionError("no tokens")


def test_a_user_who_interrupts_is_no_broken_law() -> None:
    with pytest.raises(KeyboardInterrupt), naming(IRLS):
        raise KeyboardInterrupt
