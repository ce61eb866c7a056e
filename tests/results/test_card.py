"""The card says what the result is made of, what it came to, and how it is opened."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import yaml

from dashq.model.location import Location
from dashq.quantizing.opening import open_model
from dashq.results.card import Origin, for_repository, model_card, origin_of, published
from dashq.results.judged import Continuation, Judgement
from dashq.results.report import Report, Totals
from dashq.results.tuned import Tuned, TuningCheck
from layer_reports import layer_report
from pico import pico_model
from recipes import REGISTRY, build_recipe

RECIPE: dict[str, Any] = {
    "model": "org/some-model",
    "output": "out",
    "scheme": {"bits": 3, "grouper": {"name": "contiguous", "size": 16}},
    "calibration": {"dataset": [{"name": "c4 é", "weight": 1.0}], "keep": None},
}
TOTALS = Totals(
    layers=21,
    weights=1_234_567,
    bits_per_weight=3.25,
    bytes_on_disk=1_660_000,
    parameters=1_328_000,
    bits_per_parameter=10.0,
    mean_error=0.0123456,
    mean_minmax_error=0.04,
    mixtures=(),
    certificate=None,
)


ORIGIN = Origin({"license": "apache-2.0", "language": ["en"]})
JUDGEMENT = Judgement(
    tokens=1000, held_out=True, divergence=0.25, agreement=0.81, perplexity=12.0, original_perplexity=10.0
)


def card(serializer: str = "dashq", model: str = "org/some-model", origin: Origin = ORIGIN, **changes: Any) -> str:
    report = Report(totals=TOTALS, seconds={}, computed="on cpu in float32", versions={}, chosen=(), layers=())
    report = replace(report, **changes)
    return model_card(RECIPE | {"model": model}, report, REGISTRY.serializers[serializer](), origin)


def test_its_front_matter_names_a_model_of_the_hub_and_each_tag_once() -> None:
    fronts = [yaml.safe_load(card(base_model=model).split("---\n")[1]) for model in ("org/some-model", None)]
    own = {
        "license": "apache-2.0",
        "language": ["en"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dashq", "quantized"],
    }
    assert fronts == [own | {"base_model": "org/some-model", "base_model_relation": "quantized"}, own]


def test_it_names_the_library_and_the_task_that_the_hub_lists_it_under() -> None:
    front = yaml.safe_load(card("mlx", origin=Origin(task="feature-extraction")).split("---\n")[1])
    assert (front["library_name"], front["pipeline_tag"]) == ("mlx", "feature-extraction")
    assert "license" not in front
    assert front["tags"] == ["dashq", "mlx", "quantized"]


def test_the_licence_is_what_the_base_models_card_or_file_says(tmp_path: Path) -> None:
    folder = pico_model("llama", tmp_path / "model")
    recipe = build_recipe(folder, tmp_path / "out")
    network = open_model(recipe).network
    assert origin_of(Location(folder), network) == Origin()
    front = "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\ntags: [a]\n---\n# A model\n"
    (folder / "README.md").write_text(front)
    inherited = {"license": "other", "license_name": "own", "license_link": "LICENSE"}
    assert origin_of(Location(folder), network) == Origin(inherited)
    (folder / "README.md").write_text("---\n{[\n---\n")
    assert origin_of(Location(folder), network) == Origin()


def test_the_licence_of_a_gguf_file_is_what_its_header_says(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_license("mit")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    network = open_model(build_recipe(pico_model("llama", tmp_path / "model"), tmp_path / "out")).network
    assert origin_of(Location(tmp_path, "model.gguf"), network) == Origin({"license": "mit"})


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
        "weights on disk": "1.7 MB, 10.000 bits per parameter",
        "mean weighted error": "0.01235 (min-max rounding: 0.04000)",
    }


def test_the_types_of_a_gguf_file_stand_among_the_figures() -> None:
    layers = (layer_report("one"), layer_report("two", bits=4, type="IQ4_NL"), layer_report("three", bits=4))
    row = "| types | 3 bits (Q3_K) in 1, 4 bits (IQ4_NL) in 1, 4 bits (Q4_K) in 1 |"
    assert row in card("gguf", layers=layers).splitlines()
    assert "| types |" not in card("dashq", layers=layers[:1])


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


def test_the_folder_of_what_calibration_learned_is_not_shown() -> None:
    recipe = RECIPE | {"calibration": RECIPE["calibration"] | {"keep": "/home/me/sums"}}
    assert published(recipe, None)["calibration"]["keep"] is None


def test_of_texts_that_are_files_it_shows_the_last_part() -> None:
    names = ["my/texts/a.txt", "./b", "~/c.jsonl", "org/name", "data/d.json.gz", "wikitext2"]
    recipe = RECIPE | {"calibration": {"dataset": [{"name": name} for name in names]}}
    shown = [source["name"] for source in published(recipe, None)["calibration"]["dataset"]]
    assert shown == ["a.txt", "b", "c.jsonl", "org/name", "d.json.gz", "wikitext2"]


def test_code_that_is_sent_to_the_hub_opens_the_repository_there() -> None:
    own = card("mlx")
    sent = for_repository(own, "out", "me/mine")
    assert 'load("out")' in own
    assert 'load("me/mine")' in sent
    assert "without" not in own.partition("## How")[2] or "without" in sent
    before, after = own.partition("## How")[0], own.partition("## Recipe")[2]
    assert sent.startswith(before)
    assert sent.endswith(after)


def test_of_a_tuners_texts_on_this_machine_it_shows_the_last_part() -> None:
    texts = [{"name": "/home/me/secret/text.txt"}, {"name": "wikitext2"}]
    recipe = published(RECIPE | {"tuner": {"name": "some_tuner", "dataset": texts}}, None)
    assert recipe["tuner"] == {"name": "some_tuner", "dataset": [{"name": "text.txt"}, {"name": "wikitext2"}]}
    without = {"name": "some_tuner", "dataset": None}
    assert published(RECIPE | {"tuner": without}, None)["tuner"] == without


def test_a_sentence_of_each_model_stands_in_a_block_without_markup() -> None:
    sentence = Continuation("It was", "<b>*a*</b> night", "a | dog")
    text = card(judgement=replace(JUDGEMENT, continuation=sentence))
    lines = ["```text", "It was …", "original:  <b>*a*</b> night", "quantized: a | dog", "```"]
    assert "\n".join(["## A sentence of each", "", *lines]) in text
    assert "sentence of each" not in card(judgement=JUDGEMENT)


def test_a_warning_stands_before_the_figures_where_the_model_is_destroyed() -> None:
    destroyed = replace(JUDGEMENT, divergence=None, agreement=0.01)
    text = card(judgement=destroyed)
    assert 0 < text.index(f"> **Warning:** {destroyed.warning}.") < text.index("| measured |")
    assert "Warning" not in card(judgement=JUDGEMENT)


def test_what_of_the_model_is_not_in_the_result_stands_before_the_figures() -> None:
    text = card(warnings=("towers are left\nout", "so are others"))
    notes = "> **Note:** towers are left out.\n\n> **Note:** so are others.\n\n| measured |"
    assert notes in text
    assert "Note" not in card()


def test_its_recipe_is_the_one_of_the_run() -> None:
    recipe = card(base_model="org/some-model").partition("## Recipe\n\n```yaml\n")[2].removesuffix("```\n")
    assert yaml.safe_load(recipe) == RECIPE
    assert list(yaml.safe_load(recipe)) == list(RECIPE)
    assert "c4 é" in recipe


@pytest.mark.parametrize("name", REGISTRY.serializers)
def test_there_is_code_for_each_program_that_opens_the_format(name: str) -> None:
    serializer = REGISTRY.serializers[name]
    opening = card(name).partition("## How to open it\n\n")[2].partition("## Recipe")[0]
    assert opening.startswith(f"Format `{name}`: {str(serializer.__doc__).split(chr(10) * 2)[0]}")
    assert "{model}" not in opening
    for program, code in {**serializer.openings, "dashq": "$ dashq chat {model}"}.items():
        block = re.search(rf"^{re.escape(program)}:\n\n```(\w+)\n(.*?)```", opening, re.MULTILINE | re.DOTALL)
        assert block
        assert block[1] == ("sh" if code.startswith("$ ") else "python")
        assert block[2].strip() == code.removeprefix("$ ").replace("{model}", "out").strip()
        if block[1] == "python":
            compile(block[2], program, "exec")
