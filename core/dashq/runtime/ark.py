"""The kernels of auto-round-kernel ("ARK"), for processors: codes of 2, 3, 4 or 8 bits on symmetric grids.

Codes of other bits are held in the next that it has: 5 bits take the room of 8, and are multiplied as fast.
Its grids are symmetric, W = s (q - c) with the middle code c. Any other zero comes in by the groups' sums of inputs:
W = s (q - c) + (o + s c), so that y = product(x) + sums(x) · (o + s c)ᵀ.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from jaxtyping import Float, Int8, Shaped
from torch import Tensor

from dashq.data import Grid, Quantized, StoredLayer
from dashq.runtime.kernels import Kernel, Numbers

BITS = (2, 3, 4, 8)
MULTIPLE = 8  # sizes of groups that the library was tried with are multiples of it
TWICE_MULTIPLE = 32  # of those, the sizes whose inputs it rounds in one way throughout
STEPS = 255  # of the range of a group's inputs, where they are rounded to 8 bits
SMALLEST_STEP = torch.finfo(torch.float32).tiny  # for groups of zeros

Arithmetic = Literal["int8", "bf16", "fp32"]


@dataclass(frozen=True)
class Ark(Kernel):
    """Products in one arithmetic, for inputs of some types, which pay for layers of at least `smallest` weights.

    `int8` rounds inputs to 8 bits, with a step for each token and group, and is several times as fast as the others on
    few tokens. What this rounding leaves of the inputs is multiplied as well where they come `twice`: then 16 bits of
    them count. The other arithmetics round no further than their type.
    """

    name: str
    arithmetic: Arithmetic
    dtypes: tuple[torch.dtype, ...]
    smallest: int
    twice: bool = False
    package = "auto_round_kernel"

    def works(self, grid: Grid) -> bool:
        """Inputs that come twice need the rounding that is known here."""
        return super().works(grid) and (not self.twice or _rounds_as_known())

    def holds(self, stored: StoredLayer, dtype: torch.dtype, device: torch.device) -> bool:
        """On processors, for groups of multiples of 8 columns, or of 32 where inputs come twice."""
        multiple = TWICE_MULTIPLE if self.twice else MULTIPLE
        return device.type == "cpu" and dtype in self.dtypes and stored.size % multiple == 0

    def pays(self, stored: StoredLayer) -> bool:
        """For all but small layers."""
        return stored.layer.weights >= self.smallest

    def repack(self, quantized: Quantized) -> Mapping[str, Shaped[Tensor, "..."]]:
        """`blob`: codes and scales in the library's layout; `scale`: those in it; and `offset` or `zero` as stored."""
        grid, scale = quantized.grid, quantized.scale.float().T.contiguous()
        codes = quantized.codes.flatten(1).sub(grid.middle).view(torch.int8)  # modulo 256
        blob = _packed(codes.T.contiguous(), scale, quantized.grouping.size, held_bits(grid.bits), self.arithmetic)
        tensors = {"blob": blob, "scale": _view_of_scales(blob, scale)}
        if grid.offset_dtype == grid.dtype:
            return tensors | {"offset": quantized.offset.T.contiguous()}
        # Offsets are products with zeros, which files keep in fewer bits.
        zero = quantized.zeros.to(grid.dtype if grid.stores_zero else torch.uint8)
        return tensors | {"zero": zero.T.contiguous()}

    def numbers(self, tensors: Mapping[str, Shaped[Tensor, "..."]], stored: StoredLayer) -> Numbers:
        """Codes are the library's own weights divided by their scales."""
        grid, scale = stored.grid, tensors["scale"].T
        codes = self._symmetric(tensors, stored).div(scale[..., None]).round_().add_(grid.middle)
        offset = tensors["offset"].T if "offset" in tensors else -scale * tensors["zero"].T.float()
        return codes.to(torch.uint8), scale.to(grid.dtype).contiguous(), offset.contiguous()

    def multiply(
        self,
        x: Float[Tensor, "tokens groups size"],
        tensors: Mapping[str, Shaped[Tensor, "..."]],
        stored: StoredLayer,
    ) -> Float[Tensor, "tokens rows"]:
        """Sums of groups are taken of the inputs themselves, not of the rounded ones; NaN comes through by them."""
        product = _operator if torch.compiler.is_compiling() else _ark_product
        x = x.float()  # the library writes beyond its memory for inputs of any other type
        inputs = torch.cat([x, _rest(x)]) if self.twice else x
        bits = held_bits(stored.grid.bits)
        symmetric = product(inputs.flatten(1), tensors["blob"], stored.layer.rows, stored.size, bits, self.arithmetic)
        if self.twice:
            symmetric = symmetric[: len(x)] + symmetric[len(x) :]
        return torch.addmm(symmetric, x.sum(-1), _shift(tensors, stored.grid))

    def weight(
        self, tensors: Mapping[str, Shaped[Tensor, "..."]], stored: StoredLayer, dtype: torch.dtype
    ) -> Float[Tensor, "rows columns"]:
        """The library's own weights and what each group is shifted by."""
        shift = _shift(tensors, stored.grid).T[..., None]
        return self._symmetric(tensors, stored).add_(shift).flatten(1).to(dtype)

    def _symmetric(
        self, tensors: Mapping[str, Shaped[Tensor, "..."]], stored: StoredLayer
    ) -> Float[Tensor, "rows groups size"]:
        """The library's own weights, s (q - c)."""
        import auto_round_kernel

        groups, rows = tensors["scale"].shape
        columns, kind = groups * stored.size, f"int{held_bits(stored.grid.bits)}"
        weight: Tensor = auto_round_kernel.unpack_weight(
            tensors["blob"], torch.float32, rows, columns, stored.size, self.arithmetic, kind, "fp32", False
        )
        return weight.reshape(rows, groups, stored.size)


