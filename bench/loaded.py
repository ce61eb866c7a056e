"""A quantized checkpoint in use: time for one token and for a prompt, memory and divergence, by kernel and plain."""

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from bench._record import result_line
from dashq import kernels_in_use, use_kernels
from dashq.calibration.tokens import evaluation_windows
from dashq.device import wait_for
from dashq.measuring.evaluate import Loaded, kernel_divergence, load_model
from dashq.runtime.kernel_choice import AUTO, EXACT, KERNELS
from dashq.text_source import TextSource

CONTEXT = 8  # tokens before the one that is timed
PLAIN = "plain"


def main() -> None:
    """Open the result with each way to multiply, then time all of them in turn, again and again."""
    parser = argparse.ArgumentParser(prog="python -m bench loaded", description=__doc__)
    parser.add_argument("--model", default="out/smollm2-2bit")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--rounds", type=int, default=5, help="times that each way has its turn")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    loaded = load_model(arguments.model, arguments.device, arguments.dtype, kernels=EXACT)
    ids = _prompt(loaded, arguments.prompt)
    networks = _networks(loaded)
    token: dict[str, list[float]] = {name: [] for name in networks}
    prompt: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(arguments.rounds):
        for name, network in networks.items():
            token[name].append(_token_seconds(network, ids))
            prompt[name].append(_prompt_seconds(network, ids))
    about = {"model": arguments.model, "dtype": arguments.dtype, "threads": arguments.threads, "prompt": ids.numel()}
    for name, network in networks.items():
        figures = {
            "kernels": name,
            "layers": kernels_in_use(network),
            "bytes": _bytes(network),
            "token seconds": min(token[name]),
            "token / plain": min(token[name]) / min(token[PLAIN]),
            "prompt seconds": min(prompt[name]),
            "prompt / plain": min(prompt[name]) / min(prompt[PLAIN]),
        }
        if name != PLAIN:
            figures["divergence"], figures["exact divergence"] = kernel_divergence(network, ids[0])
        print(result_line({**about, **figures}, arguments.device), flush=True)


def _networks(loaded: Loaded) -> dict[str, Any]:
    """The model by the way to multiply: plain, unpacked, as `auto` has it, and with each kernel that takes a layer."""
    networks = {EXACT: loaded.network}
    for name in (AUTO, *KERNELS):
        network = copy.deepcopy(loaded.network)
        use_kernels(network, name)
        if kernels_in_use(network).keys() != {EXACT}:
            networks[name] = network
    return {**networks, PLAIN: copy.deepcopy(loaded.network).dequantize()}


def _prompt(loaded: Loaded, tokens: int) -> Int64[Tensor, "1 tokens"]:
    """The first tokens of Python's own documentation."""
    source = TextSource(name="pydoc", split="test")
    return evaluation_windows(source, loaded.tokenizer, tokens, 1)[:1].to(loaded.network.device)


@torch.inference_mode()
def _token_seconds(network: Any, ids: Int64[Tensor, "1 tokens"]) -> float:
    """The seconds of one further token after a few."""
    cache = network(ids[:, :CONTEXT], use_cache=True).past_key_values
    return _seconds(network, lambda: network(ids[:, CONTEXT : CONTEXT + 1], past_key_values=cache, use_cache=True))


@torch.inference_mode()
def _prompt_seconds(network: Any, ids: Int64[Tensor, "1 tokens"]) -> float:
    """The seconds of all tokens at once."""
    return _seconds(network, lambda: network(ids, use_cache=False))


def _seconds(network: Any, call: Callable[[], Any]) -> float:
    wait_for(network.device)
    start = time.perf_counter()
    call()
    wait_for(network.device)
    return time.perf_counter() - start


def _bytes(network: nn.Module) -> int:
    """Bytes of memory that parameters and buffers take, each once where several lie in it."""
    storages = [tensor.untyped_storage() for tensor in (*network.parameters(), *network.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


if __name__ == "__main__":
    main()
