"""An opened result compiles as one graph, and computes what it computes as written."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dashq import run
from dashq.runtime.kernel_choice import KERNELS
from family_results import FamilyResults
from format_results import FormatResults
from pico import WIDE, pico_model
from recipes import build_recipe, small_scheme

# In a process of its own, which serves all tests: the compiler cannot trace the shape checks of tests. For every line
# it prints the largest difference between the logits of the compiled network and its own, relative to the largest.
COMPILE = """
import json
import sys
from pathlib import Path
import torch
from dashq.results.checkpoint import open_network

ids = torch.arange(20)[None]
for line in sys.stdin:
    folder, kernels = json.loads(line)
    torch.compiler.reset()
    network = open_network(Path(folder), torch.float32, kernels=kernels)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    with torch.no_grad():
        own, other = network(ids, use_cache=False).logits, compiled(ids, use_cache=False).logits
    print(float((own - other).abs().max() / own.abs().max()), flush=True)
"""


@pytest.fixture(scope="module")
def compiler() -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", COMPILE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process


def logits_differ_by(compiler: "subprocess.Popen[str]", folder: Path, kernels: str = "exact") -> float:
    assert compiler.stdin
    assert compiler.stdout
    compiler.stdin.write(json.dumps([str(folder), kernels]) + "\n")
    compiler.stdin.flush()
    return float(compiler.stdout.readline())


@pytest.mark.parametrize("label", ["dashq", "mlx", "dashq-packed-linear", "gptq", "compressed-tensors-integer"])
def test_packed_layers_of_a_format_compile_as_one_graph(
    label: str, results: FormatResults, compiler: "subprocess.Popen[str]"
) -> None:
    assert logits_differ_by(compiler, results[label]) < 1e-6


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4"])
def test_packed_experts_compile_as_one_graph(
    family: str, families: FamilyResults, compiler: "subprocess.Popen[str]"
) -> None:
    """Experts with biases, transposed ones, and those whose tokens come dispatched."""
    assert logits_differ_by(compiler, families.result(family)) < 1e-5


@pytest.mark.parametrize("kernels", ["lanes", "ark_float32", "ark_int8x2"])
def test_kernels_compile_as_one_graph(kernels: str, results: FormatResults, compiler: "subprocess.Popen[str]") -> None:
    pytest.importorskip(KERNELS[kernels].package or "torch")
    assert logits_differ_by(compiler, results["dashq"], kernels) < 1e-5


def test_kernels_of_experts_compile_as_one_graph(families: FamilyResults, compiler: "subprocess.Popen[str]") -> None:
    pytest.importorskip("numba")
    assert logits_differ_by(compiler, families.result("mixtral"), "lanes") < 1e-5


def test_embeddings_that_a_kernel_of_the_tied_head_holds_compile_as_one_graph(
    tmp_path: Path, compiler: "subprocess.Popen[str]"
) -> None:
    pytest.importorskip("numba")
    model = pico_model("llama", tmp_path / "model", vocab_size=330, **WIDE)
    scheme = small_scheme(size=32, solver="rtn")
    result = run(build_recipe(model, tmp_path / "result", scheme=scheme, embeddings={"bits": 4}))
    assert logits_differ_by(compiler, result, "auto") < 1e-5
