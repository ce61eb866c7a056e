"""Results beside each other: only what differs of their recipes, and all figures."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dashq import CheckpointError
from dashq.results.comparison import (
    bits_of_layers,
    flat,
    judged_alike,
    read_finished,
    sections,
    types_of_layers,
    worst_layers,
)
from pages import finished
from recipes import REGISTRY


def test_of_recipes_only_entries_that_differ_are_shown() -> None:
    one = finished("one", recipe={"scheme": {"bits": 2, "solver": {"name": "rtn"}}, "overrides": []})
    two = finished(
        "two", recipe={"scheme": {"bits": 2, "solver": {"name": "irls", "steps": 3}}, "overrides": [{"bits": 4}]}
    )
    assert sections([one, two], REGISTRY.serializers)["recipe"] == {
        "scheme.solver": ["rtn", "irls"],
        "scheme.solver.steps": ["–", "3"],
        "overrides.bits": ["–", "4"],
    }
    assert "recipe" not in sections([one, one], REGISTRY.serializers)


def test_of_several_overrides_each_says_what_it_sets() -> None:
    overrides = [{"match": "x" * 50, "bits": 4, "solver": None}, {"match": ".*v_proj", "solver": {"name": "irls"}}]
    rows = sections([finished("one"), finished("two", recipe={"overrides": overrides})], REGISTRY.serializers)["recipe"]
    assert rows == {"overrides": ["–", f"match {'x' * 38} …, bits 4; match .*v_proj, solver irls"]}


def test_entries_of_a_recipe_have_dotted_names_and_strategies_their_own() -> None:
    recipe = {"scheme": {"solver": {"name": "irls", "steps": 3}}, "dataset": [{"name": "pydoc", "chat": False}]}
    assert dict(flat(recipe)) == {
        "scheme.solver": "irls",
        "scheme.solver.steps": 3,
        "dataset": "pydoc",
        "dataset.chat": False,
    }
    assert dict(flat({"budget": None, "overrides": [{"bits": 2}, {"bits": 3}]})) == {
        "budget": None,
        "overrides": [{"bits": 2}, {"bits": 3}],
    }


def test_sizes_figures_times_and_errors_stand_beside_each_other() -> None:
    one, two = finished("one"), finished("two", judgement=None, tuned=None)
    tables = sections([one, two], REGISTRY.serializers)
    assert list(tables) == ["size", "predictions", "layers", "seconds", "worst layers"]
    assert tables["size"]["weights on disk, MB"] == ["40.0", "40.0"]
    assert tables["predictions"]["divergence (KL), nats per token"] == ["0.250 ± 0.010", "–"]
    assert tables["layers"]["divergence after tuning"] == ["0.25", "–"]
    assert tables["seconds"]["in all"] == ["10", "10"]


def test_the_worst_layers_are_those_of_any_result() -> None:
    one, two = finished("one", blocks=2), finished("two", blocks=3)
    rows = sections([one, two], REGISTRY.serializers, worst=4)["worst layers"]
    assert next(iter(rows)) == worst_layers(two.report, 1)[0].name == "model.layers.2.mlp.down_proj"
    assert rows["model.layers.2.mlp.down_proj"] == ["–", "0.032 at 4 bits"]
    assert rows["model.layers.1.mlp.down_proj"] == ["0.022 at 3 bits"] * 2
    assert len(rows) == 4


def test_figures_on_different_texts_are_told_apart() -> None:
    one = finished("one")
    judgement = one.report.judgement
    assert judgement
    assert judged_alike([one, finished("two", judgement=replace(judgement, original_perplexity=10.1))])
    assert not judged_alike([one, finished("two", judgement=replace(judgement, original_perplexity=14.0))])
    assert not judged_alike([one, finished("two", judgement=replace(judgement, tokens=7))])
    assert judged_alike([one, finished("two", judgement=None)])


def test_types_are_told_beside_bits_in_the_words_of_the_format() -> None:
    """Layers have 2, 3, 4 and 2 bits; those of 3 are of a type that is not the usual one."""
    report = finished(blocks=4).report
    layers = tuple(replace(layer, type="IQ3_S" if layer.bits == 3 else None) for layer in report.layers)
    report = replace(report, layers=layers)
    types = types_of_layers(report, REGISTRY.serializers["gguf"]())
    assert types == [{2: "Q2_K", 3: "IQ3_S", 4: "Q4_K"}[layer.bits] for layer in layers]
    assert bits_of_layers(report, types) == "2 bits (Q2_K) in 6, 3 bits (IQ3_S) in 3, 4 bits (Q4_K) in 3"
    plain = finished(blocks=1).report
    assert (
        bits_of_layers(plain, types_of_layers(plain, REGISTRY.serializers["gguf"]())) == "2 bits (Q2_K) in all layers"
    )
    assert types_of_layers(plain, REGISTRY.serializers["dashq"]()) == types_of_layers(plain, None) == [None] * 3


def test_types_stand_beside_bits_where_a_format_has_types() -> None:
    layers = tuple(replace(layer, type="IQ3_S" if layer.bits == 3 else None) for layer in finished().report.layers)
    report = replace(finished().report, layers=layers)
    one, two = finished("one", recipe={"serializer": {"name": "gguf"}}), finished("two")
    tables = sections([replace(one, report=report), two], REGISTRY.serializers)
    plain = bits_of_layers(report)
    assert tables["size"]["bits of layers"] == [
        plain.replace("2 bits", "2 bits (Q2_K)").replace("3 bits", "3 bits (IQ3_S)").replace("4 bits", "4 bits (Q4_K)"),
        plain,
    ]
    for row in tables["worst layers"].values():
        bits = row[1].rpartition(" at ")[2]
        name = {"2 bits": "Q2_K", "3 bits": "IQ3_S", "4 bits": "Q4_K"}[bits]
        assert row[0] == f"{row[1]} ({name})"


def test_bits_are_told_in_words() -> None:
    assert bits_of_layers(finished(blocks=1).report) == "2 bits in all layers"
    assert bits_of_layers(finished(blocks=4).report) == "2 bits in 6, 3 bits in 3, 4 bits in 3"


def test_results_are_called_by_what_tells_them_apart(result: Path, tmp_path: Path) -> None:
    folders = [Path(shutil.copytree(result, tmp_path / name)) for name in ("a/out", "b/out", "b/other")]
    assert [one.name for one in read_finished(folders[:1])] == ["out"]
    assert [one.name for one in read_finished(folders)] == ["a/out", "b/out", "b/other"]


def test_a_folder_that_is_no_result_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no finished result of dashq: it has no report\.json"):
        read_finished([tmp_path])
