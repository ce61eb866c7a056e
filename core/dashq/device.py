"""The device to compute on, the type to compute in, and the memory that is given back."""

import ctypes
import os
from functools import cache
from pathlib import Path

import psutil
import torch

from dashq.errors import RecipeError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CONTROL_GROUP = Path("/sys/fs/cgroup")
LOCAL_RANK = "LOCAL_RANK"  # the environment variable: a process's number among those that torchrun started here
KERNELS = 64  # more than a block without experts has shapes of products


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` is the first graphics processor, or the CPU where there is none.

    Among several processes of a machine, `auto` and `cuda` are each one's own. Raises `RecipeError` for a device that
    does not exist here, and for fewer graphics processors than there are processes.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if name.startswith("cuda:") and processes > 1:
        raise RecipeError(
            f"device: {name!r} is one graphics processor, and each of {processes} processes takes its own; use auto, "
            "cuda or cpu"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and processes > (count := torch.cuda.device_count()) > 0:
        raise RecipeError(
            f"device: each of {processes} processes takes a graphics processor of its own, and here are {count}: start "
            "as many, or use cpu"
        )
    if name == "cuda" and LOCAL_RANK in os.environ:
        name = f"cuda:{os.environ[LOCAL_RANK]}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"device: no device is named {name!r}; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise RecipeError(f"device: {name!r} is not available here; use auto or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        possible = ", ".join(f"cuda:{index}" for index in range(torch.cuda.device_count()))
        raise RecipeError(f"device: {name!r} is not available here; use auto, cpu or {possible}")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of that name; `auto` is bfloat16 where the hardware multiplies it, else float32.

    Raises `RecipeError` for a type that nothing is computed in.
    """
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise RecipeError(f"dtype: nothing is computed in {name!r}; use auto, {', '.join(DTYPES)}")
    return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32


@cache
def multiplies_bfloat16(device: torch.device) -> bool:
    """True where the hardware multiplies in bfloat16; elsewhere torch does so many times as slowly as in float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return any(torch.cpu.get_capabilities().get(unit, False) for unit in ("avx512_bf16", "amx_bf16"))


def type_name(dtype: torch.dtype) -> str:
    """The name of a type as recipes and configurations have it: `float16`, not `torch.float16`."""
    return str(dtype).removeprefix("torch.")


def in_words(device: torch.device, dtype: torch.dtype) -> str:
    """The device and the type in words, as `on cpu in bfloat16`."""
    return f"on {device} in {type_name(dtype)}"


def wait_for(device: torch.device) -> None:
    """Wait until the device has computed everything: a graphics processor works while Python goes on."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> int:
    """Bytes that a graphics processor has free; else those of the machine, or of the control group that limits us."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free: int = psutil.virtual_memory().available
    limit, used, details = (CONTROL_GROUP / f"memory.{name}" for name in ("max", "current", "stat"))
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        # Files in the cache count as used, and give way.
        cached = dict(line.split() for line in details.read_text().splitlines())["inactive_file"]
        free = min(free, int(most) - int(used.read_text()) + int(cached))
    return free


def limit_kernel_caches() -> None:
    """Let oneDNN, and torch in front of it, keep few kernels, unless the environment says how many.

    Each keeps one for every number of tokens that an expert was given, up to 1024 by default, though these numbers
    hardly ever come again. Both read the environment when they first multiply.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KERNELS))


def give_back_memory() -> None:
    """Return freed memory to the operating system.

    glibc keeps what a block gave up, cut into pieces that the next block's tensors do not fit: the process would grow
    with every block. Other C libraries have no such call.
    """
    if os.name == "posix" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
