"""Wrong shapes are refused whenever they come, also where the same arguments have passed before."""

from dataclasses import dataclass

import jaxtyping
import pytest
import torch
from beartype import beartype
from jaxtyping import Float
from torch import Tensor

from shapes import jaxtyped_once


@jaxtyped_once(typechecker=beartype)
def sums(values: Float[Tensor, "rows columns"], columns: list[int]) -> Float[Tensor, " rows"]:
    """Wrong where columns are named, which is a matter of values and not of shapes."""
    return values.sum(0 if columns == [1] else 1)


@jaxtyped_once(typechecker=beartype)
@dataclass
class Pair:
    first: Float[Tensor, " _"]
    name: str


@jaxtyped_once(typechecker=beartype)
def named(name: str) -> int:
    return len(name)


def test_every_shape_of_arguments_is_checked() -> None:
    for _ in range(2):
        assert sums(torch.ones(2, 3), []).tolist() == [3, 3]
        with pytest.raises(jaxtyping.TypeCheckError, match="parameters"):
            sums(torch.ones(3), [])
        with pytest.raises(jaxtyping.TypeCheckError, match="parameters"):
            sums(torch.ones(2, 3, dtype=torch.int64), [])


def test_every_shape_of_a_result_is_checked_for_the_same_arguments() -> None:
    assert sums(torch.ones(2, 3), [0]).tolist() == [3, 3]
    for _ in range(2):
        with pytest.raises(jaxtyping.TypeCheckError, match="return value"):
            sums(torch.ones(2, 3), [1])


def test_data_classes_are_checked_as_they_are_made() -> None:
    for _ in range(2):
        assert Pair(torch.ones(2), "one").name == "one"
        with pytest.raises(jaxtyping.TypeCheckError):
            Pair(torch.ones(2, 2), "one")


def test_functions_without_tensors_are_as_written() -> None:
    assert named.__name__ == "named"
    assert not hasattr(named, "__wrapped__")


def test_compiled_arithmetic_runs_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    assert sums(torch.ones(2, 3), [1]).tolist() == [2, 2, 2]
