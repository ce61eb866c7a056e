"""Every error that a user can mend is of one kind, and none is caught as another."""

import inspect

import pytest

import dashq
from dashq import errors
from dashq.errors import DashqError

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Exception)]


def test_all_kinds_are_there() -> None:
    assert {kind.__name__ for kind in KINDS} >= {"DashqError", "RecipeError", "PlanError", "CheckpointError"}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_who_calls_dashq_can_catch_every_kind_at_once_and_import_it(kind: type[Exception]) -> None:
    with pytest.raises(DashqError, match=r"^what was asked, where, and what is possible$"):
        raise kind("what was asked, where, and what is possible")
    assert getattr(dashq, kind.__name__) is kind


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_kind_is_caught_as_itself_and_as_no_other(kind: type[Exception]) -> None:
    assert {other for other in KINDS if issubclass(kind, other)} == {kind, DashqError}


@pytest.mark.parametrize("kind", [ValueError, OSError, RuntimeError, KeyError, AssertionError])
def test_a_failure_of_the_program_is_never_taken_for_a_mistake_of_the_user(kind: type[Exception]) -> None:
    assert not issubclass(DashqError, kind)
    assert not issubclass(kind, DashqError)
