"""The card says what the result is made of, what it came to, and how it is opened."""

from dataclasses import replace
from typing import Any

import pytest
import yaml

from dashq.results.card import model_card, published
from dashq.results.report import Judgement, Report, Totals, Tuned, TuningCheck
from recipes import REGISTRY

RECIPE: dict[str, Any] = {
    "model": "org/some-model",
    "output": "out",
    "scheme": {"bits": 3, "grouper": {"name": "contiguous", "size": 16}},
    "calibration": {"dataset": [{"name": "c4 é", "weight": 1.0}]},
}
TOTALS = Totals(
    layers=21,
    weights=1_234_567,
    bits_per_weight=3.25,
    bytes_on_disk=1_660_000,
    mean_error=0.0123456,
    mean_minmax_error=0.04,
    mixtures=(),
    certificate=None,
)


JUDGEMENT = Judgement(
    tokens=1000, held_out=True, divergence=0.25, agreement=0.81, perplexity=12.0, original_perplexity=10.0
)


def card(serializer: str = "dashq", model: str = "org/some-model", **changes: Any) -> str:
    report = Report(totals=TOTALS, seconds={}, computed="on cpu in float32", versions={}, chosen=(), layers=())
    return model_card(RECIPE | {"model": model}, replace(report, **changes), REGISTRY.serializers[serializer]())


def test_its_front_matter_names_a_model_of_the_hub_and_each_tag_once() -> None:
    fronts = [yaml.safe_load(card(base_model=model).split("---\n")[1]) for model in ("org/some-model", None)]
    tags = ["dashq", "quantized"]
    assert fronts == [{"base_model": "org/some-model", "tags": tags}, {"tags": tags}]


@pytest.mark.parametrize("model", ["org/some-model", "/models/some-model", "/models/some-model/", "some-model"])
def test_its_title_is_the_last_part_of_the_models_name(model: str) -> None:
    assert "\n# some-model, quantized with dashq\n" in card(model=model)


def test_its_figures_are_the_totals_of_the_report() -> None:
    rows = dict(line.strip("|").split("|", 1) for line in card().splitlines() if line.startswith("| "))
    assert {name.strip(): value.strip() for name, value in rows.items()} == {
        "measured": "",
        "---": "---",
        "quantized layers": "21, 1,234,567 weights",
        "bits per weight": "3.250, scales and offsets included",
        "weights on disk": "1.7 MB",
        "mean weighted error": "0.01235 (min-max rounding: 0.04000)",
    }


def test_the_result_is_judged_beside_the_original_where_it_was() -> None:
    row = f"| beside the original | {JUDGEMENT} |"
    assert row in card(judgement=JUDGEMENT).splitlines()
    assert "beside the original" not in card()


TUNED = Tuned(
    tuner="some_tuner",
    samples=15_360,
    held_out=2048,
    checks=tuple(TuningCheck(step=step, divergence=1 - step / 100, loss=None) for step in (0, 30, 60)),
    changed={"scale": 1200, "norm": 64},
    note="it stopped early",
)


def test_a_tuned_result_is_called_so_and_its_errors_are_those_before() -> None:
    lines = card(tuned=TUNED).splitlines()
    assert f"| tuned | {TUNED} |" in lines
    assert "| mean weighted error before tuning | 0.01235 (min-max rounding: 0.04000) |" in lines
    assert "tun" not in card()


def test_of_a_tuners_texts_on_this_machine_it_shows_the_last_part() -> None:
    texts = [{"name": "/home/me/secret/text.txt"}, {"name": "wikitext2"}]
    recipe = published(RECIPE | {"tuner": {"name": "some_tuner", "dataset": texts}}, None)
    assert recipe["tuner"] == {"name": "some_tuner", "dataset": [{"name": "text.txt"}, {"name": "wikitext2"}]}
    without = {"name": "some_tuner", "dataset": None}
    assert published(RECIPE | {"tuner": without}, None)["tuner"] == without


def test_a_warning_stands_before_the_figures_where_the_model_is_destroyed() -> None:
    destroyed = replace(JUDGEMENT, divergence=None, agreement=0.01)
    text = card(judgement=destroyed)
    assert 0 < text.index(f"> **Warning:** {destroyed.warning}.") < text.index("| measured |")
    assert "Warning" not in card(judgement=JUDGEMENT)


def test_its_recipe_is_the_one_of_the_run() -> None:
    recipe = card(base_model="org/some-model").partition("## Recipe\n\n```yaml\n")[2].removesuffix("```\n")
    assert yaml.safe_load(recipe) == RECIPE
    assert list(yaml.safe_load(recipe)) == list(RECIPE)
    assert "c4 é" in recipe


@pytest.mark.parametrize("name", REGISTRY.serializers)
def test_how_it_is_opened_is_said_as_the_format_says_it(name: str) -> None:
    doc = REGISTRY.serializers[name].__doc__
    assert doc
    opening = card(name).partition("## How to open it\n\n")[2].partition("\n\n## Recipe")[0]
    assert opening.split() == doc.split()
