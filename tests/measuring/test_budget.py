"""A budget is kept, used up, and refused where it cannot be met; what overrides decide it leaves alone."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from choices import GROUPERS, bits_per_weight, plans_of, settled
from dashq import Grid, PlanError, make_plan, run
from dashq.measuring.analysis import Analysis
from dashq.measuring.choosing import choices_for, settle
from dashq.measuring.sensitivity import analyze
from dashq.quantizing.opening import open_model
from dashq.results.verify import verify
from gguf_results import SIZES
from pico import WIDE, pico_model
from recipes import build_recipe, small_scheme

DOWN = {"match": ".*down_proj", "bits": 4}


@pytest.mark.parametrize("budget", [4.0, 4.321, 5, 6])
def test_a_budget_is_kept_and_used_up(budget: float, model: Path, analysis: Analysis, tmp_path: Path) -> None:
    recipe, _ = settled(model, analysis, tmp_path, budget=budget)
    assert not recipe.measures
    smallest_step = 8 * min(c.bytes for la in analysis.layers for c in la.choices) / 3 / (3 * 18432)
    assert budget - smallest_step < bits_per_weight(recipe) <= budget


def test_more_choices_and_more_budget_never_cost_more(model: Path, analysis: Analysis, tmp_path: Path) -> None:
    def cost(**budget: Any) -> float:
        recipe, _ = settled(model, analysis, tmp_path, budget=budget)
        layers = analysis.by_name
        choices = [layers[name].choice(plan) for name, plan in plans_of(recipe).items()]
        return sum(choice.sensitivity for choice in choices if choice)

    assert cost(bits_per_weight=5, groupers=GROUPERS) <= cost(bits_per_weight=5) <= cost(bits_per_weight=5, bits=3)
    assert cost(bits_per_weight=5.5) < cost(bits_per_weight=5)


def test_what_an_override_decides_is_not_decided_again(model: Path, analysis: Analysis, tmp_path: Path) -> None:
    recipe = build_recipe(model, tmp_path / "out", overrides=[DOWN], budget=5)
    fresh = analysis.model_copy(update={"asked": {}})  # of another recipe, but of the same layers
    result, _ = settle(recipe, open_model(recipe), fresh)
    plans = plans_of(result)
    assert {plan.scheme.bits for name, plan in plans.items() if name.endswith("down_proj")} == {4}
    assert {plan.scheme.bits for name, plan in plans.items()} > {2, 4}
    assert bits_per_weight(result) <= 5


def test_the_budget_decides_about_embeddings_whose_entry_leaves_bits_open(model: Path, tmp_path: Path) -> None:
    """Embeddings of their own bits do not count: blocks have what the budget says."""
    budget = {"bits_per_weight": 6, "bits": [2, 3, 8]}
    for entry, possible in (({}, {2, 3, 8}), ({"bits": 5}, {5})):
        recipe = build_recipe(model, tmp_path / "out", budget=budget, embeddings=entry)
        opened = open_model(recipe)
        choices = choices_for(recipe, opened)
        assert {plan.scheme.bits for plan in choices["model.embed_tokens"]} >= possible
        result, _ = settle(recipe, opened, analyze(recipe, opened, choices))
        plans = {plan.layer.name: plan for plan in make_plan(result, opened.all_layers())}
        assert plans["model.embed_tokens"].scheme.bits in possible
        counted = [plan for plan in plans.values() if plan.layer.role == "linear" or not entry]
        assert 5 < 8 * sum(plan.bytes for plan in counted) / sum(plan.layer.weights for plan in counted) <= 6


def test_bits_that_a_format_cannot_hold_are_refused_where_they_are_asked_for(tmp_path: Path) -> None:
    model = pico_model("llama", tmp_path / "model", **WIDE)
    scheme = small_scheme(64)

    def refusal(**changes: Any) -> str:
        recipe = build_recipe(model, tmp_path / "out", scheme=scheme | {"bits": 4}, **changes)
        with pytest.raises(PlanError) as error:
            choices_for(recipe, open_model(recipe))
        return str(error.value)

    budget = {"bits_per_weight": 4, "bits": [3, 7, 4]}
    assert re.match("budget: no layer can have 7 bits: .*format mlx holds", refusal(budget=budget, serializer="mlx"))
    assert "one" in refusal(budget=4, serializer="metal")  # all layers alike
    critical = refusal(overrides=[{"critical": {"share": 0.1}, "bits": 8}], serializer="metal")
    assert re.match("override 1, for layers that are found critical: .*one", critical)
    recipe = build_recipe(model, tmp_path / "out", scheme=scheme | {"bits": 4}, budget=4, serializer="mlx")
    assert {plan.scheme.bits for plans in choices_for(recipe, open_model(recipe)).values() for plan in plans} == {
        2,
        3,
        4,
    }


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture whose experts differ, of widths that plain blocks of GGUF have room for."""
    return pico_model("mixtral", tmp_path_factory.mktemp("mixture"), torch.float16, **SIZES)


@pytest.mark.parametrize("serializer", ["gguf", "dashq"])
def test_experts_of_a_stack_of_a_gguf_file_are_chosen_together(serializer: str, mixture: Path, tmp_path: Path) -> None:
    """The others may differ, and do."""
    scheme = small_scheme(32, bits=4, router="routed")
    if serializer == "gguf":
        scheme["type"] = "Q4_1"
    budget = {"bits_per_weight": 5.6, "bits": [4, 5, 8]}
    recipe = build_recipe(mixture, tmp_path / "out", scheme=scheme, serializer=serializer, budget=budget)
    opened = open_model(recipe)
    choices = choices_for(recipe, opened)
    result, _ = settle(recipe, opened, analyze(recipe, opened, choices))
    stacks: dict[str, set[Grid]] = defaultdict(set)
    for name, plan in plans_of(result).items():
        if plan.layer.stack:
            stacks[name.rpartition(".")[0]].add(plan.grid)
    assert len(stacks) == 4
    assert ({len(grids) for grids in stacks.values()} == {1}) == (serializer == "gguf")
    assert 5 < bits_per_weight(result) <= 5.6
    if serializer == "gguf":
        assert all(check.passed for check in verify(run(result), "gguf"))


def test_a_budget_for_some_experts_of_a_stack_is_refused_before_anything_is_measured(
    mixture: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "scheme": small_scheme(32, bits=8, router="routed"),
        "serializer": "gguf",
        "budget": {"bits_per_weight": 6, "bits": [4, 5, 8]},
        "overrides": [{"match": ".*experts.down_proj.3", "bits": 8}],
    }
    recipe = build_recipe(mixture, tmp_path / "out", **changes)
    with pytest.raises(PlanError, match=r"down_proj\.0: format gguf has one type for all 4 .* only 3 are left to"):
        choices_for(recipe, open_model(recipe))
