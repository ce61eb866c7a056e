"""The kernels that there are, and the choice among them for one layer."""

import torch

from dashq.data import StoredLayer
from dashq.errors import MissingPackageError, UsageError
from dashq.runtime.ark import Ark
from dashq.runtime.int4 import Int4
from dashq.runtime.kernels import Kernel, is_installed
from dashq.runtime.lanes import Lanes
from dashq.strict import guess

AUTO, EXACT = "auto", "exact"
HALVES = (torch.bfloat16, torch.float16)
SMALL, MEDIUM = 2**16, 2**20  # weights of a layer: estimates of where calls, and rounding inputs, pay
ARK_INT8 = Ark("ark_int8", "int8", (*HALVES, torch.float32), SMALL)
ARK_INT8X2 = Ark("ark_int8x2", "int8", (*HALVES, torch.float32), MEDIUM, twice=True)
ARK_BFLOAT16 = Ark("ark_bfloat16", "bf16", HALVES, SMALL)
ARK_FLOAT32 = Ark("ark_float32", "fp32", (*HALVES, torch.float32), SMALL)
INT4 = Int4()
LANES = Lanes()
KERNELS: dict[str, Kernel] = {
    kernel.name: kernel for kernel in (LANES, ARK_INT8, ARK_INT8X2, ARK_BFLOAT16, ARK_FLOAT32, INT4)
}
# For `auto`, the best first: kernels that cost a model's predictions at most 1e-3 more than unpacked weights do in the
# same type, as a divergence from predictions in float32. Inputs of 8 bits cost more, and come by name alone. In float16
# nothing was measured.
SAFE: dict[torch.dtype, tuple[Kernel, ...]] = {
    torch.bfloat16: (LANES, ARK_INT8X2, ARK_BFLOAT16, INT4),
    torch.float16: (LANES, ARK_INT8X2, ARK_FLOAT32),
    torch.float32: (LANES, ARK_FLOAT32),
}


def check_kernels(name: str) -> None:
    """Raise `UsageError` for an unknown name, and `MissingPackageError` for a kernel that is not installed."""
    known = [AUTO, EXACT, *KERNELS]
    if name not in known:
        raise UsageError(f"there are no kernels {name!r}.{guess(name, known)} Possible: {', '.join(known)}")
    if name in KERNELS and not is_installed(package := KERNELS[name].package):
        raise MissingPackageError(
            f"the kernel {name} needs {package}, which cannot be imported here: pip install 'dashq[kernels]'"
        )


def choose_kernel(name: str, stored: StoredLayer, dtype: torch.dtype, device: torch.device) -> Kernel | None:
    """The kernel to multiply with, for inputs of `dtype`; None where the layer is to be unpacked."""
    return next((kernel for kernel in _candidates(name, stored, dtype, device) if kernel.works(stored.grid)), None)


def missing_package(name: str, stored: StoredLayer, dtype: torch.dtype, device: torch.device) -> str | None:
    """The package that the best kernel for the layer needs and that cannot be imported here; None if nothing lacks."""
    best = next(iter(_candidates(name, stored, dtype, device)), None)
    return None if best is None or is_installed(best.package) else best.package


def _candidates(name: str, stored: StoredLayer, dtype: torch.dtype, device: torch.device) -> list[Kernel]:
    """The kernels that can take the layer, whether they are installed or not, the best one first."""
    if stored.grid.codebook:  # kernels multiply with codes, not with levels
        return []
    if name == AUTO:
        return [k for k in SAFE.get(dtype, ()) if k.holds(stored, dtype, device) and k.pays(stored)]
    named = [KERNELS[name]] if name in KERNELS else []
    return [kernel for kernel in named if kernel.holds(stored, dtype, device)]
