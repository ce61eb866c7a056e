"""The kernels of an opened model: they are chosen for its packed layers, counted, and left aside for a comparison."""

import logging
import math
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from dashq.runtime.kernel_choice import AUTO, EXACT, check_kernels, missing_package
from dashq.runtime.linear import DashqLinear

logger = logging.getLogger(__name__)


def use_kernels(network: nn.Module, kernels: str = AUTO, dtype: torch.dtype | None = None) -> None:
    """Multiply with these kernels in all packed layers of an opened model: `auto`, `exact` or one by name.

    Inputs are of `dtype`, which is the network's own if not given. Layers that a kernel cannot take are unpacked, as
    with `exact`. With `auto`, one line of the log says where a package that is not installed would be faster. Raises
    `UsageError` for an unknown name, `MissingPackageError` where the kernel that is asked for is not installed.
    """
    check_kernels(kernels)
    computed = getattr(network, "dtype", torch.float32) if dtype is None else dtype
    missing: set[str] = set()
    for layer in packed_layers(network):
        layer.use(kernels, computed)
        package = missing_package(kernels, layer.stored, computed, layer.device)
        missing |= {package} if package else set()
    if missing:
        logger.warning("packed layers would be faster with %s: pip install 'dashq[kernels]'", ", ".join(missing))


def packed_layers(network: nn.Module) -> Iterator[DashqLinear]:
    """The packed layers of an opened model, those of experts among them."""
    return (module for module in network.modules() if isinstance(module, DashqLinear))


def kernels_in_use(network: nn.Module) -> dict[str, int]:
    """The number of packed layers by the name of the kernel that multiplies with them; `exact` for none."""
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


@contextmanager
def packed_throughout(network: nn.Module) -> Generator[None]:
    """Let kernels multiply any number of tokens until the `with` statement ends, though many would be unpacked."""
    layers = [(layer, layer.many) for layer in packed_layers(network)]
    for layer, _ in layers:
        layer.many = math.inf
    try:
        yield
    finally:
        for layer, many in layers:
            layer.many = many
