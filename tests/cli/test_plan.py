"""`dashq plan` as a user meets it: layers, totals, reasons, and what an earlier measurement foretells."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import Outcome, call
from dashq.calibration import paused
from dashq.measuring.analysis import Analysis
from pico import WIDE, pico_model
from recipes import small_recipe, small_scheme, write_recipe

WEIGHTS = 3 * (2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 80)


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", small_recipe(model, tmp_path / "out"))


def rows(outcome: Outcome) -> dict[str, list[str]]:
    assert (outcome.code, outcome.errors) == (0, "")
    lines = [line for line in outcome.output.splitlines() if line.startswith("model.layers")]
    return {line.split()[0]: line.split()[1:] for line in lines}


def test_it_shows_every_layer_on_demand_and_the_totals_without_touching_the_output(
    recipe: Path, tmp_path: Path
) -> None:
    outcome = call("plan", recipe, "--layers", "--set", "overrides=[{match: '.*down_proj', bits: 4}]")
    layers = rows(outcome)
    assert not (tmp_path / "out").exists()
    assert len(layers) == 21
    assert layers["model.layers.0.self_attn.q_proj"] == ["–", "48×48", "3", "16", "1,440", "5.000"]
    assert layers["model.layers.2.mlp.down_proj"] == ["1", "48×80", "4", "16", "2,880", "6.000"]
    total = sum(int(row[-2].replace(",", "")) for row in layers.values())
    assert f"21 layers in 3 blocks, {WEIGHTS:,} weights" in outcome.output
    assert f"{8 * total / WEIGHTS:.3f} bits per weight" in outcome.output
    for line in (
        "scheme: diagonal(damping=0.0), contiguous(size=16, uneven=error), irls(",
        "not quantized",
        "peak memory",
        "time",
    ):
        assert line in outcome.output


def test_it_tells_the_bits_of_blocks_apart_from_those_of_embeddings(recipe: Path) -> None:
    plain = call("plan", recipe)
    outcome = call("plan", recipe, "--set", "embeddings={bits: 8}")
    assert "embeddings and head, one matrix: 10.000 bits per weight, 0.0 MB" in outcome.output
    blocks = next(line for line in plain.output.splitlines() if "bits per weight with scales and offsets" in line)
    assert blocks in outcome.output


@pytest.mark.parametrize("fits", [True, False])
def test_plan_says_whether_passes_pause_where_layers_are_solved_in_turn(
    fits: bool, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paused, "free_memory", lambda device: 1 << 40 if fits else 0)
    outcome = call("plan", recipe, "--set", "calibration.propagate=sequential", "--set", "dtype=float32")
    held = f"{3 * 40 * (6 * 48 + 80) * 4 / 1e6:.1f} MB"
    assert (f"each block is passed once, and its passes hold {held} while they pause" in outcome.output) == fits
    assert (f"passed anew before each; to pause would take {held}, of half" in outcome.output) != fits


def test_plan_says_what_calibration_keeps_or_takes_and_what_it_does_not_find(recipe: Path, tmp_path: Path) -> None:
    keep = ["--set", f"calibration.keep={tmp_path / 'kept'}"]

    def line(*settings: str) -> str:
        outcome = call("plan", recipe, *keep, *settings)
        assert (outcome.code, outcome.errors) == (0, "")
        _, line = " ".join(outcome.output.split()).split("calibration: ")
        return line

    assert "calibration: " not in call("plan", recipe).output
    assert line().startswith(f"what it learns is kept in {tmp_path / 'kept'}/")
    assert not (tmp_path / "kept").exists()
    assert call("run", recipe, *keep).code == 0
    assert line("--set", "scheme.bits=2").startswith(f"not done again, but read from {tmp_path / 'kept'}/")
    assert "; what is kept there is of something else: calibration text has changed" in line(
        "--set", "calibration.seed=1"
    )
    assert "; 3 of its 4 parts are there" in line("--set", "head={bits: 4}")


def test_layers_alike_share_a_line_and_what_is_skipped_is_named(recipe: Path) -> None:
    outcome = call("plan", recipe, "--set", "overrides=[{match: '.*0.*v_proj', skip: true}]")
    assert rows(outcome) == {}
    lines = [" ".join(line.split()) for line in outcome.output.splitlines()]
    assert "self_attn.q_proj 0–2 48×48 3 16 0.0 MB 5.000" in lines
    assert "self_attn.v_proj 1, 2 24×48 3 16 0.0 MB 5.000" in lines
    assert "skipped: 1 layer, model.layers.0.self_attn.v_proj" in outcome.output


def test_a_plan_that_cannot_be_names_every_reason(recipe: Path) -> None:
    outcome = call("plan", recipe, "--set", "scheme.grouper.size=32")
    assert outcome.code == 2
    assert "group size 32 does not divide 48 columns" in outcome.errors
    assert "group size 32 does not divide 80 columns" in outcome.errors


def test_it_ends_with_the_loss_that_an_analysis_foretells(recipe: Path, tmp_path: Path) -> None:
    before = call("plan", recipe).output.splitlines()[-1]
    assert before == "expected loss of the model's predictions: not measured; `dashq analyze` with a recipe measures it"
    assert call("analyze", recipe, "--bits", "2").code == 0
    analysis = Analysis.load(tmp_path / "out")
    assert analysis
    for bits, choice in ((3, 0), (2, 1)):
        loss = sum(layer.choices[choice].sensitivity for layer in analysis.layers)
        settings = "overrides=[]" if bits == 3 else f"budget={{bits_per_weight: {bits + 2}, bits: [{bits}]}}"
        after = call("plan", recipe, "--set", settings).output.splitlines()[-1]
        assert after == f"expected loss of the model's predictions: {loss:.3g} nats per token, from analysis.json"
    changed = call("plan", recipe, "--set", "calibration.samples=4").output.splitlines()[-1]
    assert changed == before


def test_a_model_is_planned_as_it_would_be_run(tmp_path: Path) -> None:
    sizes: dict[str, Any] = WIDE | {"max_position_embeddings": 512}
    model = pico_model("llama", tmp_path / "pico", torch.float16, **sizes)
    options = [model, "--bits", "4", "--text", "pydoc", "--fast", "--output", tmp_path / "out"]
    planned = call("plan", *options)
    assert (planned.code, planned.errors) == (0, "")
    before, chosen, after = re.split(r"(^for dashq: .*; serializer: dashq\n)", planned.output, flags=re.M | re.S)
    assert "scheme: {bits: 4, estimator: diagonal," in " ".join(chosen.split())
    assert [path.name for path in tmp_path.iterdir()] == ["pico"]
    written = tmp_path / "my.yaml"
    written.write_text(call("init", *options).output)
    from_recipe = call("plan", written)
    timeless = [re.sub(r"time about .*", "", text) for text in (before + after, from_recipe.output)]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            ["recipe.yaml", "--bits", "3"],
            "so are --bits, --fast, --best and --output where no --for solves a recipe again",
        ),
        (["model", "--set", "scheme.bits=3"], "--set is for a recipe"),
    ],
)
def test_options_for_the_other_are_refused(arguments: list[str], reason: str) -> None:
    outcome = call("plan", *arguments)
    assert outcome.code == 2
    assert reason in outcome.errors


def test_the_plan_warns_of_fused_layers_that_differ(wide_model: Path, tmp_path: Path) -> None:
    recipe = small_recipe(
        wide_model,
        tmp_path / "out",
        scheme=small_scheme(64, bits=4),
        overrides=[{"match": ".*layers.0.self_attn.v_proj", "bits": 8}],
        serializer="compressed-tensors",
    )
    outcome = call("plan", write_recipe(tmp_path / "recipe.yaml", recipe))
    assert outcome.code == 0, outcome.errors
    text = " ".join(outcome.output.split())
    assert text.count("runtimes that fuse these layers want them quantized alike") == 1
    assert "model.layers.0.self_attn.v_proj 8 bits in groups of 64" in text


def test_it_says_what_several_processes_take_and_what_the_first_does_alone(recipe: Path) -> None:
    tuner = "tuner={name: distill, samples: 4, sequence_length: 40}"
    outcome = call("plan", recipe, "--processes", 2, "--set", "calibration.samples=8", "--set", tuner)
    assert (outcome.code, outcome.errors) == (0, "")
    said = " ".join(outcome.output.split())
    assert re.search(r"with 2 processes: peak memory about [\d.]+ MB each, time about \d+ seconds and what it", said)
    shared = "shared: 8 shares of samples, the layers to solve, judging, the tuner's text and checks"
    steps = "the tuner's steps, which have one sample each (tuner.batch: 1), "
    assert f"{shared}; by the first process alone: {steps}writing. All read" in said
    batch = call(
        "plan", recipe, "--processes", 2, "--set", "calibration.samples=8", "--set", tuner, "--set", "tuner.batch=3"
    )
    said = " ".join(batch.output.split())
    assert f"{shared}, the 3 samples of a tuner's step; by the first process alone: writing. All read" in said
    refused = call("plan", recipe, "--processes", 4)
    assert (refused.code, refused.errors) == (
        2,
        "dashq: 4 processes are more than the 3 shares that the samples of the recipe make, in batches of 1: use at "
        "most 3, or raise calibration.samples, which changes the last digits of the result\n",
    )
    said = " ".join(call("plan", recipe, "--processes", 2).output.split())
    assert "3 shares of samples, the layers to solve, judging; by the first process alone: writing. All read" in said
