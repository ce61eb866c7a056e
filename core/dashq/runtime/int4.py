"""torch's own kernel for codes of 4 bits on processors, with real zeros and inputs of bfloat16."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

from dashq.data import Quantized, StoredLayer
from dashq.runtime.kernels import Kernel, Numbers

SIZES = (32, 64, 128, 256)
ROWS = 16  # the kernel takes multiples of it
MIDDLE = 8  # the code that it takes for 0
SMALLEST = 2**16  # weights of a layer, below which a call costs more than unpacking


class Int4(Kernel):
    """Codes of up to 4 bits, each in 4; scales and zeros are rounded to bfloat16 for the product."""

    name = "int4"
    package = None

    def holds(self, stored: StoredLayer, dtype: torch.dtype, device: torch.device) -> bool:
        """On processors, for bfloat16, up to 4 bits, groups of 32 to 256 columns and whole sixteens of rows."""
        return (
            device.type == "cpu"
            and dtype == torch.bfloat16
            and stored.grid.bits <= 4
            and stored.size in SIZES
            and stored.layer.rows % ROWS == 0
        )

    def pays(self, stored: StoredLayer) -> bool:
        """For codes of 4 bits, which take no more memory than before, and all but small layers."""
        return stored.grid.bits == 4 and stored.layer.weights >= SMALLEST

    def repack(self, quantized: Quantized) -> Mapping[str, Shaped[Tensor, "..."]]:
        """`nibbles`: codes in torch's layout, `scale` and `offset` as stored, `scale_and_zero`: both, for torch.

        Codes are moved so that the grid's middle is the kernel's, or small weights would be differences of large ones.
        """
        scale, middle = quantized.scale.float(), quantized.grid.middle
        zero = quantized.offset.float() + middle * scale
        return {
            "nibbles": _packed(quantized.codes.flatten(1).int() + MIDDLE - middle),
            "scale": quantized.scale,
            "offset": quantized.offset,
            "scale_and_zero": torch.stack([scale.T, zero.T], dim=-1).bfloat16(),
        }

    def numbers(self, tensors: Mapping[str, Shaped[Tensor, "..."]], stored: StoredLayer) -> Numbers:
        """The layout differs between processors: it is learned by packing the digits of the codes' places."""
        rows, groups = tensors["scale"].shape
        index = torch.arange(rows * groups * stored.size, dtype=torch.int32).view(rows, -1)
        places = torch.zeros(index.numel(), dtype=torch.int32)
        for shift in range(0, index.numel().bit_length(), 4):
            places |= _codes(_packed(index >> shift & 15)).int() << shift
        codes = torch.empty(index.numel(), dtype=torch.uint8)
        codes[places] = _codes(tensors["nibbles"]) - (MIDDLE - stored.grid.middle)
        return codes.view(rows, groups, stored.size), tensors["scale"], tensors["offset"]

    def multiply(
        self,
        x: Float[Tensor, "tokens groups size"],
        tensors: Mapping[str, Shaped[Tensor, "..."]],
        stored: StoredLayer,
    ) -> Float[Tensor, "tokens rows"]:
        """One call of torch's operator."""
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.flatten(1).bfloat16().contiguous(), tensors["nibbles"], stored.size, tensors["scale_and_zero"]
        )
        return product


def _packed(codes: Int[Tensor, "rows columns"]) -> UInt8[Tensor, "rows bytes"]:
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return packed


def _codes(packed: UInt8[Tensor, "rows bytes"]) -> UInt8[Tensor, " codes"]:
    """Both halves of each byte, in the order in which they lie there."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten()
