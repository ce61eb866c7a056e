"""Plans know which numbers a tuner will change, and refuse one that changes none."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dashq import PluginError, Tunable, run
from dashq.model.decoder import Model
from dashq.quantizing.opening import open_model, plan_model
from dashq.results.checkpoint import open_checkpoint
from dashq.strategies import Serializer
from dashq.tuning.planned import keeps_all, kept_bytes, norm_gains, optimizer_for, planned_tunables
from dashq.tuning.student import Student
from dashq_plugins.tuners.distill import Distill
from recipes import build_recipe, small_scheme

FORMATS: dict[str, dict[str, Any]] = {
    "real zeros": {},
    "whole zeros": {"serializer": "gptq", "scheme": small_scheme(16, bits=4, solver="rtn")},
    "symmetric": {
        "serializer": {"name": "gptq", "zero": "symmetric"},
        "scheme": small_scheme(16, bits=4, solver="rtn"),
    },
    "super-blocks": {"serializer": "gguf", "scheme": small_scheme(16, bits=2, solver="k_quant")},
    "super-blocks with signs": {"serializer": "gguf", "scheme": small_scheme(16, bits=3, solver="k_quant")},
}


def described(tunables: Sequence[Tunable]) -> list[tuple[str, str, torch.Size]]:
    return [(tunable.kind, tunable.name, tunable.parameter.shape) for tunable in tunables]


def student_of(folder: Path, model: Model, serializer: Serializer) -> Student:
    source = open_checkpoint(folder)
    return Student(model, serializer, source.layers.values(), source.tensors)


@pytest.mark.parametrize("changes", FORMATS.values(), ids=FORMATS)
def test_the_planned_tunables_are_those_of_the_result(
    changes: dict[str, Any], wide_model: Path, tmp_path: Path
) -> None:
    recipe = build_recipe(wide_model, tmp_path / "out", **changes)
    model = open_model(recipe)
    planned = planned_tunables(model, [plan.stored for plan in plan_model(recipe, model)])
    assert all(tunable.parameter.device.type == "meta" for tunable in planned)
    student = student_of(run(recipe), model, recipe.serializer)
    assert sorted(described(planned)) == sorted(described(student.tunables))


def test_passes_are_kept_where_their_weights_codes_and_activations_fit_into_an_eighth_of_the_free_memory(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = build_recipe(model, tmp_path / "out", dtype="float32")
    opened = open_model(recipe)
    layers = [plan.stored for plan in plan_model(recipe, opened)]
    tuner = Distill(samples=9, batch=3, sequence_length=50)
    weights = sum(layer.layer.weights for layer in layers)
    sides = sum(layer.layer.rows + layer.layer.columns for layer in layers)
    held = kept_bytes(opened, layers, tuner)
    assert held == 4 * weights + weights + 4 * 50 * sides  # of one sample
    for free, kept in ((8 * held, True), (8 * held - 1, False)):
        monkeypatch.setattr("dashq.tuning.planned.free_memory", lambda device, free=free: free)
        assert keeps_all(opened, layers, tuner) == kept
        assert not keeps_all(opened, layers, tuner, processes=2)


def test_gains_of_norms_are_vectors_of_modules_that_are_called_norms(model: Path, tmp_path: Path) -> None:
    names = norm_gains(open_model(build_recipe(model, tmp_path / "out")))
    assert "model.norm.weight" in names
    assert {name.split(".")[-2] for name in names} == {"input_layernorm", "post_attention_layernorm", "norm"}


class TakesWhatIsItsOwn(Distill):
    name = "takes_what_is_its_own"

    def optimizer(self, tunables: Sequence[Tunable]) -> torch.optim.Optimizer:
        return torch.optim.SGD([tunables[0].parameter, torch.zeros(3, requires_grad=True)])


class TakesOthers(Distill):
    name = "takes_others"

    def optimizer(self, tunables: Sequence[Tunable]) -> torch.optim.Optimizer:
        return torch.optim.SGD([torch.zeros(3, requires_grad=True)])


def test_the_changed_ones_are_those_that_the_optimizer_takes() -> None:
    tunables = [Tunable(kind, "layer", torch.nn.Parameter(torch.zeros(2))) for kind in ("scale", "offset", "norm")]
    _, changed = optimizer_for(Distill(offsets=0), tunables)
    assert [tunable.kind for tunable in changed] == ["scale", "norm"]
    with pytest.raises(PluginError, match="'takes_what_is_its_own': its optimizer has to change parameters of the tun"):
        optimizer_for(TakesWhatIsItsOwn(), tunables)
    with pytest.raises(PluginError, match="'takes_others' changes none of what can be tuned here, scales, offsets, no"):
        optimizer_for(TakesOthers(), tunables)
    with pytest.raises(PluginError, match="'distill' changes none of what can be tuned here, offsets: "):
        optimizer_for(Distill(offsets=0), tunables[1:2])


def test_a_tuner_that_would_change_nothing_is_refused_while_planning(wide_model: Path, tmp_path: Path) -> None:
    symmetric = {**FORMATS["symmetric"], "tuner": {"name": "distill", "scales": 0, "norms": 0}}
    recipe = build_recipe(wide_model, tmp_path / "out", **symmetric)
    with pytest.raises(PluginError, match="'distill' changes none of what can be tuned here, scales, norms"):
        plan_model(recipe, open_model(recipe))
