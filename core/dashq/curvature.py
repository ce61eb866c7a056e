"""The curvature of a layer, what calibration learns about it: a diagonal, or the whole second moment of its inputs."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

DAMPING = 0.01  # added to the diagonal of H, as a share of its mean, where it is inverted
SMALLEST_CURVATURE = 1e-30  # where inputs are all zero: the least damping, and the least that is divided by


class Curvature(ABC):
    """The curvature of one layer: an estimate of H, the second moments of its inputs up to a factor.

    A subclass that knows no more than a column's importance gives `diagonal` alone; all else follows from it. One that
    knows what lies off the diagonal is a `Coupled`. Every tensor lies on the device of the layer. `shrinkage` is the
    share of what lies off the diagonal that was taken away as noise: all of it, in a diagonal.
    """

    shrinkage: float = 1.0

    @abstractmethod
    def diagonal(self) -> Float[Tensor, " columns"]:
        """The diagonal of H: the importance of each column, finite and at least 0, and all 0 before any token."""

    @property
    def report(self) -> Mapping[str, float]:
        """Figures about the estimate for the run's report, by name; none unless the estimator has any."""
        return {}

    def dense(self) -> Float[Tensor, "columns columns"]:
        """H as one symmetric matrix. The caller does not change it."""
        return torch.diag(self.diagonal())

    def row_errors(self, error: Float[Tensor, "rows columns"]) -> Float[Tensor, " rows"]:
        """e H eᵀ of each row e of the error of a weight, in float64; at least 0."""
        products = error @ self.dense().float()
        return (products * error).sum(1, dtype=torch.float64).clamp_min(0)

    def blended(self, other: "Curvature", share: float) -> "Curvature":
        """(1 - share) · H + share · H of the other, which has the same columns, with the report of this one.

        Called where an expert's own estimate is pooled with that of all experts. A subclass whose solvers `need` it
        returns one of its kind; else the result is a `Full`.
        """
        return Full(torch.lerp(self.dense(), other.dense(), share), tell=self.report, shrinkage=self.shrinkage)

    def corrected(
        self, weight: Float[Tensor, "rows columns"], input_shift: Float[Tensor, "columns columns"], share: float
    ) -> Float[Tensor, "rows columns"]:
        """W + share · W D (H + λ)⁻¹, with the input shift D, the mean of (x - x̂) x̂ᵀ, shrunk to its diagonal as H was.

        With a share of 1 the products of these weights with the changed inputs x̂ come nearest to those of W with the
        original x. λ is `DAMPING` times the mean of H's diagonal.
        """
        # Matrices of many columns are most of a run's memory: no diagonal is written out as one.
        shrunk = torch.lerp(input_shift, input_shift.new_zeros(()), self.shrinkage)
        shrunk.diagonal().copy_(input_shift.diagonal())
        damped = self.dense().to(torch.float32, copy=True)
        damped.diagonal().add_(self._damping())
        if len(weight) > len(damped):  # the order that solves for fewer rows
            return weight + (weight @ _divided(shrunk, damped)).mul_(share)
        products = weight @ shrunk
        del shrunk
        return weight + _divided(products, damped).mul_(share)

    def _damping(self) -> Float[Tensor, ""]:
        return (DAMPING * self.diagonal().float().mean()).clamp_min(SMALLEST_CURVATURE)


def _divided(
    x: Float[Tensor, "rows columns"], matrix: Float[Tensor, "columns columns"]
) -> Float[Tensor, "rows columns"]:
    """x matrix⁻¹ of a symmetric matrix."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:  # rounding has taken it below what is positive definite
        solved: Tensor = torch.linalg.solve(matrix, x.T).T
        return solved
    return torch.cholesky_solve(x.T, factor).T


@dataclass(frozen=True, eq=False)
class Diagonal(Curvature):
    """One importance per input column and nothing between columns: the paper's curvature."""

    values: Float[Tensor, " columns"]

    def diagonal(self) -> Float[Tensor, " columns"]:
        return self.values

    def row_errors(self, error: Float[Tensor, "rows columns"]) -> Float[Tensor, " rows"]:
        return (error.square() * self.diagonal().float()).sum(1, dtype=torch.float64)

    def blended(self, other: Curvature, share: float) -> Curvature:
        if isinstance(other, Diagonal):
            return replace(self, values=torch.lerp(self.values, other.values, share))
        return super().blended(other, share)

    def corrected(
        self, weight: Float[Tensor, "rows columns"], input_shift: Float[Tensor, "columns columns"], share: float
    ) -> Float[Tensor, "rows columns"]:
        return weight * (1 + share * input_shift.diagonal() / (self.diagonal().float() + self._damping()))


class Coupled(Curvature):
    """A curvature that knows what lies off the diagonal as well; `dense` is all that a subclass must give.

    Its `shrinkage` is 0 unless a subclass says otherwise.
    """

    shrinkage: float = 0.0

    @abstractmethod
    def dense(self) -> Float[Tensor, "columns columns"]:
        """H as one symmetric matrix, positive semidefinite up to rounding. The caller does not change it."""

    def diagonal(self) -> Float[Tensor, " columns"]:
        return torch.diagonal(self.dense())


@dataclass(frozen=True, eq=False)
class Full(Coupled):
    """The whole second moment of the inputs, H = XᵀX up to a factor.

    `tell` are figures about the estimate for the run's report, by name. `shrinkage` is the share of what lies off the
    diagonal that was taken away as noise.
    """

    matrix: Float[Tensor, "columns columns"]
    tell: Mapping[str, float] = field(default_factory=dict)
    shrinkage: float = 0.0

    def dense(self) -> Float[Tensor, "columns columns"]:
        return self.matrix

    @property
    def report(self) -> Mapping[str, float]:
        return self.tell

    def blended(self, other: Curvature, share: float) -> Curvature:
        return replace(self, matrix=torch.lerp(self.matrix, other.dense(), share))
