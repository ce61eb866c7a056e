"""The kernel "lanes": codes of 1 to 8 bits for processors, multiplied with rows in the lanes of vector units."""

import logging
import os
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor
from torch.nn import functional

from dashq.data import Grid, Grouping, Layer, Quantized, StoredLayer
from dashq.errors import cause
from dashq.runtime.kernels import Kernel, Numbers, Product, unpacked_dtype
from dashq.runtime.lanes_layout import CHUNK, LANES, from_bytes, to_bytes

HALVES = (torch.bfloat16, torch.float16)
AT_ONCE = 2**21  # weights that are unpacked at once for many tokens
SMALLEST = 2**16  # weights of a layer, below which there is little to gain

logger = logging.getLogger(__name__)


class Lanes(Kernel):
    """Products in float32 with the codes as they are, which round no further than unpacked weights in float32 do.

    y = Σ over groups of s (Σ q x) + o (Σ x). A thread takes 64 rows at a time, and each code is taken from its byte,
    converted and multiplied in its row's lane, so that nothing is summed across lanes.
    """

    name = "lanes"
    package = "numba"

    def works(self, grid: Grid) -> bool:
        """Numba has to compile the programs for such a grid, too."""
        return super().works(grid) and _compiles(grid)

    def holds(self, stored: StoredLayer, dtype: torch.dtype, device: torch.device) -> bool:
        """On processors, for groups of multiples of 8 columns."""
        return device.type == "cpu" and dtype in (*HALVES, torch.float32) and stored.size % CHUNK == 0

    def pays(self, stored: StoredLayer) -> bool:
        """For all but small layers."""
        return stored.layer.weights >= SMALLEST

    def repack(self, quantized: Quantized) -> Mapping[str, Shaped[Tensor, "..."]]:
        """`codes` of [tiles, groups, chunks, bits, lanes], `scale` and `offset` or `zero` of [groups, tiles × lanes].

        Numbers are held as files hold them; the last tile is filled up with zeros.
        """
        grid, rows = quantized.grid, quantized.codes.shape[0]
        more = -rows % LANES
        codes = functional.pad(quantized.codes, (0, 0, 0, 0, 0, more))
        chunks = codes.view(-1, LANES, codes.shape[1], codes.shape[2] // CHUNK, CHUNK).permute(0, 2, 3, 4, 1)
        tensors = {"codes": to_bytes(chunks, grid.bits), "scale": _filled(quantized.scale, more)}
        if grid.offset_dtype == grid.dtype:
            return tensors | {"offset": _filled(quantized.offset, more)}
        # Offsets are products with zeros, which files keep in fewer bits.
        zero = quantized.zeros.to(grid.dtype if grid.stores_zero else torch.uint8)
        return tensors | {"zero": _filled(zero, more)}

    def numbers(self, tensors: Mapping[str, Shaped[Tensor, "..."]], stored: StoredLayer) -> Numbers:
        """Codes are weights of scale 1 and offset 0."""
        (offset, zero), scale, rows = _offset(tensors), tensors["scale"], stored.layer.rows
        offset = _times(scale, offset) if zero else offset
        ones = torch.ones(scale.shape, device=scale.device)
        codes = _unpack(tensors["codes"], ones, torch.zeros_like(ones), False, torch.float32).to(torch.uint8)
        codes = codes.T[:rows].reshape(rows, len(scale), stored.size)
        return codes, scale.T[:rows].contiguous(), offset.T[:rows].contiguous()

    def rows(
        self, tensors: Mapping[str, Shaped[Tensor, "..."]], stored: StoredLayer, index: Int[Tensor, " rows"]
    ) -> Numbers:
        """The bytes of a row lie apart, each in its lane."""
        rows, (offset, zero) = stored.layer.rows, _offset(tensors)
        # Those that fill up the last tile are none: an index of them is refused here.
        scale, offset = tensors["scale"].T[:rows][index], offset.T[:rows][index]
        places = index % rows
        lines = tensors["codes"][places // LANES, :, :, :, places % LANES, None]
        codes = from_bytes(lines, stored.grid.bits).reshape(len(index), -1, stored.size)
        return codes, scale, _times(scale, offset) if zero else offset

    def multiply(
        self,
        x: Float[Tensor, "tokens groups size"],
        tensors: Mapping[str, Shaped[Tensor, "..."]],
        stored: StoredLayer,
    ) -> Float[Tensor, "tokens rows"]:
        """One call of the compiled program."""
        if not torch.compiler.is_compiling():
            return self.bound(tensors, stored)(x)
        outputs: Tensor = _operator(x.float(), tensors["codes"], tensors["scale"], *_offset(tensors))
        return outputs[:, : stored.layer.rows].contiguous()  # as outputs of other layers are

    def bound(self, tensors: Mapping[str, Shaped[Tensor, "..."]], stored: StoredLayer) -> Product:
        """The program is looked up, and the tensors are handed to numba, once for all products."""
        product, rows = _bound(tensors["codes"], tensors["scale"], *_offset(tensors)), stored.layer.rows
        if tensors["scale"].shape[1] == rows:
            return product
        return lambda x: product(x)[:, :rows].contiguous()

    def weight(
        self, tensors: Mapping[str, Shaped[Tensor, "..."]], stored: StoredLayer, dtype: torch.dtype
    ) -> Float[Tensor, "rows columns"]:
        """Rows lie side by side in memory: the weight is a view of its transpose."""
        weight = _unpack(tensors["codes"], tensors["scale"], *_offset(tensors), dtype)
        return weight.T[: stored.layer.rows]

    def multiply_unpacked(
        self,
        x: Float[Tensor, "tokens columns"],
        tensors: Mapping[str, Shaped[Tensor, "..."]],
        stored: StoredLayer,
    ) -> Float[Tensor, "tokens rows"]:
        """Some rows after the others, so that what is unpacked of a wide layer stays in the processor's caches."""
        x = x.to(unpacked_dtype(x))
        scale, (offset, zero) = tensors["scale"], _offset(tensors)
        tiles = max(1, AT_ONCE // (LANES * x.shape[1]))
        products = []
        for first in range(0, tensors["codes"].shape[0], tiles):
            rows = slice(first * LANES, (first + tiles) * LANES)
            numbers = scale[:, rows].contiguous(), offset[:, rows].contiguous()
            products.append(x @ _unpack(tensors["codes"][first : first + tiles], *numbers, zero, x.dtype))
        outputs = products[0] if len(products) == 1 else torch.cat(products, dim=1)
        return outputs[:, : stored.layer.rows].contiguous()


def _filled(numbers: Shaped[Tensor, "rows groups"], more: int) -> Shaped[Tensor, "groups more_rows"]:
    """Transposed, with zeros for more rows."""
    return functional.pad(numbers.T, (0, more)).contiguous()


def _offset(tensors: Mapping[str, Shaped[Tensor, "..."]]) -> tuple[Shaped[Tensor, "groups rows"], bool]:
    """The offsets and False, or the zeros that files keep in their place and True."""
    return (tensors["offset"], False) if "offset" in tensors else (tensors["zero"], True)


def _times(scale: Float[Tensor, "*numbers"], zero: Shaped[Tensor, "*numbers"]) -> Float[Tensor, "*numbers"]:
    """The offsets of these zeros."""
    return -scale.float() * zero.float()


def _bound(
    codes: UInt8[Tensor, "tiles groups chunks bits lanes"],
    scale: Float[Tensor, "groups rows"],
    offset: Shaped[Tensor, "groups rows"],
    zero: bool,
) -> Product:
    """The product with these tensors, those that fill up the last tile included."""
    from dashq.runtime.lanes_programs import product, run

    program, rows = product(codes.shape[3], _form(scale), _form(offset), zero), scale.shape[1]
    arrays = [_array(tensor) for tensor in (codes, scale, offset)]

    def multiply(x: Float[Tensor, "tokens groups size"]) -> Float[Tensor, "tokens rows"]:
        if x.requires_grad or x.dtype != torch.float32:  # calls that change nothing take their time, too
            x = x.detach().float()
        if _without_threads():
            return x.flatten(1) @ _unpack(codes, scale, offset, zero, torch.float32)
        out = torch.empty(x.shape[0], rows, dtype=torch.float32, device="cpu")
        run(program, x.contiguous().numpy(), *arrays, out.numpy())
        return out

    return multiply


def _product(
    x: Float[Tensor, "tokens groups size"],
    codes: UInt8[Tensor, "tiles groups chunks bits lanes"],
    scale: Float[Tensor, "groups rows"],
    offset: Shaped[Tensor, "groups rows"],
    zero: bool,
) -> Float[Tensor, "tokens rows"]:
    return _bound(codes, scale, offset, zero)(x)


# The operator as torch's compiler knows it, which does not look into it.
_operator = torch.library.custom_op(
    "dashq::lanes_product",
    _product,
    mutates_args=(),
    schema="(Tensor x, Tensor codes, Tensor scale, Tensor offset, bool zero) -> Tensor",
)


@_operator.register_fake
def _(
    x: Float[Tensor, "tokens groups size"],
    codes: UInt8[Tensor, "tiles groups chunks bits lanes"],
    scale: Float[Tensor, "groups rows"],
    offset: Shaped[Tensor, "groups rows"],
    zero: bool,
) -> Float[Tensor, "tokens rows"]:
    return x.new_empty(x.shape[0], scale.shape[1])


def _unpack(
    codes: UInt8[Tensor, "tiles groups chunks bits lanes"],
    scale: Float[Tensor, "groups rows"],
    offset: Shaped[Tensor, "groups rows"],
    zero: bool,
    dtype: torch.dtype,
) -> Float[Tensor, "columns rows"]:
    from dashq.runtime.lanes_programs import run, unpacking

    groups, chunks, bits = codes.shape[1:4]
    if _without_threads():
        codes = from_bytes(codes, bits).permute(1, 2, 3, 0, 4).reshape(groups, chunks * CHUNK, -1)
        shift = _times(scale, offset) if zero else offset.float()
        return (codes * scale.float()[:, None] + shift[:, None]).flatten(0, 1).to(dtype)
    narrow = dtype == torch.bfloat16
    kind = dtype if narrow else torch.float32
    out = torch.empty(groups, chunks, CHUNK, scale.shape[1], dtype=kind, device=codes.device)
    program = unpacking(bits, _form(scale), _form(offset), zero, narrow)
    run(program, *map(_array, (codes, scale, offset, out)))
    return out.view(-1, scale.shape[1]).to(dtype)


def _form(numbers: Shaped[Tensor, "..."]) -> int:
    """The form in which a program reads numbers of this type."""
    from dashq.runtime.lanes_programs import BFLOAT16, FLOAT16, PLAIN

    return {torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}.get(numbers.dtype, PLAIN)


def _array(tensor: Shaped[Tensor, "..."]) -> Any:
    """A tensor as numba takes it, in the same memory: types of 16 bits are handed over as bits."""
    return (tensor.view(torch.uint16) if tensor.dtype in HALVES else tensor).numpy()


@cache
def _compiles(grid: Grid) -> bool:
    """True where the programs for such a grid run on this machine; the log says why they do not."""
    from numba import config

    if config.DISABLE_JIT:  # type: ignore[attr-defined]  # they would run, in Python
        return False
    stored = StoredLayer(layer=Layer(name="trial", rows=1, columns=CHUNK), grid=grid, size=CHUNK, ordered=False)
    codes = torch.zeros(1, 1, CHUNK, dtype=torch.uint8, device="cpu")
    ones, grouping = torch.ones(1, 1, device="cpu"), Grouping(columns=CHUNK, size=CHUNK)
    kernel, trial = Lanes(), Quantized.of(codes, ones, 0 * ones, grouping, grid)
    tensors = kernel.repack(trial)
    try:
        kernel.multiply(codes.float(), tensors, stored)
        kernel.numbers(tensors, stored)
    except Exception as error:  # a compiler and its files may fail in any way on this machine
        logger.warning("the kernel lanes is left aside for %d bits: %s", grid.bits, cause(error))
        return False
    return True


@cache
def _process() -> int:
    """The process that numba's threads belong to, which is that of the first product."""
    return os.getpid()


def _without_threads() -> bool:
    """True in a fork of the process that numba's threads belong to, which numba would end for their use."""
    return os.getpid() != _process()
