"""On a graphics processor everything lies there and gives what the CPU gives; the CPU pretends to be one."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from dashq import (
    DashqLinear,
    Diagonal,
    Grid,
    Grouping,
    Layer,
    LayerPlan,
    Quantized,
    Serializer,
    Solver,
    StoredLayer,
    make_plan,
    pipeline,
    run,
)
from dashq.calibration.observe import observe_block
from dashq.calibration.stream import Stream
from dashq.calibration.tokens import draw
from dashq.curvature import Curvature
from dashq.measuring.choosing import choices_for
from dashq.measuring.divergence import divergences
from dashq.measuring.evaluate import perplexity
from dashq.measuring.sensitivity import analyze
from dashq.quantizing import opening
from dashq.quantizing.layer import quantize_layer
from dashq.quantizing.opening import open_model
from dashq.solving import pieces
from dashq.solving.certificate import certify
from dashq.testing.comparison import equal, same
from devices import CPU, FORMATS, GRIDS, IDS, PAIRS, WALKS, full, grouping_of, home, moved, recipes
from pretend_device import DEVICE, pretended_device
from recipes import REGISTRY
from tensors import noise


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    for module in (pipeline, opening):
        monkeypatch.setattr(module, "choose_device", torch.device)
    # Pieces of another size are summed in another order.
    monkeypatch.setattr(pieces, "weights_in_a_piece", lambda weight, size, compiled: max(1, weight.numel() // 2))
    with pretended_device():
        yield


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("name", REGISTRY.estimators)
def test_estimators(name: str) -> None:
    estimator = REGISTRY.estimators[name]()
    x, weights = noise(0, 3000, 70), noise(0, 3000).abs()

    def learned(x: Tensor, weights: Tensor) -> Curvature:
        layer = Layer(name="layer", rows=1, columns=70)
        states = [
            estimator.update(estimator.start(layer), part, weight)
            for part, weight in zip(x.split(2048), weights.split(2048), strict=True)
        ]
        return estimator.finish(estimator.update(estimator.merge(*states), x[:100], weights[:100]))

    assert equal(home(learned(moved(x), moved(weights))), learned(x, weights))


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize(("solver", "grid"), PAIRS, ids=str)
def test_solvers(solver: Solver, grid: Grid) -> None:
    grouping = grouping_of(grid)
    weight = noise(0, 6, grouping.columns)
    curvature = full(grouping.columns) if solver.objective == "rows" else Diagonal(noise(0, grouping.columns).exp())
    expected = solver.solve(weight, curvature, grouping, grid)
    solution = solver.solve(moved(weight), moved(curvature), grouping, grid)
    assert equal(home(solution), expected)
    assert home(solution.dequantize(torch.bfloat16)).equal(expected.dequantize(torch.bfloat16))
    assert home(solution.zeros).equal(expected.zeros)
    if solver.objective == "groups":
        certificate = certify("layer", moved(weight), solution, moved(curvature), 3)
        assert certificate == certify("layer", weight, expected, curvature, 3)


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("device", [CPU, DEVICE], ids=str)
@pytest.mark.parametrize("name", ["closed_form", "feedback"])
def test_columns_in_an_order_that_lies_on_either_device(name: str, device: torch.device) -> None:
    grid, order = GRIDS[0], noise(0, 70).argsort()
    weight, curvature, solver = noise(0, 6, 70), full(70), REGISTRY.solvers[name]()
    solution = solver.solve(moved(weight), moved(curvature), grouping_of(grid, order.to(device)), grid)
    assert same(moved(solution, CPU), solver.solve(weight, curvature, grouping_of(grid, order), grid))


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("name", REGISTRY.groupers)
def test_groupers(name: str) -> None:
    grouper, weight, curvature = REGISTRY.groupers[name](), noise(0, 6, 128), Diagonal(noise(0, 128).exp())
    grouping = grouper.group(moved(weight), moved(curvature))
    assert equal(home(grouping), grouper.group(weight, curvature))
    assert home(grouping.join(grouping.split(moved(weight)))).equal(weight)


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("name", REGISTRY.routers)
def test_routers(name: str) -> None:
    probabilities = noise(0, 9, 4).softmax(-1)
    router, chosen = REGISTRY.routers[name](), probabilities > 0.3
    token_weights = router.token_weights(moved(probabilities), moved(chosen))
    assert home(token_weights).equal(router.token_weights(probabilities, chosen))


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize(("serializer", "grid"), FORMATS, ids=str)
def test_serializers_and_the_layers_that_they_hold(serializer: Serializer, grid: Grid) -> None:
    grouping = Grouping(columns=256, size=grid.super_blocks.size if grid.super_blocks else 32)
    solver = REGISTRY.solvers["k_quant" if grid.super_blocks else "rtn"]()
    quantized = solver.solve(noise(0, 32, 256), Diagonal(noise(0, 256).exp()), grouping, grid)
    packed, there = dict(serializer.pack(quantized)), moved(dict(serializer.pack(moved(quantized))), CPU)
    assert packed.keys() == there.keys()
    assert all(equal(there[name], tensor) for name, tensor in packed.items())
    unpacked = serializer.unpack(moved(packed), 256, grouping.size, grid)
    assert same(home(unpacked), quantized)
    layer = DashqLinear(
        serializer,
        StoredLayer(layer=Layer(name="layer", rows=32, columns=256), grid=grid, size=grouping.size, ordered=False),
        bias=True,
    )
    layer.load_state_dict(packed | {"bias": noise(0, 32)})
    expected, x = layer(noise(0, 3, 256)), noise(0, 3, 256)
    assert home(layer.to(DEVICE)(moved(x))).equal(expected)
    assert home(layer.dequantized(torch.float32)(moved(x))).equal(expected)


@pytest.mark.usefixtures("pretended", "sentences")
@pytest.mark.parametrize("walk", WALKS)
def test_the_walk(walk: str, tmp_path: Path) -> None:
    family, scheme, calibration = WALKS[walk]
    ours, theirs = (run(recipe) for recipe in recipes(family, tmp_path, scheme, **calibration))
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    model: Any = AutoModelForCausalLM.from_pretrained(theirs)
    expected, judged = model(IDS).logits, perplexity(model, IDS)
    model.to(DEVICE)
    assert home(model(moved(IDS)).logits).equal(expected)
    assert perplexity(model, IDS) == judged
    torch.testing.assert_close(home(model.dequantize()(moved(IDS)).logits), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("pretended")
def test_an_interrupted_walk_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dashq.results.shards.SHARD_BYTES", 1)

    class Interrupt(Exception):
        pass

    def interrupt(event: Any) -> None:
        if getattr(event, "index", None) == 0:
            raise Interrupt

    ours, theirs = recipes("llama", tmp_path, {"solver": "rtn"}, propagate="quantized", error_correction=0.5)
    run(ours)
    with pytest.raises(Interrupt):
        run(theirs, interrupt)
    run(theirs)
    written = [sorted(folder.glob("*.safetensors")) for folder in (ours.output, theirs.output)]
    assert len(written[0]) == 3
    assert [path.read_bytes() for path in written[0]] == [path.read_bytes() for path in written[1]]


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize(("family", "scheme"), [("llama", {"estimator": "full"}), ("mixtral", {"router": "routed"})])
def test_measuring(family: str, scheme: dict[str, Any], tmp_path: Path) -> None:
    analyses, losses = [], []
    for recipe in recipes(family, tmp_path, {"solver": "rtn"} | scheme):
        model, kept = open_model(recipe), dict[str, Quantized]()

        def keep(plan: LayerPlan, quantized: Quantized, kept: dict[str, Quantized] = kept) -> None:
            kept.setdefault(plan.layer.name, quantized)

        analyses.append(analyze(recipe, model, choices_for(recipe, model, bits=(2,)), keep=keep))
        network: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        first_layers = dict([*kept.items()][:3])
        losses.append(divergences(network.to(model.device), model.blocks, first_layers, IDS))
    assert analyses[0].layers == analyses[1].layers
    assert losses[0] == losses[1]


@pytest.mark.usefixtures("pretended")
@torch.no_grad()
def test_a_layer_that_its_block_never_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, recipe = recipes("llama", tmp_path, {"estimator": "full", "solver": "feedback"})
    model = open_model(recipe)
    plans = [plan for plan in make_plan(recipe, model.layers()) if "layers.0.mlp.up" in plan.layer.name]
    stream = Stream(model, draw(recipe.calibration, model.tokenizer).samples)
    with model.block(0) as block:
        monkeypatch.setattr(block.module.mlp, "forward", lambda x: x)
        observation = observe_block(block, plans, stream, one_pass=True)[plans[0].layer.name]
        quantized, report = quantize_layer(plans[0], block.weight(plans[0].layer.name).to(DEVICE), observation)
    assert observation.tokens == 0
    assert home(quantized).codes.any()
    assert report.fallbacks == ("3 of 3 groups of columns saw no input: treated as flat",)
