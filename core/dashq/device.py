"""Where to compute, and in which type."""

import torch

from dashq.errors import RecipeError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` is the first graphics processor, or the CPU where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"device: no device is named {name!r}; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise RecipeError(f"device: {name!r} is not available here; use auto or cpu")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of that name; `auto` is bfloat16 where the hardware multiplies it, else float32."""
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise RecipeError(f"dtype: nothing is computed in {name!r}; use auto, {', '.join(DTYPES)}")
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = any(torch.cpu.get_capabilities().get(unit, False) for unit in ("avx512_bf16", "amx_bf16"))
    return torch.bfloat16 if fast else torch.float32
