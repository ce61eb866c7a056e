"""A graphics processor for tests that have none: it computes on the CPU, and its tensors do not mix with the CPU's.

A tensor is on the device if its memory is marked so, as real memory is: views, parameters and `.data` need no care. A
function mode sees every call that Python makes to torch, answers for the device, and refuses what CUDA would refuse.
What happens inside such a call is not looked at, and nothing that is compiled.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

DEVICE = torch.device("cuda:0")
PROPERTIES: Any = Tensor  # whose types hide that they are descriptors
ANSWERS: Mapping[Any, Callable[[bool], Any]] = {
    PROPERTIES.device.__get__: lambda here: DEVICE if here else torch.device("cpu"),
    PROPERTIES.is_cuda.__get__: lambda here: here,
    PROPERTIES.is_cpu.__get__: lambda here: not here,
}
MOVES = (Tensor.to, Tensor.cpu, Tensor.cuda)
TO_NUMPY = (Tensor.numpy, Tensor.__array__)
BY_INDEX = (Tensor.__getitem__, Tensor.__setitem__)
# Copies go from device to device; what is copied deeply comes with a memory of everything else.
MAY_MIX = (Tensor.copy_, PROPERTIES.data.__set__, Tensor.__deepcopy__, vars(torch)["_has_compatible_shallow_copy_type"])
# Elementwise arithmetic takes single numbers from the CPU; these do not.
ALL_ALIKE = (torch.stack, torch.cat, torch.block_diag)
# What CUDA has a kernel for, and the CPU has none.
LACKING: Mapping[Any, Callable[..., Any]] = {
    torch.histc: lambda x, *args, **kwargs: torch.histc(x.float(), *args, **kwargs).to(x.dtype)
}


class PretendedGenerator(torch.Generator):
    """A generator of the CPU that knows for which device it was made."""

    here: bool

    def __new__(cls, device: torch.device | str = "cpu") -> "PretendedGenerator":
        make: Any = super().__new__
        generator: PretendedGenerator = make(cls, "cpu")
        generator.here = _means_here(device)
        return generator


@contextmanager
def pretended_device() -> Generator[None]:
    """Let `DEVICE` exist for the duration of the `with` statement."""
    with (
        patch.object(torch, "Generator", PretendedGenerator),
        patch.object(torch.cuda, "synchronize"),
        patch.object(torch.cuda, "mem_get_info", return_value=(2**34, 2**34)),
        patch.object(torch.cuda, "get_device_capability", return_value=(8, 0)),
        _Pretending(),
    ):
        yield


class _Pretending(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in ANSWERS and not args[0].is_meta:
            return ANSWERS[func](_is_here(args[0]))
        if func in TO_NUMPY and _is_here(args[0]):
            raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first.")
        if func.__name__ == "__get__":  # numbers, or views of the same memory
            return func(*args)
        kwargs = dict(kwargs or {})
        if func in MOVES:
            return _move(func, args, kwargs)
        given = _tensors((args[0],) if func in MAY_MIX else (args, kwargs))
        here = any(map(_is_here, given))
        if here:
            _refuse_mixtures(func, given, args, kwargs)
        if (device := kwargs.get("device")) is not None:
            here = _means_here(device)
            kwargs["device"] = "cpu" if here else device
        generator = kwargs.get("generator")
        if generator is not None and getattr(generator, "here", False) != here:
            raise RuntimeError(f"Expected a generator of the device of the numbers (when calling {resolve_name(func)})")
        before = set(map(_memory, given))
        result = LACKING.get(func, func)(*args, **kwargs)
        if here:
            _mark([tensor for tensor in _tensors(result) if _memory(tensor) not in before])
        return result


def _move(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """`to`, `cpu` and `cuda`: new memory where the device is another."""
    tensor, *others = args
    here = {Tensor.cpu: False, Tensor.cuda: True}.get(func, _is_here(tensor))
    if func is Tensor.to:
        for value in (*others, *kwargs.values()):
            if isinstance(value, str | torch.device):
                here = _means_here(value)
            elif isinstance(value, Tensor):
                here = _is_here(value)
    others = ["cpu" if isinstance(value, str | torch.device) and here else value for value in others]
    kwargs |= {"device": "cpu"} if here and kwargs.get("device") is not None else {}
    result: Tensor = tensor.cpu() if func is Tensor.cuda else func(tensor, *others, **kwargs)
    if here != _is_here(tensor) and _memory(result) == _memory(tensor):
        result = result.clone()
    if here:
        _mark([result])
    return result


def _refuse_mixtures(func: Any, given: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """As CUDA does; `given` are all tensors, and some of them on the device."""
    if func in BY_INDEX:  # an index may come from the CPU, and so may what is copied into a slice
        index, values = _tensors(args[1]), _tensors(args[2:])
        given = [args[0], *(values if index else ()), *(() if _is_here(args[0]) else index)]
    written = _tensors([kwargs.get("out"), args[:1] if func.__name__.endswith("_") else ()])
    for tensor in given:
        single = tensor.dim() == 0 and func not in ALL_ALIKE and not any(tensor is target for target in written)
        if not (_is_here(tensor) or tensor.is_meta or single) and any(map(_is_here, given)):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {DEVICE} and cpu! "
                f"(when calling {resolve_name(func) or func})"
            )


def _is_here(tensor: Tensor) -> bool:
    return hasattr(tensor.untyped_storage(), "pretended")


def _means_here(device: torch.device | str) -> bool:
    return torch.device(device).type == DEVICE.type


def _mark(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        tensor.untyped_storage().pretended = True  # type: ignore[attr-defined]


def _memory(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


def _tensors(values: Any) -> list[Tensor]:
    """All tensors in nested arguments."""
    if isinstance(values, Tensor):
        return [values]
    parts = values.values() if isinstance(values, dict) else values if isinstance(values, tuple | list) else ()
    return [tensor for part in parts for tensor in _tensors(part)]
