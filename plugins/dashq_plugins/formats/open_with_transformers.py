"""Stock transformers as a program that opens results."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dashq import Opened
from dashq.model.location import Location


def open_with_transformers(folder: Path, trust_remote_code: bool) -> Opened:
    """Stock transformers: weights as it unpacks them, logits of the folder opened as anybody would, in float32."""
    from transformers import AutoModelForCausalLM

    from dashq.model.loading import read_config

    location = Location(folder, trust_remote_code=trust_remote_code)
    config: Any = read_config(location)
    config.quantization_config = config.quantization_config | {"dequantize": True}
    dense: Any = AutoModelForCausalLM.from_pretrained(
        **location.arguments, config=config, device_map="cpu", dtype="auto"
    )
    network: Any = AutoModelForCausalLM.from_pretrained(
        **location.arguments, device_map="cpu", dtype=torch.float32
    ).eval()
    torch.nn.Module.float(network)  # where it unpacked weights it may have left them in another type
    dtype = dense.dtype
    # What it leaves packed it computes with in float32.
    unpacked = all(x.is_floating_point() and x.equal(x.to(dtype).float()) for x in network.parameters())

    @torch.inference_mode()
    def logits(ids: list[int]) -> Tensor:
        result: Tensor = network(torch.tensor([ids])).logits[0]
        return result

    def weight(name: str) -> Tensor:
        result: Tensor = dense.get_submodule(name).weight.detach().to(dtype)
        return result

    # In float32 it may round the product before the sum; in 16 bits that is lost in the last rounding.
    tolerance = 1e-6 if dtype == torch.float32 else 0.0
    return Opened(
        weight=weight,
        logits=logits,
        unpacks_to=dtype if unpacked else torch.float32,
        tolerance=tolerance,
        logits_tolerance=1e-4,
    )
