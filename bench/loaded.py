"""A quantized checkpoint in use: bytes of its weights in memory and seconds per generated token, packed and plain."""

import argparse
import time

import torch
from torch import nn

from bench._record import result_line
from dashq.device import wait_for
from dashq.measuring.evaluate import Loaded, load_model


def main() -> None:
    """Open the result once, measure it packed, turn it into a plain model, measure again."""
    parser = argparse.ArgumentParser(prog="python -m bench loaded", description=__doc__)
    parser.add_argument("--model", default="out/smollm2-2bit")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    loaded = load_model(arguments.model, arguments.device)
    packed = _measure(loaded, arguments.tokens)
    loaded.network.dequantize()
    plain = _measure(loaded, arguments.tokens)
    ratios = {key: packed[key] / plain[key] for key in packed}
    about = {"model": arguments.model, "threads": torch.get_num_threads(), "tokens": arguments.tokens}
    print(result_line({**about, "packed": packed, "plain": plain, "packed / plain": ratios}, arguments.device))


def _measure(loaded: Loaded, tokens: int) -> dict[str, float]:
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt").to(loaded.network.device)
    with torch.inference_mode():
        loaded.network.generate(**ids, max_new_tokens=1, do_sample=False)
        wait_for(loaded.network.device)
        start = time.perf_counter()
        loaded.network.generate(**ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        wait_for(loaded.network.device)
        seconds = (time.perf_counter() - start) / tokens
    return {"bytes": _bytes(loaded.network), "seconds per token": seconds}


def _bytes(network: nn.Module) -> int:
    tensors = {id(tensor): tensor for tensor in [*network.parameters(), *network.buffers()]}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


if __name__ == "__main__":
    main()
