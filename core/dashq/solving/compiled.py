"""Compile arithmetic into one loop that reads each weight once, where there is a compiler and the work pays for it."""

import functools
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, ParamSpec, TypeVar

from jaxtyping import Num
from torch import Tensor

from dashq.solving.compiled_forms import CompiledForms, Options

# Layers with fewer weights are not worth the seconds that compiling or loading a kernel takes (bench: solvers).
COMPILE_FROM = 1 << 16

P = ParamSpec("P")
R = TypeVar("R")

# Recompute inside the loop instead of writing what is shared to memory, and ask for the number of threads on each call.
OPTIONS: Options = {
    "realize_reads_threshold": 1000,
    "realize_opcount_threshold": 1000,
    "cpp.dynamic_threads": True,
    "compile_threads": 1,
}


_hear: ContextVar[Callable[[], None]] = ContextVar("hear", default=lambda: None)


@contextmanager
def hearing_compilations(hear: Callable[[], None]) -> Generator[None]:
    """Call `hear` inside the `with` statement before arithmetic is compiled, or loaded from disk: it takes seconds."""
    token = _hear.set(hear)
    try:
        yield
    finally:
        _hear.reset(token)


def compiling_pays(weights: int) -> bool:
    """True for arithmetic on so many weights, or on as many other numbers."""
    return weights >= COMPILE_FROM


class Compilable(Generic[P, R]):
    """Arithmetic on tensors in two forms: called it runs as written, and `compiled` runs as one loop for any shape.

    The compiled form stays on disk; numbers in the source and in arguments that are no tensors are constants of it. It
    may leave out a cast to a narrower type and back. Where compiling fails, for want of a C++ compiler say, one warning
    says so, and `compiled` runs as written.
    """

    def __init__(self, arithmetic: Callable[P, R]) -> None:
        functools.update_wrapper(self, arithmetic)
        self._arithmetic = arithmetic
        self._forms: CompiledForms | None = None
        self._broken = False

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._arithmetic(*args, **kwargs)

    def compiled(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The same, compiled at the first call."""
        if not self._broken:
            if self._forms is None:
                _hear.get()()
            try:
                self._forms = self._forms or CompiledForms(self._arithmetic, OPTIONS | _contraction())
                result: R = self._forms.fitting(args, kwargs)(*args, **kwargs)
                return result
            except Exception as error:  # whatever a compiler can fail with; a mistake in the input fails again below
                self._broken = True
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                warnings.warn(
                    f"solving without compiled kernels, which is slower: {reason}", RuntimeWarning, stacklevel=2
                )
        return self._arithmetic(*args, **kwargs)

    def form(self, compiled: bool) -> Callable[P, R]:
        """The compiled form, or the one as written."""
        return self.compiled if compiled else self


def _contraction() -> Options:
    """The option, in the form of this version of torch, that makes one instruction of a product and a sum."""
    from torch._inductor import config  # slow to import

    is_switch = isinstance(config.cpp.enable_floating_point_contract_flag, bool)
    return {"cpp.enable_floating_point_contract_flag": True if is_switch else "fast"}


def materialize(values: Num[Tensor, "*shape"]) -> Num[Tensor, "*shape"]:
    """The same values, which compiled arithmetic computes before the loop that reads them and not inside it.

    A compiler keeps in memory what is viewed by its strides.
    """
    return values.as_strided(values.shape, values.stride())
