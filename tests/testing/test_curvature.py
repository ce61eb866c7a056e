"""A curvature answers as the full one with the same matrix does, and the contract notices when one does not."""

import re
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dashq import Coupled, Curvature, Diagonal, Full
from dashq.testing import check_curvature, check_estimator
from dashq_plugins.estimators.full import FullEstimator, Sums


@dataclass(frozen=True, eq=False)
class Stored(Coupled):
    """As lawful as it gets: a matrix and nothing else."""

    matrix: Tensor

    def dense(self) -> Tensor:
        return self.matrix


class Lopsided(Stored):
    def dense(self) -> Tensor:
        return self.matrix.triu()


class Infinite(Stored):
    def dense(self) -> Tensor:
        return self.matrix + torch.diag(torch.full((len(self.matrix) - 1,), torch.inf), 1)

    def diagonal(self) -> Tensor:
        return self.matrix.diagonal()


class NotSquare(Stored):
    def dense(self) -> Tensor:
        return self.matrix[:-1]

    def diagonal(self) -> Tensor:
        return self.matrix.diagonal()


class Negative(Stored):
    def dense(self) -> Tensor:
        return -self.matrix


class OtherDiagonal(Stored):
    def diagonal(self) -> Tensor:
        return self.matrix.sum(0).abs()


@dataclass(frozen=True, eq=False)
class Hidden(Curvature):
    matrix: Tensor

    def diagonal(self) -> Tensor:
        return self.matrix.diagonal()

    def dense(self) -> Tensor:
        return self.matrix


class ShrunkTwice(Stored):
    shrinkage = 2.0


class DiagonalErrors(Stored):
    def row_errors(self, error: Tensor) -> Tensor:
        return Diagonal(self.diagonal()).row_errors(error)


class RoughErrors(Stored):
    def row_errors(self, error: Tensor) -> Tensor:
        return super().row_errors(error).float()


class NeverBlends(Stored):
    def blended(self, other: Curvature, share: float) -> Curvature:
        return self


class BlendsDiagonals(Stored):
    def blended(self, other: Curvature, share: float) -> Curvature:
        return Diagonal(torch.lerp(self.diagonal(), other.diagonal(), share))


class NeverCorrects(Stored):
    def corrected(self, weight: Tensor, input_shift: Tensor, share: float) -> Tensor:
        return weight


BROKEN: list[tuple[type[Stored] | type[Hidden], str]] = [
    (Lopsided, "keep `dense` symmetric"),
    (Infinite, "keep `dense` finite"),
    (NotSquare, "give `dense` as [columns, columns]"),
    (Negative, "keep its diagonal finite and at least zero"),
    (OtherDiagonal, "give as `diagonal` that of `dense`"),
    (Hidden, "be a `Coupled` where it knows what lies off the diagonal"),
    (ShrunkTwice, "keep its `shrinkage` within 0 and 1"),
    (DiagonalErrors, "give as `row_errors` those of `dense`"),
    (RoughErrors, "give `row_errors` as float64 [rows]"),
    (NeverBlends, "give as `blended` (1 - share) of its `dense`"),
    (BlendsDiagonals, "give as `blended` (1 - share) of its `dense`"),
    (NeverCorrects, "correct weights as the `Full`"),
]


def second_moment() -> Tensor:
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    return (x + x.roll(1, dims=1)).T @ x.add(x.roll(1, dims=1)) / 20


def test_a_subclass_that_gives_its_matrix_alone_keeps_the_contract() -> None:
    check_curvature(Stored(second_moment()))
    check_curvature(Stored(second_moment()), Stored(torch.eye(6)))


@pytest.mark.parametrize(("broken", "law"), BROKEN, ids=[broken.__name__ for broken, _ in BROKEN])
def test_a_broken_curvature_is_told_which_law_it_breaks(broken: type[Stored] | type[Hidden], law: str) -> None:
    expected = f"^curvature '{broken.__name__}' must {re.escape(law)}.*. Example: {broken.__name__}"
    with pytest.raises(AssertionError, match=expected):
        check_curvature(broken(second_moment()))


def test_an_estimator_answers_for_its_curvature() -> None:
    class LopsidedEstimator(FullEstimator):
        name = "lopsided"

        def finish(self, state: Sums) -> Full:
            return Full(super().finish(state).matrix.triu())

    with pytest.raises(AssertionError, match=r"^estimator 'lopsided' must keep `dense` symmetric"):
        check_estimator(LopsidedEstimator)