def held_bits(bits: int) -> int:
    """The bits in which the library holds codes of these."""
    return next(own for own in BITS if own >= bits)


def _ark_product(
    x: Float[Tensor, "tokens columns"],
    blob: Int8[Tensor, " bytes"],
    rows: int,
    size: int,
    bits: int,
    arithmetic: str,
) -> Float[Tensor, "tokens rows"]:
    import auto_round_kernel

    no_bias = x.new_empty(0)
    product: Tensor = auto_round_kernel.woqgemm(
        x, blob, no_bias, rows, x.shape[1], size, arithmetic, f"int{bits}", "fp32", False
    )
    return product


# The operator as torch's compiler knows it, which does not look into it.
_operator = torch.library.custom_op(
    "dashq::ark_product",
    _ark_product,
    mutates_args=(),
    schema="(Tensor x, Tensor blob, int rows, int size, int bits, str arithmetic) -> Tensor",
)


@_operator.register_fake
def _(
    x: Float[Tensor, "tokens columns"],
    blob: Int8[Tensor, " bytes"],
    rows: int,
    size: int,
    bits: int,
    arithmetic: str,
) -> Float[Tensor, "tokens rows"]:
    return x.new_empty(x.shape[0], rows)


def _packed(
    codes: Int8[Tensor, "columns rows"], scale: Float[Tensor, "groups rows"], size: int, bits: int, arithmetic: str
) -> Int8[Tensor, " bytes"]:
    """Codes and scales in the library's layout; it writes beyond its memory for scales of any type but float32."""
    import auto_round_kernel

    blob: Tensor = auto_round_kernel.repack_quantized_weight(
        codes, scale, codes.new_empty(0), size, arithmetic, f"int{bits}", "fp32", False
    )
    return blob


def _view_of_scales(blob: Int8[Tensor, " bytes"], scale: Float[Tensor, "groups rows"]) -> Float[Tensor, "groups rows"]:
    """The scales where they lie in the library's layout, with its stride of rows; themselves if not found there."""
    numbers = blob[: len(blob) // 4 * 4].view(torch.float32)
    content = numbers.numpy().tobytes()
    first, last = (content.find(row.numpy().tobytes()) // 4 for row in (scale[0], scale[-1]))
    if first < 0 or last < first:
        return scale
    stride = (last - first) // max(len(scale) - 1, 1)
    view = numbers.as_strided(scale.shape, (stride, 1), numbers.storage_offset() + first)
    return view if view.equal(scale) else scale


def _shift(tensors: Mapping[str, Shaped[Tensor, "..."]], grid: Grid) -> Float[Tensor, "groups rows"]:
    """o + s c, by which each input of a group counts beside the symmetric product."""
    if "offset" in tensors:
        return torch.add(tensors["offset"], tensors["scale"], alpha=grid.middle)
    return (grid.middle - tensors["zero"].float()) * tensors["scale"]


def _rest(x: Float[Tensor, "tokens groups size"]) -> Float[Tensor, "tokens groups size"]:
    """Inputs less what the library rounds them to in 8 bits: each range of a group, with 0, has 255 steps."""
    least, most = x.aminmax(dim=-1, keepdim=True)
    least, most = least.clamp_max(0), most.clamp_min(0)
    step = ((most - least) / STEPS).clamp_min(SMALLEST_STEP)
    zero = torch.round(-least / step)
    # With the reciprocal, as the library has it: inputs of few digits often lie in the middle between two steps.
    return x - torch.clamp(torch.round(x * (1 / step)), -zero, STEPS - zero) * step


@cache
def _rounds_as_known() -> bool:
    """True where the library rounds inputs on this machine as `_rest` has it: a product with the identity tells."""
    size = 64
    blob = _packed(torch.eye(size, dtype=torch.int8), torch.ones(1, size), size, 4, "int8")
    x = torch.randn(256, 1, size, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    rounded = _ark_product(x.flatten(1), blob, size, size, 4, "int8")
    return torch.allclose(rounded, (x - _rest(x)).flatten(1), rtol=0, atol=1e-5)
