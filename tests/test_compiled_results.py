"""An opened result compiles as one graph, and computes what it computes as written."""

import subprocess
import sys
from pathlib import Path

import pytest

from dashq import run
from dashq.runtime.kernel_choice import KERNELS
from family_results import FamilyResults
from format_results import FormatResults
from pico import WIDE, pico_model
from recipes import build_recipe, small_scheme

# In a process of its own: the compiler cannot trace the shape checks of tests. It prints the largest difference between
# the logits of the compiled network and its own, relative to the largest.
COMPILE = """
import sys
from pathlib import Path
import torch
from dashq.results.checkpoint import open_network

network = open_network(Path(sys.argv[1]), torch.float32, kernels=sys.argv[2])
ids = torch.arange(20)[None]
compiled = torch.compile(network, fullgraph=True, backend="eager")
with torch.no_grad():
    own, other = network(ids, use_cache=False).logits, compiled(ids, use_cache=False).logits
print(float((own - other).abs().max() / own.abs().max()))
"""


def logits_differ_by(folder: Path, kernels: str = "exact") -> float:
    command = [sys.executable, "-c", COMPILE, str(folder), kernels]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(process.stdout)


@pytest.mark.parametrize("label", ["dashq", "mlx", "dashq-packed-linear", "gptq", "compressed-tensors-integer"])
def test_packed_layers_of_a_format_compile_as_one_graph(label: str, results: FormatResults) -> None:
    assert logits_differ_by(results[label]) < 1e-6


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4"])
def test_packed_experts_compile_as_one_graph(family: str, families: FamilyResults) -> None:
    """Experts with biases, transposed ones, and those whose tokens come dispatched."""
    assert logits_differ_by(families.result(family)) < 1e-5


@pytest.mark.parametrize("kernels", ["lanes", "ark_float32", "ark_int8x2"])
def test_kernels_compile_as_one_graph(kernels: str, results: FormatResults) -> None:
    pytest.importorskip(KERNELS[kernels].package or "torch")
    assert logits_differ_by(results["dashq"], kernels) < 1e-5


def test_kernels_of_experts_compile_as_one_graph(families: FamilyResults) -> None:
    pytest.importorskip("numba")
    assert logits_differ_by(families.result("mixtral"), "lanes") < 1e-5


def test_embeddings_that_a_kernel_of_the_tied_head_holds_compile_as_one_graph(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    model = pico_model("llama", tmp_path / "model", vocab_size=330, **WIDE)
    scheme = small_scheme(size=32, solver="rtn")
    result = run(build_recipe(model, tmp_path / "result", scheme=scheme, embeddings={"bits": 4}))
    assert logits_differ_by(result, "auto") < 1e-5
