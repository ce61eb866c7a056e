"""Iteratively reweighted least squares: round, fit scale and offset in closed form, repeat."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, NonNegativeInt, model_validator
from torch import Tensor

from dashq import Curvature, Grid, Grouping, Quantized, Solver, hookimpl
from dashq.arithmetic import encode, group_importance, minmax_parameters, quantized, stored, stored_scale

# Reconstructed by independent readers of arXiv 2604.13806; not checked against its text.
PAPER = {"iterations": 9, "damping": 0.5, "ridge": 1e-2, "p": 2.0}
# Weights per block: what one pass touches stays in the processor's cache.
BLOCK = 1 << 17
# Residuals below this share of the min-max scale count as equal, so that no weight of p < 2 is infinite.
RESIDUAL_FLOOR = 1e-2
TINY_VARIANCE = 1e-9


class IrlsSolver(Solver):
    """Coordinate descent on Σ h |w - s·q - m|^p: codes by rounding, then s and m by weighted least squares.

    Starts from min-max rounding, and goes back to it in the groups where that has the smaller Σ h (w - s·q - m)².

    - `iterations`: rounds of the alternation.
    - `damping`: share of the old scale and offset that each round keeps (0: none).
    - `ridge`: λ in s = Cov(w, q) / (Var(q) + λ).
    - `p`: 2 is the paper; below 2, each round weighs its residuals e with h·|e|^(p - 2), a robust norm.
    - `preset: paper`: iterations 9, damping 0.5, ridge 0.01, p 2: the paper's settings as reconstructed.
    """

    name = "irls"
    preset: Literal["paper"] | None = None
    iterations: NonNegativeInt = 9
    damping: float = Field(default=0.0, ge=0, lt=1)
    ridge: NonNegativeFloat = 0.0
    p: float = Field(default=2.0, ge=0.5, le=2)

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, data: Any) -> Any:
        return PAPER | data if isinstance(data, dict) and data.get("preset") == "paper" else data

    def solve(
        self, weight: Float[Tensor, "rows columns"], curvature: Curvature, grouping: Grouping, grid: Grid
    ) -> Quantized:
        h = group_importance(curvature, grouping)
        blocks = [self._solve_rows(grouping.split(rows), h, grouping, grid) for rows in _blocks_of_rows(weight)]
        return Quantized(
            codes=torch.cat([block.codes for block in blocks]),
            scale=torch.cat([block.scale for block in blocks]),
            offset=torch.cat([block.offset for block in blocks]),
            grouping=grouping,
            grid=grid,
        )

    def _solve_rows(
        self, w: Float[Tensor, "rows groups size"], h: Float[Tensor, "groups size"], grouping: Grouping, grid: Grid
    ) -> Quantized:
        s0, m0 = minmax_parameters(w, grid)
        floor = (RESIDUAL_FLOOR * s0).square().clamp_min(1e-30)[..., None]
        s0, m0 = stored_scale(s0, grid), stored(m0, grid)
        s, m = s0, m0
        q = encode(w, s, m, grid)
        q_mean = (h * q).sum(-1)
        for _ in range(self.iterations):
            v = h if self.p == 2 else reweigh(h, w, q, s, m, floor, self.p)
            s_new, m_new, q_mean = fit(w, q, v, self.ridge, s)
            s, m = torch.lerp(s_new, s, self.damping), torch.lerp(m_new, m, self.damping)
            q = encode(w, s, m, grid)
        s_stored = stored_scale(s, grid)
        m = stored(m + (s - s_stored) * q_mean, grid)  # keeps the mean where rounding the scale moved it
        worse = _error(w, h, s_stored, m, grid) > _error(w, h, s0, m0, grid)
        return quantized(w, torch.where(worse, s0, s_stored), torch.where(worse, m0, m), grid, grouping)


def fit(
    w: Float[Tensor, "rows groups size"],
    q: Float[Tensor, "rows groups size"],
    v: Float[Tensor, "*rows groups size"],
    ridge: float,
    fallback: Float[Tensor, "rows groups"],
) -> tuple[Float[Tensor, "rows groups"], Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]:
    """Scale and offset that minimise Σ v (w - s·q - m)² for given codes, and the weighted mean of the codes.

    s = Cov(w, q) / (Var(q) + ridge), m = w̄ - s·q̄, with weights v that sum to 1. Where the codes do not
    determine a positive scale, it stays `fallback`.
    """
    w_mean, q_mean = (v * w).sum(-1), (v * q).sum(-1)
    dq = q - q_mean[..., None]
    vdq = v * dq
    variance = (vdq * dq).sum(-1)
    covariance = (vdq * (w - w_mean[..., None])).sum(-1)
    s = torch.where((variance > TINY_VARIANCE) & (covariance > 0), covariance / (variance + ridge), fallback)
    return s, w_mean - s * q_mean, q_mean


def reweigh(
    h: Float[Tensor, "groups size"],
    w: Float[Tensor, "rows groups size"],
    q: Float[Tensor, "rows groups size"],
    s: Float[Tensor, "rows groups"],
    m: Float[Tensor, "rows groups"],
    floor: Float[Tensor, "rows groups 1"],
    p: float,
) -> Float[Tensor, "rows groups size"]:
    """h·(e² + floor)^((p - 2) / 2), summing to 1 in each group: `fit` with them lowers Σ h (e² + floor)^(p / 2)."""
    e2 = (w - s[..., None] * q - m[..., None]).square()
    v = h * (e2 + floor) ** ((p - 2) / 2)
    return v / v.sum(-1, keepdim=True)


def _error(
    w: Float[Tensor, "rows groups size"],
    h: Float[Tensor, "groups size"],
    s: Float[Tensor, "rows groups"],
    m: Float[Tensor, "rows groups"],
    grid: Grid,
) -> Float[Tensor, "rows groups"]:
    """Σ h (w - s·q - m)² with the best codes."""
    return (h * (w - s[..., None] * encode(w, s, m, grid) - m[..., None]).square()).sum(-1)


def _blocks_of_rows(weight: Float[Tensor, "rows columns"]) -> Sequence[Tensor]:
    if weight.is_cuda:  # a graphics processor wants one large launch, not many that fit a cache
        return (weight,)
    return torch.split(weight, max(1, BLOCK // weight.shape[1]))


@hookimpl
def dashq_solvers() -> list[type[Solver]]:
    return [IrlsSolver]
