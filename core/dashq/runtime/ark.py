"""The kernels of auto-round-kernel ("ARK"), for processors: codes of 2, 3, 4 or 8 bits on symmetric grids.

Its grids are symmetric, W = s (q - c) with the middle code c. Any other zero comes in by the groups' sums of inputs:
W = s (q - c) + (o + s c), so that y = product(x) + sums(x) · (o + s c)ᵀ.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int8, Shaped, UInt8
from torch import Tensor

from dashq.data import Quantized, StoredLayer
from dashq.runtime.kernels import Kernel

BITS = (2, 3, 4, 8)
MULTIPLE = 8  # sizes of groups that the library was tried with are multiples of it
SMALLEST = 2**16  # weights of a layer, below which a call costs more than unpacking

Arithmetic = Literal["int8", "bf16", "fp32"]


def _ark_product(
    x: Float[Tensor, "tokens columns"],
    blob: Int8[Tensor, " bytes"],
    rows: int,
    size: int,
    bits: int,
    arithmetic: str,
) -> Float[Tensor, "tokens rows"]:
    import auto_round_kernel

    # The library writes beyond its memory for any type but float32, of inputs as of scales.
    none = x.new_empty(0)
    inputs = x.float().contiguous()
    product: Tensor = auto_round_kernel.woqgemm(
        inputs, blob, none, rows, x.shape[1], size, arithmetic, f"int{bits}", "fp32", False
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
    return x.new_empty(x.shape[0], rows, dtype=torch.float32)


@dataclass(frozen=True)
class Ark(Kernel):
    """Products in one arithmetic, for inputs of some types.

    With `int8` inputs are rounded to 8 bits with a scale for each token and group, which is fastest and costs errors of
    about 0.6 % of a layer's outputs. The others round no further than their type.
    """

    name: str
    arithmetic: Arithmetic
    dtypes: tuple[torch.dtype, ...]
    package = "auto_round_kernel"

    def holds(self, stored: StoredLayer, dtype: torch.dtype, device: torch.device) -> bool:
        """On processors, for its bits and for groups of multiples of 8 columns."""
        return (
            device.type == "cpu" and dtype in self.dtypes and stored.grid.bits in BITS and stored.size % MULTIPLE == 0
        )

    def pays(self, stored: StoredLayer) -> bool:
        """For all but small layers."""
        return stored.layer.weights >= SMALLEST

    def repack(self, quantized: Quantized) -> Mapping[str, Shaped[Tensor, "..."]]:
        """`blob`: codes and scales in the library's layout; `scale` as stored; `shift`: o + s c, float32."""
        import auto_round_kernel

        grid, size = quantized.grid, quantized.grouping.size
        codes = quantized.codes.flatten(1).sub(grid.middle).view(torch.int8)  # modulo 256
        scale = quantized.scale.float()
        blob = auto_round_kernel.repack_quantized_weight(
            codes.T.contiguous(),
            scale.T.contiguous(),
            codes.new_empty(0),
            size,
            self.arithmetic,
            f"int{grid.bits}",
            "fp32",
            False,
        )
        shift = quantized.offset.float() + grid.middle * scale
        return {"blob": blob, "scale": quantized.scale, "shift": shift.T.contiguous()}

    def numbers(
        self, tensors: Mapping[str, Shaped[Tensor, "..."]], stored: StoredLayer
    ) -> tuple[UInt8[Tensor, "rows groups size"], Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]:
        """Codes are the library's own weights divided by their scales."""
        import auto_round_kernel

        grid, size, scale = stored.grid, stored.size, tensors["scale"]
        rows, groups = scale.shape
        weight = auto_round_kernel.unpack_weight(
            tensors["blob"],
            torch.float32,
            rows,
            groups * size,
            size,
            self.arithmetic,
            f"int{grid.bits}",
            "fp32",
            False,
        )
        codes = weight.reshape(rows, groups, size).div(scale.float()[..., None]).round_().add_(grid.middle)
        offset = tensors["shift"].T - grid.middle * scale.float()
        return codes.to(torch.uint8), scale, offset.to(grid.offset_dtype).contiguous()

    def multiply(
        self,
        x: Float[Tensor, "tokens groups size"],
        tensors: Mapping[str, Shaped[Tensor, "..."]],
        stored: StoredLayer,
    ) -> Float[Tensor, "tokens rows"]:
        """Sums of groups are taken of the inputs themselves, not of the rounded ones; NaN comes through by them."""
        product = _operator if torch.compiler.is_compiling() else _ark_product
        x = x.float()
        symmetric = product(
            x.flatten(1), tensors["blob"], stored.layer.rows, stored.size, stored.grid.bits, self.arithmetic
        )
        return torch.addmm(symmetric, x.sum(-1), tensors["shift"])
