"""On a real graphics processor: what it computes agrees with the CPU, and files are the same; skipped without one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from dashq import Coupled, DashqLinear, Diagonal, Grid, Grouping, Layer, Serializer, Solver, StoredLayer, run
from dashq.curvature import Curvature
from dashq.data import Zero
from dashq.measuring.evaluate import perplexity
from dashq.results.report import read_report
from dashq.results.verify import verify
from dashq.solving import compiled
from dashq.solving.arithmetic import weighted_error
from dashq.testing.comparison import equal, same
from devices import CPU, FORMATS, IDS, PAIRS, WALKS, ZEROS, full, grouping_of, home, moved, recipes, tensors
from pretend_device import DEVICE
from recipes import REGISTRY
from tensors import noise

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a graphics processor")


@pytest.mark.parametrize("name", REGISTRY.estimators)
def test_estimators(name: str) -> None:
    estimator = REGISTRY.estimators[name]()
    x, weights = noise(0, 3000, 70), noise(0, 3000).abs()

    def learned(x: Tensor, weights: Tensor) -> Curvature:
        state = estimator.start(Layer(name="layer", rows=1, columns=70))
        for part, weight in zip(x.split(1000), weights.split(1000), strict=True):
            state = estimator.update(state, part, weight)
        return estimator.finish(state)

    curvature, expected = home(learned(moved(x), moved(weights))), learned(x, weights)
    for part, other in zip(tensors(curvature), tensors(expected), strict=True):
        torch.testing.assert_close(part, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("solver", "grid"), PAIRS, ids=str)
def test_solvers(solver: Solver, grid: Grid) -> None:
    _compare(solver, grid, rows=6)


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("name", ["irls", "closed_form", "feedback"])
def test_compiled_solvers(name: str, zero: Zero) -> None:
    _compare(REGISTRY.solvers[name](), Grid(bits=2, dtype=torch.float16, zero=zero), rows=1100)


def _compare(solver: Solver, grid: Grid, rows: int) -> None:
    grouping = grouping_of(grid)
    weight, columns = noise(0, rows, grouping.columns), grouping.columns
    curvature = full(columns) if solver.objective == "rows" else Diagonal(noise(0, columns).exp())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "COMPILE_FROM", 1 << 62)  # what is expected need not wait for a compiler
        expected = solver.solve(weight, curvature, grouping, grid)
    found = home(solver.solve(moved(weight), moved(curvature), grouping, grid))
    errors = [_objective(weight, quantized.dequantize(), curvature) for quantized in (found, expected)]
    # Where codes depend on one another, the last digit of one weight can move the error by almost a thousandth.
    assert errors[0] == pytest.approx(errors[1], rel=1e-2 if solver.objective == "rows" else 2e-3)
    assert home(moved(found).dequantize(torch.bfloat16)).equal(found.dequantize(torch.bfloat16))


def _objective(weight: Tensor, approximation: Tensor, curvature: Curvature) -> float:
    if isinstance(curvature, Coupled):
        residual = (weight - approximation).double()
        return float((residual @ curvature.dense().double() * residual).sum())
    return weighted_error(weight, approximation, curvature)


@pytest.mark.parametrize(("serializer", "grid"), FORMATS, ids=str)
def test_files_are_the_same_and_layers_multiply(serializer: Serializer, grid: Grid) -> None:
    grouping = Grouping(columns=256, size=grid.super_blocks.size if grid.super_blocks else 32)
    solver = REGISTRY.solvers["k_quant" if grid.super_blocks else "rtn"]()
    quantized = solver.solve(noise(0, 32, 256), Diagonal(noise(0, 256).exp()), grouping, grid)
    packed, there = (
        dict(serializer.pack(quantized)),
        moved(dict(serializer.pack(moved(quantized))), CPU),
    )
    assert packed.keys() == there.keys()
    assert all(equal(there[name], tensor) for name, tensor in packed.items())
    assert same(home(serializer.unpack(moved(packed), 256, grouping.size, grid)), quantized)
    layer = DashqLinear(
        serializer,
        StoredLayer(layer=Layer(name="layer", rows=32, columns=256), grid=grid, size=grouping.size, ordered=False),
        bias=True,
    )
    layer.load_state_dict(packed | {"bias": noise(0, 32)})
    expected, x = layer(noise(0, 3, 256)), noise(0, 3, 256)
    torch.testing.assert_close(home(layer.to(DEVICE)(moved(x))), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("walk", WALKS)
def test_the_walk(walk: str, tmp_path: Path) -> None:
    family, scheme, calibration = WALKS[walk]
    ours, theirs = (run(recipe) for recipe in recipes(family, tmp_path, scheme, **calibration))
    assert all(check.passed for check in verify(theirs))
    errors = [[layer.error for layer in read_report(folder).layers] for folder in (ours, theirs)]
    assert errors[1] == pytest.approx(errors[0], rel=0.05)
    model: Any = AutoModelForCausalLM.from_pretrained(theirs)
    expected, judged = model(IDS).logits, perplexity(model, IDS)
    model.to(DEVICE)
    torch.testing.assert_close(home(model(moved(IDS)).logits), expected, rtol=1e-3, atol=1e-3)
    assert perplexity(model, IDS) == pytest.approx(judged, rel=1e-3)
    assert model.generate(moved(IDS), max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 23)
    torch.testing.assert_close(home(model.dequantize()(moved(IDS)).logits), expected, rtol=1e-3, atol=1e-3)


def test_the_same_run_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    _, recipe = recipes("llama", tmp_path, {"solver": "feedback", "estimator": "hybrid"})
    first = (run(recipe) / "model.safetensors").read_bytes()
    assert (run(recipe, overwrite=True) / "model.safetensors").read_bytes() == first
