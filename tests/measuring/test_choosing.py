"""Critical layers and bits within a budget: measured, chosen, and then a recipe like any other."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from dashq import OutputError, PlanError, Recipe, load_recipe, make_plan, run
from dashq.measuring.choosing import choices_for, matching, settle, stored
from dashq.measuring.sensitivity import Analysis, analyze
from dashq.model.decoder import Model
from dashq.pipeline import open_model
from dashq.results.events import BlockDone, Event, Measuring
from dashq.results.fingerprint import inputs_of
from pico import WIDE, pico_model
from recipes import REGISTRY, TEXT, build_recipe, small_recipe, small_scheme

GROUPERS = [{"name": "contiguous", "size": size} for size in (8, 16)]
DOWN = {"match": ".*down_proj", "bits": 4}


@pytest.fixture(scope="module")
def analysis(model: Path) -> Analysis:
    recipe = build_recipe(model, model.with_name("measured"), budget={"bits_per_weight": 5, "groupers": GROUPERS})
    opened = open_model(recipe)
    return analyze(recipe, opened, choices_for(recipe, opened))


def settled(model: Path, analysis: Analysis, folder: Path, **changes: Any) -> tuple[Recipe, dict[str, tuple[str, ...]]]:
    recipe = build_recipe(model, folder / "out", **changes)
    result, selections = settle(recipe, open_model(recipe), analysis)
    return result, {selection.what: selection.layers for selection in selections}


def plans_of(recipe: Recipe) -> dict[str, Any]:
    return {plan.layer.name: plan for plan in make_plan(recipe, open_model(recipe).layers())}


def bits_per_weight(recipe: Recipe) -> float:
    plans = plans_of(recipe).values()
    return float(8 * sum(plan.bytes for plan in plans) / sum(plan.layer.weights for plan in plans))


names = st.lists(
    st.builds("{}.{}.{}{}".format, st.sampled_from("ab"), st.integers(0, 12), st.sampled_from("xy"), st.just("")),
    unique=True,
    min_size=1,
)


@given(names, st.data())
def test_a_pattern_matches_the_names_that_it_is_for_and_no_others(names: list[str], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.sampled_from(names), unique=True, min_size=1))
    pattern = matching([*chosen, "without.a.number"])
    assert {name for name in names if pattern.fullmatch(name)} == set(chosen)
    assert pattern.fullmatch("without.a.number")
    assert not pattern.fullmatch("without.a.number.1")


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


def test_overrides_for_weights_that_are_not_understood_last_until_the_choice(
    model: Path, analysis: Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "unclear_weights", lambda self: {"model.layers.0.odd": "a stack of unknown form"})
    kept = {"match": r"model\.layers\.0\.odd", "skip": True}
    recipe = build_recipe(model, tmp_path / "out", overrides=[kept], budget=5)
    opened = open_model(recipe)
    choices_for(recipe, opened)
    result, _ = settle(recipe, opened, analysis.model_copy(update={"asked": {}}))
    assert not result.measures


def test_what_an_override_decides_is_not_decided_again(model: Path, analysis: Analysis, tmp_path: Path) -> None:
    recipe = build_recipe(model, tmp_path / "out", overrides=[DOWN], budget=5)
    fresh = analysis.model_copy(update={"asked": {}})  # of another recipe, but of the same layers
    result, _ = settle(recipe, open_model(recipe), fresh)
    plans = plans_of(result)
    assert {plan.scheme.bits for name, plan in plans.items() if name.endswith("down_proj")} == {4}
    assert {plan.scheme.bits for name, plan in plans.items()} > {2, 4}
    assert bits_per_weight(result) <= 5


@pytest.mark.parametrize("by", ["sensitivity", "error", "snr"])
def test_the_most_critical_layers_fill_their_share(by: str, model: Path, analysis: Analysis, tmp_path: Path) -> None:
    overrides = [{"critical": {"share": 0.2, "by": by}, "bits": 4}]
    recipe, chosen = settled(model, analysis, tmp_path, overrides=overrides)
    ((what, critical),) = chosen.items()
    weights = {measured.name: measured.layer.weights for measured in analysis.layers}
    share = sum(weights[name] for name in critical) / sum(weights.values())
    assert what == f"override 1: critical by {by}, {share:.1%} of the weights"
    assert 0.2 - max(weights.values()) / sum(weights.values()) < share <= 0.2
    assert {name for name, plan in plans_of(recipe).items() if plan.scheme.bits == 4} == set(critical)

    def figure(name: str) -> float:
        measured = analysis.by_name[name]
        own = next(choice for choice in measured.choices if (choice.bits, choice.size) == (3, 16))
        assert measured.signal_to_noise
        noise = measured.signal_to_noise.off_diagonal[2]
        return {"sensitivity": own.sensitivity / measured.layer.weights, "error": own.error, "snr": noise}[by]

    left_out = [name for name in weights if name not in critical and weights[name] == min(weights.values())]
    assert min(map(figure, critical)) >= max(map(figure, left_out))


def test_critical_layers_are_among_those_that_match(model: Path, analysis: Analysis, tmp_path: Path) -> None:
    overrides = [{"match": ".*_proj", "solver": "rtn"}, {"match": ".*mlp.*", "critical": {"share": 0.01}, "bits": 4}]
    _, chosen = settled(model, analysis, tmp_path, overrides=overrides)
    ((what, critical),) = chosen.items()
    assert what.startswith("override 2: ")
    assert len(critical) == 1  # more than its share, but one at least
    assert ".mlp." in critical[0]


def test_critical_layers_can_be_left_as_they_are(model: Path, analysis: Analysis, tmp_path: Path) -> None:
    overrides = [{"critical": {"share": 0.1}, "skip": True}]
    recipe = build_recipe(model, tmp_path / "out", overrides=overrides)
    assert choices_for(recipe, open_model(recipe)).keys() == analysis.by_name.keys()
    result, chosen = settled(model, analysis, tmp_path, overrides=overrides)
    ((_, critical),) = chosen.items()
    assert plans_of(result).keys() == analysis.by_name.keys() - set(critical)


def test_critical_layers_keep_their_bits_in_a_budget(model: Path, analysis: Analysis, tmp_path: Path) -> None:
    overrides = [{"critical": {"share": 0.1}, "bits": 8}]
    recipe, chosen = settled(model, analysis, tmp_path, overrides=overrides, budget=5)
    critical = next(layers for what, layers in chosen.items() if "critical" in what)
    assert {name for name, plan in plans_of(recipe).items() if plan.scheme.bits == 8} == set(critical)
    assert bits_per_weight(recipe) <= 5


def test_layers_that_runtimes_fuse_are_chosen_together(tmp_path: Path) -> None:
    model = pico_model("llama", tmp_path / "model", **WIDE)
    scheme = small_recipe(model, tmp_path)["scheme"]
    fields = scheme | {"grouper": {"name": "contiguous", "size": 64}, "bits": 4, "solver": "rtn"}
    overrides = [{"critical": {"share": 0.3}, "solver": "irls"}]
    recipe = build_recipe(model, tmp_path / "out", scheme=fields, serializer="gptq", overrides=overrides, budget=3)
    opened = open_model(recipe)
    result, _ = settle(recipe, opened, analyze(recipe, opened, choices_for(recipe, opened)))
    schemes = {name: (plan.scheme.bits, plan.scheme.solver.name) for name, plan in plans_of(result).items()}
    assert len({bits for bits, _ in schemes.values()}) > 1
    for block in range(2):
        prefix = f"model.layers.{block}"
        assert len({schemes[f"{prefix}.self_attn.{name}_proj"] for name in "qkv"}) == 1
        assert schemes[f"{prefix}.mlp.gate_proj"] == schemes[f"{prefix}.mlp.up_proj"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"budget": 2.5},
            r"budget\.bits_per_weight: 2\.5 cannot be met: the least possible is 4, with 2 bits in groups of 16\. A "
            r"larger number is possible, or fewer budget\.bits, or larger groups in budget\.groupers",
        ),
        (
            {"budget": 4.1, "overrides": [{"critical": {"share": 0.3}, "bits": 8}]},
            r"budget\.bits_per_weight: 4\.1 cannot be met beside override 1, whose critical layers have 8 bits",
        ),
        (
            {"budget": 5, "overrides": [{"match": ".*", "bits": 8}]},
            r"the least possible is 10, with what overrides decide",
        ),
        (
            {"budget": {"bits_per_weight": 5, "groupers": {"name": "contiguous", "size": 32}}},
            r"q_proj: nothing that the budget offers is possible: group size 32 does not divide 48",
        ),
        ({"overrides": [{"match": "typo", "critical": {"share": 0.1}}]}, r"override 1 \('typo'\) matches no layer"),
        (
            {"overrides": [{"critical": {"share": 0.1}, "solver": "feedback"}]},
            r"override 1, for layers that are found critical: .*solver 'feedback' needs Coupled curvature",
        ),
        (
            {"overrides": [DOWN | {"skip": True}, {"match": ".*down_proj", "critical": {"share": 0.1}, "bits": 4}]},
            r"override 2: no layer is left to choose critical ones from",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(
    changes: dict[str, Any], message: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dashq.model.decoder.Model._read", lambda *arguments: pytest.fail("weights are read"))
    with pytest.raises(PlanError, match=message):
        run(build_recipe(model, tmp_path / "out", **changes))


def test_bits_that_a_format_cannot_hold_are_refused_where_they_are_asked_for(tmp_path: Path) -> None:
    model = pico_model("llama", tmp_path / "model", **WIDE)
    scheme = small_scheme(64)

    def refusal(**changes: Any) -> str:
        recipe = build_recipe(model, tmp_path / "out", scheme=scheme | {"bits": 4}, **changes)
        with pytest.raises(PlanError) as error:
            choices_for(recipe, open_model(recipe))
        return str(error.value)

    budget = {"bits_per_weight": 4, "bits": [3, 5, 4]}
    assert re.match("budget: no layer can have 5 bits: .*format mlx holds", refusal(budget=budget, serializer="mlx"))
    assert "one" in refusal(budget=4, serializer="metal")  # all layers alike
    critical = refusal(overrides=[{"critical": {"share": 0.1}, "bits": 8}], serializer="metal")
    assert re.match("override 1, for layers that are found critical: .*one", critical)
    recipe = build_recipe(model, tmp_path / "out", scheme=scheme | {"bits": 4}, budget=4, serializer="mlx")
    assert {plan.scheme.bits for plans in choices_for(recipe, open_model(recipe)).values() for plan in plans} == {
        2,
        3,
        4,
    }


def test_a_folder_that_must_not_be_replaced_is_refused_before_anything_is_measured(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(build_recipe(model, tmp_path / "out"))
    monkeypatch.setattr("dashq.model.decoder.Model._read", lambda *arguments: pytest.fail("weights are read"))
    with pytest.raises(OutputError, match="already holds a finished result"):
        run(build_recipe(model, tmp_path / "out", budget=5))


def test_a_users_file_with_the_name_of_some_formats_is_refused_before_anything_is_measured(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "analysis.json").write_text('{"versions": {"dashq": "0"}}')
    (tmp_path / "out" / "model.gguf").write_text("a user's own")
    monkeypatch.setattr("dashq.model.decoder.Model._read", lambda *arguments: pytest.fail("weights are read"))
    with pytest.raises(OutputError, match=r"no run wrote model\.gguf"):
        run(build_recipe(model, tmp_path / "out", budget=5))


MEASURED: dict[str, Any] = {"overrides": [{"critical": {"share": 0.1}, "solver": "closed_form"}], "budget": 4.6}


def test_the_budget_decides_about_embeddings_whose_entry_leaves_bits_open(model: Path, tmp_path: Path) -> None:
    budget = {"bits_per_weight": 6, "bits": [2, 3, 8]}
    for entry, possible in (({}, {2, 3, 8}), ({"bits": 5}, {5})):
        recipe = build_recipe(model, tmp_path / "out", budget=budget, embeddings=entry)
        opened = open_model(recipe)
        choices = choices_for(recipe, opened)
        assert {plan.scheme.bits for plan in choices["model.embed_tokens"]} >= possible
        result, _ = settle(recipe, opened, analyze(recipe, opened, choices))
        plans = {plan.layer.name: plan for plan in make_plan(result, opened.all_layers())}
        assert plans["model.embed_tokens"].scheme.bits in possible
        weights = sum(plan.layer.weights for plan in plans.values())
        assert 5 < 8 * sum(plan.bytes for plan in plans.values()) / weights <= 6


def test_a_run_measures_chooses_and_tells(model: Path, tmp_path: Path) -> None:
    heard: list[Event] = []
    out = run(build_recipe(model, tmp_path / "out", **MEASURED), heard.append)
    report = json.loads((out / "report.json").read_text())
    assert any(isinstance(event, Measuring) for event in heard)
    assert report["seconds"]["measure"] > 0
    assert report["totals"]["bits_per_weight"] <= 4.6
    solvers = {layer["name"]: layer["solver"] for layer in report["layers"]}
    critical, *budgets = report["chosen"]
    assert {name for name, solver in solvers.items() if solver == "closed_form"} == set(critical["layers"])
    bits = {layer["name"]: layer["bits"] for layer in report["layers"]}
    for chosen in budgets:
        assert {f"budget: {bits[name]} bits in groups of 16" for name in chosen["layers"]} == {chosen["what"]}
    assert sorted(name for chosen in budgets for name in chosen["layers"]) == sorted(bits)


def test_what_lies_beside_the_result_makes_it_again_without_measuring(model: Path, tmp_path: Path) -> None:
    out = run(build_recipe(model, tmp_path / "out", **MEASURED))
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["budget"] is None
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(recipe | {"output": str(tmp_path / "again")}))
    heard: list[Event] = []
    result = run(load_recipe(again, REGISTRY), heard.append)
    assert not any(isinstance(event, Measuring) for event in heard)
    one, other = (load_file(folder / "model.safetensors") for folder in (out, result))
    assert one.keys() == other.keys()
    assert all(tensor.equal(other[name]) for name, tensor in one.items())


def test_an_interrupted_run_goes_on_with_what_it_had_measured(model: Path, tmp_path: Path) -> None:
    recipe = build_recipe(model, tmp_path / "out", **MEASURED)
    whole = run(build_recipe(model, tmp_path / "whole", **MEASURED))

    def interrupt(event: Event) -> None:
        if isinstance(event, BlockDone):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, interrupt)
    measured = (tmp_path / "out" / "analysis.json").read_text()
    heard: list[Event] = []
    run(recipe, heard.append)
    assert not any(isinstance(event, Measuring) for event in heard)
    assert (tmp_path / "out" / "analysis.json").read_text() == measured
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, tmp_path / "out"))
    assert all(tensor.equal(other[name]) for name, tensor in one.items())


def test_a_measurement_answers_for_other_budgets_and_shares_and_for_nothing_else(model: Path, tmp_path: Path) -> None:
    def is_stored(**changes: Any) -> bool:
        recipe = build_recipe(model, tmp_path / "out", **changes)
        opened = open_model(recipe)
        return stored(recipe, choices_for(recipe, opened), inputs_of(opened, recipe)) is not None

    assert not is_stored(**MEASURED)
    run(build_recipe(model, tmp_path / "out", **MEASURED))
    assert is_stored(**MEASURED)
    assert is_stored(**MEASURED | {"budget": 5, "certificate_groups": 8})
    assert is_stored(overrides=[{"critical": {"share": 0.4, "by": "error"}, "bits": 4}])
    assert not is_stored(budget={"bits_per_weight": 5, "bits": [2, 8]})
    assert not is_stored(**MEASURED, scheme=small_scheme(solver="rtn"))
    assert not is_stored(**MEASURED, calibration=TEXT | {"samples": 2})
    (tmp_path / "out" / "analysis.json").write_text("{}")
    assert not is_stored(**MEASURED)
