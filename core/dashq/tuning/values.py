"""The numbers of a quantized model that a tuner may change, each as the file will store it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dashq.data import CACHED, Grid, Quantized, Tunable
from dashq.solving.stored_values import store
from dashq.solving.super_blocks import as_unit, factor


class LayerValues(ABC):
    """Scales and offsets of one layer as functions of its `tunables`: changes, which are 0 at first.

    Where a change is 0 the value is the one that was stored before. Gradients pass the rounding to stored values as if
    it was not there (straight through).
    """

    tunables: Sequence[Tunable]

    @property
    def learns(self) -> bool:
        """True where any of its tunables is to change."""
        return any(tunable.parameter.requires_grad for tunable in self.tunables)

    @abstractmethod
    def values(self) -> tuple[Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]:
        """Scale and offset in float32, as the grid stores them."""

    def applied(self, quantized: Quantized) -> Quantized:
        """The layer with its changed scales and offsets: codes, groups and grid are those of `quantized`."""
        with torch.no_grad():
            scale, offset = self.values()
        q = quantized
        return Quantized.of(q.codes, scale, offset, q.grouping, q.grid)

    def add_gradient(self, gradient: Float[Tensor, "rows columns"], quantized: Quantized) -> None:
        """Add to the changes' gradients what follows from that by the layer's weights, where any is to change.

        ŵ = scale · code + offset: the derivative by a group's scale is the sum of gradient · code over its weights
        (with a codebook, of gradient · level), the one by its offset the sum of the gradient.
        """
        codes = quantized.codes
        by_scale = torch.empty(codes.shape[:2], device=codes.device)
        by_offset = torch.empty_like(by_scale)
        rows = max(1, CACHED // codes[0].numel()) if codes.device.type == "cpu" else len(codes)  # stays in the cache
        tensors = (gradient, codes, by_scale, by_offset)
        for part, own_codes, scales, offsets in zip(*(tensor.split(rows) for tensor in tensors), strict=True):
            groups = quantized.grouping.split_importance(part.float())
            torch.sum(groups, -1, out=offsets)
            torch.sum(groups * quantized.numbers(own_codes), -1, out=scales)
        with torch.enable_grad():
            pairs = zip(self.values(), (by_scale, by_offset), strict=True)
            own = [(value, gradients) for value, gradients in pairs if value.requires_grad]
        torch.autograd.backward([value for value, _ in own], [gradients for _, gradients in own])


class GroupValues(LayerValues):
    """A scale s and an offset m for each group, whose changes a and b count in steps between neighbouring codes.

    With h for half of the largest code, s becomes s (1 + a / h), which moves the weights of the outermost codes by a
    steps. Where the zero is real those of the middle code stay, and m becomes m - a s + b s: a change of the scale that
    moved the group's mean would mostly be one of the offset. A zero that is a code stays: the offset follows the scale.
    """

    def __init__(self, name: str, quantized: Quantized) -> None:
        self._grid = quantized.grid
        self._scale, self._offset = quantized.scale, quantized.offset
        self._scale_change, self._offset_change = _no_change(quantized.scale), _no_change(quantized.offset)
        self.tunables = [Tunable("scale", name, self._scale_change)]
        if self._grid.zero == "real":
            self.tunables.append(Tunable("offset", name, self._offset_change))

    def values(self) -> tuple[Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]:
        old_scale, old_offset = self._scale.float(), self._offset.float()
        scale = old_scale * (1 + self._scale_change / half_of(self._grid))
        if self._grid.zero != "real":
            zero = (-old_offset / old_scale).round()
            stored_scale, _ = store(scale.detach(), old_offset, self._grid)
            stored_scale = torch.where(self._scale_change == 0, old_scale, stored_scale)
            return _straight_through(scale, stored_scale), _straight_through(-scale * zero, -stored_scale * zero)
        offset = old_offset + (self._offset_change - self._scale_change) * old_scale
        stored_scale, stored_offset = store(scale.detach(), offset.detach(), self._grid)
        same = (self._scale_change == 0) & (self._offset_change == 0)
        return (
            _straight_through(scale, torch.where(same, old_scale, stored_scale)),
            _straight_through(offset, torch.where(same, old_offset, stored_offset)),
        )


class SuperBlockValues(LayerValues):
    """Two units u for each super-block, u (1 + a / h): their whole multiples, the groups' scales and offsets, stay.

    h is half of the largest code, as in `GroupValues`.
    """

    def __init__(self, name: str, quantized: Quantized) -> None:
        grid = quantized.grid
        assert grid.super_blocks
        self._grid, self._blocks, self._shape = grid, grid.super_blocks, quantized.scale.shape
        scales = quantized.scale.float().reshape(-1, self._blocks.groups)
        self._unit, self._multiples = factor(scales, self._blocks, self._blocks.signed)
        self._scale_change = _no_change(self._unit)
        self.tunables = [Tunable("scale", name, self._scale_change)]
        if self._blocks.has_offsets:
            mins = -quantized.offset.float().reshape(-1, self._blocks.groups)
            self._min_unit, self._min_multiples = factor(mins, self._blocks)
            self._offset_change = _no_change(self._min_unit)
            self.tunables.append(Tunable("offset", name, self._offset_change))

    def values(self) -> tuple[Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]:
        scale = self._products(self._unit, self._scale_change, self._multiples)
        if not self._blocks.has_offsets:
            return scale, -scale * self._grid.middle
        return scale, -self._products(self._min_unit, self._offset_change, self._min_multiples)

    def _products(
        self,
        unit: Float[Tensor, "blocks 1"],
        change: Float[Tensor, "blocks 1"],
        multiples: Int[Tensor, "blocks block_groups"],
    ) -> Float[Tensor, "rows groups"]:
        old = unit.float()
        new = old * (1 + change / half_of(self._grid))
        stored = torch.where(change == 0, old, as_unit(new.detach()))
        return (_straight_through(new, stored) * multiples).reshape(self._shape)


class NormGain:
    """The gain g of a norm as a function of its tunable: g + a r, with r its root mean square, in the model's type."""

    def __init__(self, name: str, gain: Float[Tensor, " width"]) -> None:
        self._gain = gain
        size = gain.float().square().mean().sqrt()
        self._unit = torch.where(size > 0, size, 1.0)
        self._change = _no_change(gain)
        self.tunable = Tunable("norm", name, self._change)

    @property
    def learns(self) -> bool:
        """True where its tunable is to change."""
        return self._change.requires_grad

    def value(self) -> Float[Tensor, " width"]:
        """The gain in float32, as the model's type holds it."""
        gain = self._gain.float() + self._change * self._unit
        return _straight_through(gain, gain.detach().to(self._gain.dtype).float())

    def add_gradient(self, gradient: Float[Tensor, " width"]) -> None:
        """Add to the change's gradient what follows from that by the gain."""
        with torch.enable_grad():
            self.value().backward(gradient.float())

    def applied(self) -> Float[Tensor, " width"]:
        """The gain to be written."""
        with torch.no_grad():
            return self.value().to(self._gain.dtype)


def values_of(name: str, quantized: Quantized) -> LayerValues:
    """The values of a layer, as its grid stores them."""
    return (SuperBlockValues if quantized.grid.super_blocks else GroupValues)(name, quantized)


def half_of(grid: Grid) -> float:
    """The distance of the outermost codes from the middle between them."""
    return grid.top / 2


def _no_change(like: Float[Tensor, "*shape"]) -> nn.Parameter:
    return nn.Parameter(torch.zeros(like.shape, device=like.device))


class _StraightThrough(torch.autograd.Function):
    """The second tensor, exactly, with the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, value: Float[Tensor, "*shape"], stored: Float[Tensor, "*shape"]) -> Tensor:
        return stored.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Float[Tensor, "*shape"]) -> tuple[Tensor, None]:
        return grad_outputs[0], None


def _straight_through(value: Float[Tensor, "*shape"], stored: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The stored value, with the gradient of the other."""
    result: Tensor = _StraightThrough.apply(value, stored.detach())  # type: ignore[no-untyped-call]
    return result
