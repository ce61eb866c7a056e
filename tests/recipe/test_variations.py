"""The variations of a sweep are all combinations of values, each with a name for its folder."""

import re
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dashq import UsageError
from dashq.recipe.variations import in_words, variations


def test_every_combination_is_one_and_the_last_axis_changes_fastest() -> None:
    every = variations(["scheme.bits=2,3", "scheme.estimator=diagonal,hybrid"])
    assert [variation.name for variation in every] == [
        "bits-2_estimator-diagonal",
        "bits-2_estimator-hybrid",
        "bits-3_estimator-diagonal",
        "bits-3_estimator-hybrid",
    ]
    assert every[1].values == {"scheme.bits": 2, "scheme.estimator": "hybrid"}
    assert every[1].settings == ["scheme.bits=2", 'scheme.estimator="hybrid"']


def test_values_are_yaml() -> None:
    every = variations(["scheme.solver=irls,{name: irls, p: 0.7}", "budget=null,2.5"])
    assert [variation.name for variation in every] == [
        "solver-irls_budget-null",
        "solver-irls_budget-2.5",
        "solver-irls-p-0.7_budget-null",
        "solver-irls-p-0.7_budget-2.5",
    ]
    assert every[3].values == {"scheme.solver": {"name": "irls", "p": 0.7}, "budget": 2.5}


def test_entries_whose_last_keys_are_the_same_are_told_apart() -> None:
    assert variations(["scheme.bits=2", "overrides.0.bits=4"])[0].name == "scheme.bits-2_overrides.0.bits-4"


def test_values_that_differ_in_signs_alone_have_names_of_their_own() -> None:
    assert [variation.name for variation in variations(["model=a/b,a-b"])] == ["model-a-b", "model-a-b_2"]


@pytest.mark.parametrize(
    ("axes", "reason"),
    [
        (["scheme.bits"], r"--vary scheme\.bits: expected key=value,value, such as scheme\.bits=2,3"),
        (["scheme.bits="], r"expected key=value,value"),
        (["=2"], r"expected key=value,value"),
        (["scheme.bits=2,2"], r"the same value stands there twice"),
        (["scheme.solver={name"], r"the values are not valid YAML"),
        (["scheme.bits=2", "scheme.bits=3"], r"--vary names an entry twice"),
    ],
)
def test_mistakes_are_told_with_a_way_out(axes: list[str], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        variations(axes)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text("abc xyz./é", min_size=1, max_size=6),
    lambda inner: st.dictionaries(st.sampled_from(["name", "p", "size"]), inner, min_size=1, max_size=2),
    max_leaves=4,
)


@given(st.lists(VALUES, min_size=1, max_size=4, unique_by=repr))
def test_settings_say_the_values_again_and_names_are_those_of_folders(values: list[Any]) -> None:
    listed = ",".join(yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip() for value in values)
    if any(value in values[:index] for index, value in enumerate(values)):
        return  # True and 1 are equal
    every = variations([f"scheme.solver={listed}"])
    assert [yaml.safe_load(variation.settings[0].partition("=")[2]) for variation in every] == values
    names = [variation.name for variation in every]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[\w.-]+", name) for name in names)


def test_strategies_are_in_words_as_plans_have_them() -> None:
    assert in_words({"name": "irls", "p": 0.7, "preset": None}) == "irls(p=0.7, preset=null)"
    assert in_words({"name": "irls"}) == in_words("irls") == "irls"
    assert in_words([2, 3]) == "[2, 3]"
