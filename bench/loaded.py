"""A quantized checkpoint in use: time for one token and for a prompt, memory and divergence, by kernel and plain.

GGUF files of the same model have their turns between these in llama.cpp, each as it is and as a copy in float16.
With `--wide` the checkpoint is a random Llama of some blocks of Llama-2-7B's shape, rounded to 2 bits.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Int64
from torch import Tensor, nn

import dashq
from bench._record import result_line
from bench.block import write_model
from bench.llama import in_float16
from bench.robustness import RECIPE, settings_of
from dashq import kernels_in_use, use_kernels
from dashq.calibration.tokens import evaluation_windows
from dashq.device import wait_for
from dashq.measuring.evaluate import Loaded, kernel_divergence, load_model
from dashq.runtime.kernel_choice import AUTO, EXACT, KERNELS
from dashq.text_source import TextSource
from dashq_plugins.formats.gguf.programs import rewrite

CONTEXT = 8  # tokens before the one that is timed
PLAIN = "plain"


class Way(Protocol):
    """A model as one program computes it."""

    def token_seconds(self, ids: Int64[Tensor, "1 tokens"]) -> float:
        """The seconds of one further token after a few."""
        ...

    def prompt_seconds(self, ids: Int64[Tensor, "1 tokens"]) -> float:
        """The seconds of all tokens at once."""
        ...

    def figures(self, ids: Int64[Tensor, "1 tokens"]) -> dict[str, Any]:
        """What else there is to tell of it."""
        ...


def main() -> None:
    """Open the result with each way to multiply, then time all of them in turn, again and again."""
    parser = argparse.ArgumentParser(prog="python -m bench loaded", description=__doc__)
    parser.add_argument("--model", default="out/smollm2-2bit")
    parser.add_argument("--wide", type=int, default=0, metavar="BLOCKS", help="of a random model, in the place of one")
    parser.add_argument("--tokenizer", default="models/SmolLM2-135M-Instruct", help="of a random model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--rounds", type=int, default=5, help="times that each way has its turn")
    parser.add_argument("--note", default="", help="what else is to be known, as other work on the machine")
    parser.add_argument("--gguf", type=Path, nargs="*", default=[], help="files of the same model, for llama.cpp")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        place = arguments.model
        if arguments.wide:
            place = str(_rounded(arguments, Path(folder)))
            arguments.model = f"random Llama, {arguments.wide} blocks of 4096 and 11008, `rtn`, 2 bits, group 64"
        loaded = load_model(place, arguments.device, arguments.dtype, kernels=EXACT)
        ids = _prompt(loaded, arguments.prompt)
        ways = {**_networks(loaded), **_files(arguments.gguf, ids.numel(), arguments.threads, Path(folder))}
        token, prompt = _seconds_of(ways, ids, arguments.rounds)
    about = {"model": Path(arguments.model).name, "dtype": arguments.dtype}  # not where it lies on this machine
    about |= {"threads": arguments.threads, "prompt": ids.numel()}
    about |= {"note": arguments.note} if arguments.note else {}
    for name, way in ways.items():
        figures = {
            "kernels": name,
            "token seconds": token[name],
            "token / plain": token[name] / token[PLAIN],
            "prompt seconds": prompt[name],
            "prompt / plain": prompt[name] / prompt[PLAIN],
        }
        print(result_line({**about, **figures, **way.figures(ids)}, arguments.device), flush=True)


def _rounded(arguments: argparse.Namespace, folder: Path) -> Path:
    """The folder of a random model of wide blocks, rounded."""
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": arguments.wide}
    write_model(folder / "wide", shape, arguments.tokenizer, arguments.prompt)
    text = argparse.Namespace(model=str(folder / "wide"), calibration="pydoc", samples=1, tokens=64)
    settings = settings_of("rtn", text, str(folder / "rounded"), "float32")
    return dashq.run(dashq.load_recipe(Path(RECIPE), dashq.load_registry(), settings))


def _seconds_of(
    ways: Mapping[str, Way], ids: Int64[Tensor, "1 tokens"], rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """The least seconds of one token and of the prompt, by way; each has its turn in every round."""
    token, prompt = (dict.fromkeys(ways, float("inf")) for _ in range(2))
    for _ in range(rounds):
        for name, way in ways.items():
            token[name] = min(token[name], way.token_seconds(ids))
            prompt[name] = min(prompt[name], way.prompt_seconds(ids))
    return token, prompt


class InDashq:
    """A network of transformers, with the kernels that it was given."""

    def __init__(self, network: Any) -> None:
        self._network = network

    @torch.inference_mode()
    def token_seconds(self, ids: Int64[Tensor, "1 tokens"]) -> float:
        cache = self._network(ids[:, :CONTEXT], use_cache=True).past_key_values
        return self._seconds(ids[:, CONTEXT : CONTEXT + 1], past_key_values=cache, use_cache=True)

    @torch.inference_mode()
    def prompt_seconds(self, ids: Int64[Tensor, "1 tokens"]) -> float:
        return self._seconds(ids, use_cache=False)

    def figures(self, ids: Int64[Tensor, "1 tokens"]) -> dict[str, Any]:
        figures = {"layers": kernels_in_use(self._network), "bytes": _bytes(self._network)}
        if figures["layers"]:
            figures["divergence"], figures["exact divergence"] = kernel_divergence(self._network, ids[0])
        return figures

    def _seconds(self, ids: Int64[Tensor, "1 tokens"], **options: Any) -> float:
        wait_for(self._network.device)
        start = time.perf_counter()
        self._network(ids, **options)
        wait_for(self._network.device)
        return time.perf_counter() - start


class InLlamaCpp:
    """A GGUF file, opened by llama.cpp."""

    def __init__(self, path: Path, tokens: int, threads: int) -> None:
        from llama_cpp import Llama  # pyright: ignore[reportMissingImports] - optional

        self._bytes = path.stat().st_size
        counts: dict[str, Any] = {"n_ctx": tokens, "n_batch": tokens, "n_threads": threads, "n_threads_batch": threads}
        self._model: Any = Llama(str(path), verbose=False, **counts)

    def token_seconds(self, ids: Int64[Tensor, "1 tokens"]) -> float:
        first = ids[0, : CONTEXT + 1].tolist()
        self._model.reset()
        self._model.eval(first[:CONTEXT])
        return self._seconds(first[CONTEXT:])

    def prompt_seconds(self, ids: Int64[Tensor, "1 tokens"]) -> float:
        self._model.reset()
        return self._seconds(ids[0].tolist())

    def figures(self, ids: Int64[Tensor, "1 tokens"]) -> dict[str, Any]:
        return {"bytes": self._bytes}

    def _seconds(self, tokens: list[int]) -> float:
        start = time.perf_counter()
        self._model.eval(tokens)
        return time.perf_counter() - start


def _networks(loaded: Loaded) -> dict[str, Way]:
    """The model by the way to multiply: plain, unpacked, as `auto` has it, and with each kernel that takes a layer."""
    networks = {EXACT: loaded.network}
    for name in (AUTO, *KERNELS):
        network = copy.deepcopy(loaded.network)
        use_kernels(network, name)
        if kernels_in_use(network).keys() != {EXACT}:
            networks[name] = network
    networks[PLAIN] = copy.deepcopy(loaded.network).dequantize()
    return {name: InDashq(network) for name, network in networks.items()}


def _files(paths: Sequence[Path], tokens: int, threads: int, folder: Path) -> dict[str, Way]:
    """GGUF files as they are and in float16, the copies made in a folder."""
    ways: dict[str, Way] = {}
    for path in paths:
        plain = folder / f"{len(ways)}.gguf"
        rewrite(path, plain, in_float16)
        ways[f"llama.cpp, {path.name}"] = InLlamaCpp(path, tokens, threads)
        ways[f"llama.cpp, {path.name} in float16"] = InLlamaCpp(plain, tokens, threads)
    return ways


def _prompt(loaded: Loaded, tokens: int) -> Int64[Tensor, "1 tokens"]:
    """The first tokens of Python's own documentation."""
    source = TextSource(name="pydoc", split="test")
    return evaluation_windows(source, loaded.tokenizer, tokens, 1)[:1].to(loaded.network.device)


def _bytes(network: nn.Module) -> int:
    """Bytes of memory that parameters and buffers take, each once where several lie in it."""
    storages = [tensor.untyped_storage() for tensor in (*network.parameters(), *network.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


if __name__ == "__main__":
    main()
