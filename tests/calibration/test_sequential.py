"""Layers that know what quantized layers before them change: the order, what each one sees, and what it aims at."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dashq import Curvature, Diagonal, Estimator, Full, Layer, make_plan, run
from dashq.calibration.layers import Observation
from dashq.calibration.sequential import corrected_target, sequential_stages
from dashq.calibration.stream import Stream
from dashq.calibration.tokens import draw
from dashq.quantizing.opening import open_model
from pico import pico_model
from recipes import TEXT, build_recipe
from tensors import noise

STAGES = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


class SeenEstimator(Estimator):
    """The diagonal, which remembers what each layer saw."""

    name = "seen"
    memory: ClassVar[dict[str, Tensor]] = {}

    def start(self, layer: Layer) -> tuple[str, Tensor]:
        return layer.name, torch.zeros(layer.columns)

    def update(self, state: tuple[str, Tensor], x: Tensor, token_weight: Tensor) -> tuple[str, Tensor]:
        return state[0], state[1] + token_weight @ x.square()

    def merge(self, state: tuple[str, Tensor], other: tuple[str, Tensor]) -> tuple[str, Tensor]:
        return state[0], state[1] + other[1]

    def finish(self, state: tuple[str, Tensor]) -> Diagonal:
        self.memory[state[0]] = state[1]
        return Diagonal(state[1])


def short(name: str) -> str:
    return name.split(".")[-1].removesuffix("_proj")


@torch.no_grad()
def test_a_block_calls_its_layers_in_stages(tmp_path: Path) -> None:
    recipe = build_recipe(pico_model("llama", tmp_path / "model"), tmp_path / "out")
    model = open_model(recipe)
    plans = make_plan(recipe, model.layers())
    stream = Stream(model, draw(recipe.calibration, model.tokenizer).samples)
    with model.block(0) as block:
        own_plans = [plan for plan in plans if plan.layer.name in block.linears]
        stages = sequential_stages(block, own_plans[::-1], stream)
    assert [[short(plan.layer.name) for plan in stage] for stage in stages] == [list(stage) for stage in STAGES]


@pytest.mark.parametrize("correction", [0.0, 0.5])
def test_in_sequence_each_layer_sees_all_quantized_layers_before_it(correction: float, tmp_path: Path) -> None:
    original = pico_model("llama", tmp_path / "model")
    text = TEXT | {"propagate": "sequential", "error_correction": correction}
    recipe = build_recipe(original, tmp_path / "out", dtype="float32", calibration=text)
    estimator = SeenEstimator()
    recipe = recipe.model_copy(update={"scheme": recipe.scheme.model_copy(update={"estimator": estimator})})
    result = opened(run(recipe)).dequantize()
    network = opened(original)
    tokens = draw(recipe.calibration, open_model(recipe).tokenizer).samples
    for index, layer in enumerate(network.model.layers):
        for stage in STAGES:
            modules = {f"{part}.{name}_proj" for part in ("self_attn", "mlp") for name in stage}
            here = {name: layer.get_submodule(name) for name, _ in layer.named_modules() if name in modules}
            first = next(iter(here))
            expected = squared_inputs(network, here[first], tokens)
            diagonal = estimator.memory[f"model.layers.{index}.{first}"]
            torch.testing.assert_close(diagonal, expected, rtol=1e-4, atol=1e-4)
            for name, module in here.items():
                module.weight.copy_(result.get_submodule(f"model.layers.{index}.{name}").weight)


def opened(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)


def squared_inputs(network: Any, module: torch.nn.Module, tokens: Tensor) -> Tensor:
    batches: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: batches.append(inputs[0].flatten(0, -2)))
    network(tokens)
    handle.remove()
    return torch.cat(batches).square().sum(0)


@given(st.integers(0, 999), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_correction_brings_outputs_nearer_to_those_of_the_original(
    seed: int, change: float, one: float, other: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, shift, w = (torch.randn(shape, generator=generator) for shape in ((60, 6), (60, 6), (3, 6)))
    changed = x + change * (shift + 0.5 * x.roll(1, dims=1))
    observation = Observation(Full(changed.T @ changed / 60), 60, input_shift=(x - changed).T @ changed / 60)

    def error(share: float) -> float:
        return float((x @ w.T - changed @ corrected_target(w, observation, share).T).square().sum())

    less, more = sorted((one, other))
    assert error(more) <= error(less) * (1 + 1e-4) + 1e-6


def test_a_diagonal_corrects_each_column_by_itself() -> None:
    x = torch.tensor([[1.0, 2.0], [1.0, -2.0]])
    changed = x * torch.tensor([0.5, 1.0])  # the first column arrives at half its size
    input_shift = (x - changed).T @ changed / 2
    observation = Observation(Diagonal(changed.square().mean(0)), 2, input_shift=input_shift)
    damping = 0.01 * float(changed.square().mean())
    expected = torch.tensor([[1 + 0.25 / (0.25 + damping), 1.0]])
    torch.testing.assert_close(corrected_target(torch.ones(1, 2), observation, 1.0), expected)


def test_what_was_shrunk_as_noise_is_shrunk_in_the_drift_too() -> None:
    h, input_shift, w = torch.eye(2), torch.tensor([[0.1, 0.2], [0.3, 0.4]]), torch.ones(1, 2)
    all_noise = corrected_target(w, Observation(Full(h, shrinkage=1.0), 9, input_shift=input_shift), 1.0)
    torch.testing.assert_close(
        all_noise, corrected_target(w, Observation(Diagonal(torch.ones(2)), 9, input_shift=input_shift), 1.0)
    )


@pytest.mark.parametrize("rows", [2, 9])
@pytest.mark.parametrize("below", [0.0, 1.5], ids=["definite", "indefinite"])
def test_the_correction_is_the_same_whichever_product_comes_first(rows: int, below: float) -> None:
    x, input_shift, w = noise(1, 40, 4), noise(2, 4, 4), noise(3, rows, 4)
    h = x.T @ x / 40 - below * torch.diag(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(4)
    expected = w + 0.5 * (w @ input_shift @ torch.linalg.inv(damped))
    corrected = corrected_target(w, Observation(Full(h), 40, input_shift=input_shift), 0.5)
    torch.testing.assert_close(corrected, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("curvature", [Full(torch.zeros(3, 3)), Diagonal(torch.zeros(3))])
def test_a_layer_that_is_given_only_zeros_keeps_its_weights(curvature: Curvature) -> None:
    w = noise(0, 2, 3)
    assert corrected_target(w, Observation(curvature, 9, input_shift=torch.zeros(3, 3)), 1.0).equal(w)


def test_without_drift_weights_stay_as_they_are() -> None:
    w = noise(0, 2, 3)
    assert corrected_target(w, Observation(Diagonal(torch.ones(3)), 9), 1.0) is w


def test_where_all_see_original_inputs_there_is_nothing_to_correct(tmp_path: Path) -> None:
    pico_model("llama", tmp_path / "model")
    results = [
        run(build_recipe(tmp_path / "model", tmp_path / str(share), calibration=TEXT | {"error_correction": share}))
        for share in (0.0, 0.5)
    ]
    one, other = (load_file(result / "model.safetensors") for result in results)
    assert all(tensor.equal(other[name]) for name, tensor in one.items())
