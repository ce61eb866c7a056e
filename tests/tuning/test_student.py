"""The student predicts as the dense model of the same weights, has its gradients, and holds one block at a time."""

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from dashq import Recipe, run
from dashq.calibration.shell import shell_of
from dashq.data import Quantized
from dashq.errors import CheckpointError
from dashq.model.decoder import Model, block_matrices
from dashq.results.checkpoint import open_checkpoint
from dashq.results.report import digest, read_report
from dashq.tuning.student import Student
from dashq.tuning.values import NormGain, values_of
from format_results import FormatResults
from pico import MIXTURES, pico_model
from recipes import build_recipe, mixture_scheme, small_scheme
from tensors import noise
from tunings import change, quick_recipe, student_of

TOKENS = torch.arange(2 * 20).reshape(2, 20) * 7 % 300
# Tied and untied heads, biases, transposed weights, blocks that return a tuple, norms with biases, experts in stacks
# and routers with buffers, states of other kinds.
FAMILIES = ["llama", "llama-untied-biased", "gemma3", "gpt2", "bloom", "opt", "mixtral", "gpt_oss", "deepseek_v3"]


class Results:
    """Models of families and their results, made when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def model(self, family: str) -> Path:
        folder = self._folder / family
        return folder if folder.exists() else pico_model(family, folder)

    def recipe(self, family: str) -> Recipe:
        scheme = mixture_scheme() if family in MIXTURES else small_scheme(solver="rtn")
        return quick_recipe(self.model(family), self._folder / f"{family}-result", scheme=scheme)

    def result(self, family: str) -> Path:
        recipe = self.recipe(family)
        return recipe.output if recipe.output.exists() else run(recipe)

    def opened(self, family: str) -> tuple[Model, Student]:
        return student_of(self.recipe(family), self.result(family))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return Results(tmp_path_factory.mktemp("made"))


def dense(original: Path, result: Path) -> Any:
    """The original in transformers with the weights of a result."""
    network = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    matrices, source = block_matrices(network), open_checkpoint(result)
    with torch.no_grad():
        for name in source.layers:
            matrix = matrices[name]
            matrix.of(network.get_parameter(matrix.parameter)).copy_(source.quantized(name).dequantize())
    return network


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_and_gradients_are_those_of_the_dense_model(family: str, made: Results) -> None:
    model, student = made.opened(family)
    network = dense(made.model(family), made.result(family))
    logits = network(TOKENS).logits
    weigh = noise(3, *logits.shape)
    (logits * weigh).sum().backward()
    with shell_of(model, head=True) as shell:
        forward = student.forward(shell, TOKENS)
        with torch.enable_grad():
            states = forward.states.detach().requires_grad_()
            predicted = shell.predict(TOKENS, states, student.outside)
            torch.testing.assert_close(predicted, logits, rtol=1e-3, atol=1e-3)
            (predicted * weigh).sum().backward()
        assert states.grad is not None
        student.backward(forward, states.grad)
    expected: dict[tuple[str, str], Tensor | None] = {}
    matrices = block_matrices(network)
    for name in student.values:
        quantized = student.quantized(name)
        layer = values_of(name, quantized)
        layer.add_gradient(matrices[name].of(network.get_parameter(matrices[name].parameter).grad), quantized)
        expected |= {(name, tunable.kind): tunable.parameter.grad for tunable in layer.tunables}
    for name in student.norms:
        norm = NormGain(name, network.get_parameter(name).detach())
        norm.add_gradient(network.get_parameter(name).grad)
        expected[name, "norm"] = norm.tunable.parameter.grad
    tunables = {(tunable.name, tunable.kind): tunable.parameter for tunable in student.tunables}
    assert tunables.keys() == expected.keys()
    assert {kind for _, kind in tunables} == {"scale", "offset", "norm"}
    for key, parameter in tunables.items():
        gradient = expected[key]
        assert gradient is not None
        if parameter.grad is None:  # of an expert without tokens
            assert not gradient.any()
        else:
            size = float(gradient.abs().max())
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-2, atol=2e-3 * size, msg=str(key))


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_passes_give_the_same_states_and_gradients_twice(family: str, made: Results) -> None:
    model, student = made.opened(family)
    source = open_checkpoint(made.result(family))
    keeping = Student(model, source.serializer, source.layers.values(), source.tensors, keeps_all=True)
    for each in (student, keeping):
        change(each, 0.05)
    with shell_of(model) as shell:
        for _ in range(2):
            forward, kept = student.forward(shell, TOKENS), keeping.forward(shell, TOKENS)
            assert kept.states.equal(forward.states)
            assert (len(forward.kept), len(kept.kept)) == (0, len(model.blocks))
            for each, own in ((student, forward), (keeping, kept)):
                each.backward(own, noise(3, *forward.states.shape))
    for tunable, same in zip(student.tunables, keeping.tunables, strict=True):
        if tunable.parameter.grad is None:  # of an expert without tokens
            assert same.parameter.grad is None
        else:
            assert same.parameter.grad is not None
            assert tunable.parameter.grad.equal(same.parameter.grad), same.name


def test_only_what_is_to_learn_gets_gradients(made: Results) -> None:
    model, student = made.opened("llama")
    chosen = "model.layers.1.mlp.up_proj"
    for tunable in student.tunables:
        tunable.parameter.requires_grad_(tunable.name == chosen and tunable.kind == "offset")
    with shell_of(model) as shell:
        forward = student.forward(shell, TOKENS)
        student.backward(forward, torch.ones_like(forward.states))
    learned = {(t.name, t.kind) for t in student.tunables if t.parameter.grad is not None}
    assert learned == {(chosen, "offset")}


def test_layers_and_experts_that_are_not_quantized_are_as_they_are(tmp_path: Path) -> None:
    folder = pico_model("mixtral", tmp_path / "model", num_hidden_layers=2)
    skipped = [{"match": r".*\.gate_up_proj\.2", "skip": True}, {"match": r".*layers\.1\.self_attn.*", "skip": True}]
    recipe = build_recipe(folder, tmp_path / "out", dtype="float32", scheme=mixture_scheme(), overrides=skipped)
    model, student = student_of(recipe, run(recipe))
    assert not [name for name in student.values if "gate_up_proj.2" in name or "layers.1.self_attn" in name]
    with shell_of(model, head=True) as shell, torch.no_grad():
        predicted = shell.predict(TOKENS, student.forward(shell, TOKENS).states, student.outside)
        expected = dense(folder, tmp_path / "out")(TOKENS).logits
    torch.testing.assert_close(predicted, expected, rtol=1e-3, atol=1e-3)


def test_applied_changes_lie_in_the_tensors_and_reports_and_nothing_else_does(made: Results) -> None:
    _, student = made.opened("llama")
    source = open_checkpoint(made.result("llama"))
    before = {name: handle[...] for name, handle in source.tensors.items()}
    layers = read_report(source.folder).layers
    same, reports = student.applied(before, layers)
    assert reports == list(layers)
    assert same.keys() == before.keys()
    assert all(same[name].equal(tensor) for name, tensor in before.items())
    change(student, 0.05)
    changed, reports = student.applied(before, layers)
    assert changed.keys() == before.keys()
    kept = {name for name, tensor in before.items() if changed[name].equal(tensor)}
    assert {name for name in before if name.endswith(".codes")} <= kept
    packed = {f"{layer.name}.{key}" for layer in layers for key in ("scale", "offset")}
    assert before.keys() - kept == packed | student.norms.keys()
    after = replace(source, tensors={name: {...: tensor} for name, tensor in changed.items()})
    for layer, old in zip(reports, layers, strict=True):
        assert layer == replace(old, digest=digest(after.quantized(layer.name)))
        assert layer.digest != old.digest


def test_tensors_of_some_layers_alone_are_changed_alone(made: Results) -> None:
    _, student = made.opened("llama")
    layer = read_report(made.result("llama")).layers[0]
    change(student, 0.05)
    changed, reports = student.applied({f"{layer.name}.codes": torch.empty(0)}, [layer])
    assert {name.rpartition(".")[0] for name in changed} == {layer.name}
    assert [report.name for report in reports] == [layer.name]


def test_one_blocks_weights_are_in_memory_at_a_time(made: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    model, student = made.opened("llama")
    earlier: list[weakref.ref[Tensor]] = []
    weights = Student._weights

    def watched(self: Student, index: int, layers: dict[str, Quantized] | None = None) -> dict[str, Tensor]:
        assert not [reference for reference in earlier if reference() is not None]
        own = weights(self, index, layers)
        earlier[:] = [weakref.ref(tensor) for tensor in own.values() if tensor.dim() > 1]
        assert earlier
        return own

    monkeypatch.setattr(Student, "_weights", watched)
    with shell_of(model) as shell:
        forward = student.forward(shell, TOKENS)
        student.backward(forward, torch.ones_like(forward.states))
    assert not [reference for reference in earlier if reference() is not None]


@pytest.mark.parametrize(
    "label", ["dashq", "mlx", "compressed-tensors", "compressed-tensors-integer", "gptq", "Q2_K", "Q3_K", "Q4_1"]
)
def test_a_student_keeps_scales_and_offsets_and_no_codes(label: str, results: FormatResults, tmp_path: Path) -> None:
    recipe = build_recipe(results.model, tmp_path / "out")
    _, student = student_of(recipe, results[label])
    groups = sum(values._shape.numel() if hasattr(values, "_shape") else values._scale.numel()  # type: ignore[attr-defined]
                 for values in student.values.values())  # fmt: skip
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for values in student.values.values()
        for tensor in vars(values).values()
        if isinstance(tensor, Tensor)
    }
    assert sum(storages.values()) <= 16 * groups  # scale, offset, and the change of each, in float32


def test_a_missing_tensor_is_named(made: Results) -> None:
    model, _ = made.opened("llama")
    source = open_checkpoint(made.result("llama"))
    rest = {name: handle for name, handle in source.tensors.items() if name != "model.layers.0.mlp.up_proj.scale"}
    with pytest.raises(CheckpointError, match=r"lacks the tensor model\.layers\.0\.mlp\.up_proj\.scale$"):
        Student(model, source.serializer, source.layers.values(), rest)
