"""The number of tokens from which a layer is sooner unpacked for a product than multiplied packed: it is measured.

Libraries have fast products with packed codes for some processors, and slow ones for others.
"""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from dashq.data import StoredLayer
from dashq.runtime.kernels import Kernel

TOKENS = 64  # in the products that are timed: enough to keep a processor's units busy
SECONDS = 0.05  # for which each is repeated; the quickest counts, which other work on the machine has disturbed least

_measured: dict[Any, float] = {}  # by all that the time of a product depends on


def many_tokens(
    kernel: Kernel, tensors: Mapping[str, Shaped[Tensor, "..."]], stored: StoredLayer, dtype: torch.dtype
) -> float:
    """The tokens from which unpacking pays for a layer that a kernel holds as `tensors`; infinity where it never does.

    It is measured once for each shape, grid, kernel, type of inputs and number of threads.
    """
    layer = stored.layer
    key = (kernel.name, layer.rows, layer.columns, stored.size, stored.grid, dtype, torch.get_num_threads())
    if key not in _measured:
        columns = -(-layer.columns // stored.size) * stored.size
        device = next(iter(tensors.values())).device
        x = torch.ones(TOKENS, columns, dtype=dtype, device=device)
        multiply, groups = kernel.bound(tensors, stored), x.view(TOKENS, -1, stored.size)
        packed = _seconds(lambda: multiply(groups))
        unpacking = _seconds(lambda: kernel.multiply_unpacked(x[:1], tensors, stored))
        plain = _seconds(lambda: kernel.multiply_unpacked(x, tensors, stored)) - unpacking
        _measured[key] = turning_point(packed, plain, unpacking)
    return _measured[key]


def turning_point(packed: float, plain: float, unpacking: float) -> float:
    """The tokens from which unpacking pays, from the seconds of two products of `TOKENS` tokens and of unpacking.

    It is rounded up to a power of two, so that noise of the clock seldom changes it.
    """
    if packed <= plain:
        return math.inf
    return float(2 ** math.ceil(math.log2(max(1.0, TOKENS * unpacking / (packed - plain)))))


def _seconds(call: Callable[[], Any]) -> float:
    """The least seconds of calls one after the other, of which the first may compile something and does not count."""
    call()
    begin = now = time.perf_counter()
    least = math.inf
    while now - begin < SECONDS:
        call()
        least, now = min(least, time.perf_counter() - now), time.perf_counter()
    return least
