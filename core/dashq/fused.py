"""Compile arithmetic into one loop that reads each weight once, where there is a compiler and the work pays for it."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from jaxtyping import Num
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

# Recompute inside the loop instead of writing what is shared to memory, and ask for the number of threads on each call.
OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "realize_reads_threshold": 1000,
    "realize_opcount_threshold": 1000,
    "cpp.dynamic_threads": True,
    "compile_threads": 1,
}


def fused(arithmetic: Callable[P, R]) -> Callable[[bool], Callable[P, R]]:
    """Give `arithmetic` on tensors two forms: `f(True)` is compiled for any shape, `f(False)` is as written.

    The compiled form is kept on disk by torch, and may leave out a cast to a narrower type and back. Where compiling
    fails, for want of a C++ compiler say, a warning tells so once, and both forms are as written.
    """
    compiled: Callable[P, R] | None = None
    broken = False

    @functools.wraps(arithmetic)
    def try_compiled(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal compiled, broken
        if not broken:
            try:
                compiled = compiled or torch.compile(arithmetic, dynamic=True, options=OPTIONS | _contraction())
                return compiled(*args, **kwargs)
            except Exception as error:  # whatever a compiler can fail with; a mistake in the input fails again below
                broken = True
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                warnings.warn(
                    f"solving without compiled kernels, which is slower: {reason}", RuntimeWarning, stacklevel=2
                )
        return arithmetic(*args, **kwargs)

    return lambda compile_it: try_compiled if compile_it else arithmetic


def _contraction() -> dict[str, str | int | bool | Callable[..., Any]]:
    """Multiply and add in one instruction, as this version of torch is told to."""
    from torch._inductor import config  # slow to import

    is_switch = isinstance(config.cpp.enable_floating_point_contract_flag, bool)
    return {"cpp.enable_floating_point_contract_flag": True if is_switch else "fast"}


def once(values: Num[Tensor, "*shape"]) -> Num[Tensor, "*shape"]:
    """The same values, which compiled arithmetic computes before the loop that reads them and not inside it.

    A compiler keeps in memory what is viewed by its strides.
    """
    return values.as_strided(values.shape, values.stride())
