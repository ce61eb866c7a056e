"""Whole files that programs make of one model by themselves, and dashq for them: bytes of all weights, and perplexity.

`llama-quantize` is llama.cpp's own quantizer, through llama-cpp-python, on the model in float32, without importances;
`mlx-lm` rounds in groups of 64; `dashq` is `dashq run MODEL --bits B --for PROGRAM`. Embeddings and head are theirs to
choose. Every file is read back and judged by the same code in float32. What stands in the file of results already is
not measured again.
"""

import argparse
import ctypes
import importlib
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy
from safetensors.torch import load_file

from bench.robustness import Figures, complete, judge
from dashq import DashqLinear, Recipe, load_registry, run
from dashq.measuring.evaluate import load_model
from dashq_plugins.formats.gguf.programs import in_float32, rewrite

FIRST = "model.layers.0.mlp.down_proj"
MLX_GROUP = 64
LEVELS = {"fast": " --fast", "usual": "", "best": " --best"}


def main() -> None:
    """Make every file that is asked for, and judge it."""
    summary, _, explanation = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m bench files", description=summary, epilog=explanation)
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--llama", nargs="*", default=[], metavar="TYPE", help="such as Q4_K_M, by llama-quantize")
    parser.add_argument("--mlx", nargs="*", type=int, default=[], metavar="BITS", help="by mlx-lm")
    parser.add_argument("--dashq", nargs="*", default=[], metavar="PROGRAM=BITS", help="such as llama.cpp=4")
    parser.add_argument("--level", choices=LEVELS, default="fast", help="of dashq")
    parser.add_argument("--calibration", default="pydoc", help="text for dashq to calibrate on")
    parser.add_argument("--test", nargs="+", default=["pydoc=pydoc"], help="texts to judge on, each as NAME=SOURCE")
    parser.add_argument("--windows", type=int, default=4, help="of each test text, the first ones")
    parser.add_argument("--context", type=int, default=1024, help="tokens in each window")
    parser.add_argument("--output", type=Path, default=Path("bench/results/files.jsonl"))
    arguments = parser.parse_args()
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        complete(arguments.output, ((asked, partial(measure, asked, arguments, folder)) for asked in wanted(arguments)))


def wanted(arguments: argparse.Namespace) -> Iterator[Figures]:
    """What makes each file what it is."""
    common = {"windows": arguments.windows, "context": arguments.context}
    for kind in arguments.llama:
        yield {"by": "llama-quantize", "type": kind, "version": version("llama_cpp"), **common}
    for bits in arguments.mlx:
        yield {"by": "mlx-lm", "type": f"{bits} bits, group {MLX_GROUP}", "version": version("mlx_lm"), **common}
    for pair in arguments.dashq:
        program, _, bits = pair.partition("=")
        yield {"by": "dashq", "type": f"--bits {bits} --for {program}{LEVELS[arguments.level]}", **common}


def version(module: str) -> str:
    """The version of an installed program."""
    return str(importlib.import_module(module).__version__)


def measure(asked: Figures, arguments: argparse.Namespace, folder: Path) -> Figures:
    """Make one file, and judge it."""
    if asked["by"] == "llama-quantize":
        made = readable = quantize_with_llama_cpp(arguments.model, asked["type"], folder)
    elif asked["by"] == "mlx-lm":
        made, readable = round_with_mlx(arguments.model, int(asked["type"].split()[0]), folder)
    else:
        made = readable = quantize_with_dashq(asked["type"], arguments, folder / asked["type"].replace(" ", ""))
    loaded = load_model(str(readable), dtype="float32")
    if any(isinstance(module, DashqLinear) for module in loaded.network.modules()):
        loaded.network.dequantize()  # a packed layer would unpack itself for every window
    return {"bytes_on_disk": bytes_of_weights(made), "perplexity": judge(loaded, arguments)}


def bytes_of_weights(made: Path) -> int:
    """Bytes of a file, or of all files with weights in a folder."""
    files = [made] if made.is_file() else [*made.glob("*.safetensors"), *made.glob("*.gguf")]
    return sum(file.stat().st_size for file in files)


def quantize_with_llama_cpp(model: Path, kind: str, folder: Path) -> Path:
    """The file that llama.cpp's own quantizer makes, of a type such as Q4_K_M."""
    llama: Any = importlib.import_module("llama_cpp")
    source, target = folder / "plain.gguf", folder / f"{kind}.gguf"
    if not source.exists():  # one for all types
        plain_gguf(model, folder)
    options = llama.llama_model_quantize_default_params()
    options.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{kind}")
    options.nthread = 1
    failed = llama.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(options))
    if failed:
        raise RuntimeError(f"llama.cpp makes no {kind} of {model}: it returned {failed}")
    return target


def plain_gguf(model: Path, folder: Path) -> Path:
    """A GGUF file of a model, every number in float32.

    dashq writes files of models with something quantized: one layer is, and gets its own numbers back.
    """
    recipe = {
        "model": str(model),
        "output": str(folder / "written"),
        "calibration": {"dataset": "pydoc", "samples": 1, "sequence_length": 64},
        "scheme": {
            "bits": 8,
            "estimator": "diagonal",
            "grouper": {"name": "contiguous", "size": 32},
            "solver": "rtn",
            "skip": True,
        },
        "overrides": [{"match": FIRST, "skip": False}],
        "certificate_groups": 0,
        "serializer": "gguf",
    }
    written, plain = run(Recipe.model_validate(recipe, context=load_registry())) / "model.gguf", folder / "plain.gguf"
    weights = next(
        tensors for file in sorted(model.glob("*.safetensors")) if f"{FIRST}.weight" in (tensors := load_file(file))
    )
    own = weights[f"{FIRST}.weight"].float().numpy()

    def numbers(tensor: Any) -> "numpy.ndarray[Any, Any]":
        return own if tensor.name == "blk.0.ffn_down.weight" else in_float32(tensor)

    rewrite(written, plain, numbers)
    return plain


def round_with_mlx(model: Path, bits: int, folder: Path) -> tuple[Path, Path]:
    """The folder that mlx-lm makes by rounding, and the same weights as a plain model."""
    convert: Any = importlib.import_module("mlx_lm").convert
    made, plain = folder / f"rounded-{bits}", folder / f"plain-{bits}"
    convert(str(model), str(made), quantize=True, q_bits=bits, q_group_size=MLX_GROUP)
    convert(str(made), str(plain), dequantize=True)
    return made, plain


def quantize_with_dashq(words: str, arguments: argparse.Namespace, output: Path) -> Path:
    """The folder that `dashq run` makes with these words behind the model."""
    more = ["--text", arguments.calibration, "--output", str(output), "--quiet"]
    command = [str(Path(sys.executable).with_name("dashq")), "run", str(arguments.model)]
    subprocess.run([*command, *words.split(), *more], check=True)
    return output


if __name__ == "__main__":
    main()
