"""Other ways to store layers, what each is refused for, and layers that are decided about together."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashq import PlanError, make_plan
from dashq.measuring.alternatives import (
    alternatives_of,
    matching,
    refuse_parted_stacks,
    storable_alike,
    stored_as,
    units_of,
)
from dashq.quantizing.opening import open_model
from gguf_results import SIZES
from pico import WIDE, pico_model
from recipes import build_recipe, small_scheme

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


def test_every_layer_has_what_its_width_allows_and_a_reason_for_the_rest(model: Path, tmp_path: Path) -> None:
    groupers = [{"name": "contiguous", "size": size} for size in (16, 20)]
    recipe = build_recipe(model, tmp_path / "out", budget={"bits_per_weight": 5, "groupers": groupers})
    assert recipe.budget
    plans = make_plan(recipe, open_model(recipe).layers())
    alternatives = alternatives_of(recipe, plans, (2, 3, 9), recipe.budget.groupers)
    assert alternatives.keys() == {plan.layer.name for plan in plans}
    for plan in plans:
        own = alternatives[plan.layer.name]
        sizes = [size for size in (16, 20) if plan.layer.columns % size == 0]
        assert [(other.scheme.bits, other.size) for other in own.plans] == [(b, s) for b in (2, 3) for s in sizes]
        assert {other.layer for other in own.plans} == {plan.layer}
        assert 9 in own.refusals


@pytest.mark.parametrize("serializer", ["gguf", "mlx", "dashq"])
def test_experts_of_one_stack_are_one_unit_where_the_format_has_one_type_for_them(
    serializer: str, tmp_path: Path
) -> None:
    model = pico_model("mixtral", tmp_path / "model", **SIZES)
    scheme = small_scheme(32, bits=8, router="routed")
    recipe = build_recipe(model, tmp_path / "out", scheme=scheme, serializer=serializer)
    plans = make_plan(recipe, open_model(recipe).layers())
    layers = [plan.layer for plan in plans]
    units = units_of(recipe, layers)
    if serializer == "dashq":
        assert units == [[layer.name] for layer in layers]
        return
    stacks = [f"model.layers.{block}.mlp.experts.{part}" for block in (0, 1) for part in ("gate_up_proj", "down_proj")]
    assert [unit for unit in units if len(unit) > 1] == [[f"{stack}.{e}" for e in range(4)] for stack in stacks]
    refuse_parted_stacks(recipe, plans, {name for unit in units[:-1] for name in unit})
    with pytest.raises(PlanError, match=rf"{stacks[0]}\.1: .* one type for all 4 experts .* these only 3 are left to"):
        refuse_parted_stacks(recipe, plans, {f"{stacks[0]}.{expert}" for expert in (1, 2, 3)})


def test_layers_that_runtimes_fuse_are_one_unit_and_stored_alike(tmp_path: Path) -> None:
    model = pico_model("llama", tmp_path / "model", **WIDE)
    recipes = {
        name: build_recipe(model, tmp_path / name, scheme=small_scheme(64, bits=4), serializer=name)
        for name in ("gptq", "dashq")
    }
    plans = make_plan(recipes["gptq"], open_model(recipes["gptq"]).layers())
    names = [plan.layer.name for plan in plans]
    layers = [plan.layer for plan in plans]
    assert units_of(recipes["dashq"], layers) == [[name] for name in names]
    units = units_of(recipes["gptq"], layers)
    assert sorted(len(unit) for unit in units) == [1, 1, 1, 1, 2, 2, 3, 3]
    offers = {name: own.plans for name, own in alternatives_of(recipes["gptq"], plans, (3, 4, 8)).items()}
    unit = max(units, key=len)
    ways = storable_alike(unit, offers)
    assert [len({stored_as(plan) for plan in way}) for way in ways] == [1] * len(ways)
    assert [[plan.layer.name for plan in way] for way in ways] == [unit] * len(ways)
    with pytest.raises(
        PlanError, match="the format wants these layers alike, and the budget offers nothing that all can be"
    ):
        storable_alike(unit, offers | {unit[0]: offers[unit[0]][:1], unit[1]: offers[unit[1]][1:]})
