"""The kernels that there are, and the choice among them for each layer of an opened model."""

import importlib
import logging
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from dashq.data import StoredLayer
from dashq.errors import MissingPackageError, UsageError
from dashq.runtime.ark import Ark
from dashq.runtime.int4 import Int4
from dashq.runtime.kernels import Kernel
from dashq.runtime.linear import DashqLinear
from dashq.strict import guess

AUTO, EXACT = "auto", "exact"
HALVES = (torch.bfloat16, torch.float16)
ARK_INT8 = Ark("ark_int8", "int8", (*HALVES, torch.float32))
ARK_BFLOAT16 = Ark("ark_bfloat16", "bf16", HALVES)
ARK_FLOAT32 = Ark("ark_float32", "fp32", (torch.float32,))
KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (ARK_INT8, ARK_BFLOAT16, ARK_FLOAT32, Int4())}
# For `auto`: kernels that err no more than unpacking does in the same type. Inputs of 8 bits cost SmolLM2's predictions
# a divergence of 5e-3 to 1e-2, more than the 1e-3 that is allowed, and are taken only by name.
SAFE: dict[torch.dtype, tuple[Kernel, ...]] = {
    torch.bfloat16: (ARK_BFLOAT16,),
    torch.float16: (ARK_BFLOAT16,),
    torch.float32: (ARK_FLOAT32,),
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KernelRequest:
    """`auto`, exact or a kernel by name, as it was asked for."""

    asked: str = AUTO

    def __post_init__(self) -> None:
        known = [AUTO, EXACT, *KERNELS]
        if self.asked not in known:
            raise UsageError(
                f"there are no kernels {self.asked!r}.{guess(self.asked, known)} Possible: {', '.join(known)}"
            )
        if self.asked in KERNELS and not is_installed(package := KERNELS[self.asked].package):
            raise MissingPackageError(
                f"the kernel {self.asked} needs {package}, which cannot be imported here: pip install 'dashq[kernels]'"
            )

    def kernel(self, stored: StoredLayer, dtype: torch.dtype, device: torch.device) -> Kernel | None:
        """The kernel to multiply with; None where the layer is to be unpacked."""
        kernels = self.candidates(stored, dtype, device)
        return next((kernel for kernel in kernels if is_installed(kernel.package)), None)

    def candidates(self, stored: StoredLayer, dtype: torch.dtype, device: torch.device) -> list[Kernel]:
        """The kernels that can take the layer, whether they are installed or not, the best one first."""
        if self.asked == AUTO:
            return [k for k in SAFE.get(dtype, ()) if k.holds(stored, dtype, device) and k.pays(stored)]
        named = [KERNELS[self.asked]] if self.asked in KERNELS else []
        return [kernel for kernel in named if kernel.holds(stored, dtype, device)]


def use_kernels(network: nn.Module, kernels: str = AUTO, dtype: torch.dtype | None = None) -> None:
    """Multiply with these kernels in all packed layers of an opened model: `auto`, exact or one by name.

    Inputs are of `dtype`, which is the network's own if not given. Layers that a kernel cannot take are unpacked, as
    with exact. With `auto`, one line of the log says where a package that is not installed would be faster. Raises
    `UsageError` for an unknown name, `MissingPackageError` where the kernel that is asked for is not installed.
    """
    choice = KernelRequest(kernels)
    computed = getattr(network, "dtype", torch.float32) if dtype is None else dtype
    missing: set[str] = set()
    for layer in packed_layers(network):
        layer.use(choice, computed)
        best = choice.candidates(layer.stored, computed, layer.device)[:1]
        missing |= {kernel.package for kernel in best if kernel.package and not is_installed(kernel.package)}
    if missing:
        logger.warning("packed layers would be faster with %s: pip install 'dashq[kernels]'", ", ".join(missing))


def packed_layers(network: nn.Module) -> Iterator[DashqLinear]:
    """The packed layers of an opened model, those of experts among them."""
    return (module for module in network.modules() if isinstance(module, DashqLinear))


def kernels_in_use(network: nn.Module) -> dict[str, int]:
    """The number of packed layers by the name of the kernel that multiplies with them; exact for none."""
    return dict(Counter(layer.kernel.name if layer.kernel else EXACT for layer in packed_layers(network)))


@contextmanager
def exactly(network: nn.Module) -> Generator[None]:
    """Let all packed layers be unpacked for each product until the `with` statement ends, whatever their kernels."""
    layers = list(packed_layers(network))
    for layer in layers:
        layer.unpacks = True
    try:
        yield
    finally:
        for layer in layers:
            layer.unpacks = False


@cache
def is_installed(package: str | None) -> bool:
    """True for None, and for a package that can be imported here."""
    try:
        return package is None or bool(importlib.import_module(package))
    except Exception:  # a library in it may fail in any way on this machine
        return False
