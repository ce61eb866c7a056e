"""Blocks are quantized one after the other, and later ones see what the recipe says."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dashq import run
from dashq.calibration.tokens import draw_for
from dashq.quantizing import walk
from dashq.quantizing.opening import open_model, plan_model
from dashq.quantizing.walk import OUTSIDE_LAYERS, Walk
from dashq.results.clock import Clock
from dashq.results.events import Event, LayerDone
from dashq.results.output import Output
from dashq.results.parts import Parts
from dashq.results.workplace import workplace
from family_results import FamilyResults
from recipes import TEXT, build_recipe, mixture_scheme


def test_blocks_see_quantized_blocks_only_when_the_recipe_says_so(model: Path, tmp_path: Path) -> None:
    def first_and_last(propagate: str) -> tuple[Tensor, Tensor]:
        recipe = build_recipe(model, tmp_path / propagate, calibration=TEXT | {"propagate": propagate})
        tensors = load_file(run(recipe) / "model.safetensors")
        return tensors["model.layers.0.self_attn.q_proj.scale"], tensors["model.layers.2.mlp.down_proj.scale"]

    first, last = first_and_last("original")
    first_again, last_again = first_and_last("quantized")
    assert torch.equal(first, first_again)
    assert not torch.equal(last, last_again)


def test_later_blocks_see_quantized_experts_when_the_recipe_says_so(families: FamilyResults, tmp_path: Path) -> None:
    model = families.model("mixtral")

    def offsets(propagate: str) -> tuple[Tensor, Tensor]:
        text = TEXT | {"propagate": propagate}
        recipe = build_recipe(
            model, tmp_path / propagate, calibration=text, scheme=mixture_scheme(solver="closed_form")
        )
        tensors = load_file(run(recipe) / "model.safetensors")
        name = "model.layers.{}.mlp.experts.gate_up_proj.1.scale"
        return tensors[name.format(0)], tensors[name.format(2)]

    first, last = offsets("original")
    first_again, last_again = offsets("quantized")
    assert first.equal(first_again)
    assert not last.equal(last_again)
    first_in_sequence, _ = offsets("sequential")  # behind the quantized attention of their own block
    assert not first.equal(first_in_sequence)


@torch.no_grad()
def test_parts_that_are_on_disk_are_restored_and_not_solved_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = build_recipe(model, tmp_path / "out", dtype="float32", embeddings={"bits": 4})
    opened = open_model(recipe)
    drawn, plans = draw_for(opened, recipe.calibration), plan_model(recipe, opened)
    heard: list[Event] = []

    def go(output: Output) -> tuple[list[str], dict[str, Tensor]]:
        """The names of the layers that were solved, and the weights that the blocks had in the end."""
        heard.clear()
        weights: dict[str, Tensor] = {}
        blocks = Walk.begin(recipe, opened, drawn, plans, Parts(output, output.clock), heard.append)
        for block in opened.walk():
            blocks.go_through(block)
            own = [plan.layer.name for plan in plans if plan.layer.block == block.name]
            weights |= {name: block.weight(name).clone() for name in own}
        blocks.quantize_outside(opened, drawn.samples)
        output.save()
        return [event.report.name for event in heard if isinstance(event, LayerDone)], weights

    with workplace(recipe.output, overwrite=False, format_files=recipe.format_files) as folder:
        output = Output(folder, recipe, {}, Clock(opened.device))
        solved, weights = go(output)
        assert sorted(solved) == sorted(plan.layer.name for plan in plans)
        assert output.finished_parts >= {*opened.blocks, OUTSIDE_LAYERS}
        monkeypatch.setattr(walk, "LayerWork", lambda *arguments: pytest.fail("solved again"))
        again, restored = go(Output(folder, recipe, {}, Clock(opened.device)))
    assert not again
    assert weights.keys() == restored.keys()
    assert all(weight.equal(restored[name]) for name, weight in weights.items())
