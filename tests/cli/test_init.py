"""`dashq init` prints the recipe that `dashq run` with the same options writes and runs."""

from pathlib import Path
from typing import Any

import pytest
import torch

from commands import call
from dashq import load_registry
from dashq.results.report import read_report
from dashq.starting import recipe_of, wish_for
from pico import WIDE, pico_model
from recipes import write_recipe


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "pico"
    sizes: dict[str, Any] = {**WIDE, "intermediate_size": 256, "num_hidden_layers": 1, "max_position_embeddings": 512}
    return pico_model("llama", folder, torch.float16, **sizes)


def test_what_init_prints_is_what_run_writes_and_runs(long_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = [long_model, "--bits", "2", "--for", "llama.cpp", "--text", "pydoc", "--fast", "--output", output]
    printed = call("init", *options)
    assert (printed.code, printed.errors) == (0, "")
    assert f"model: {long_model}\noutput: {output}\n" in printed.output
    assert "solver: k_quant" in printed.output
    assert not (tmp_path / "out.yaml").exists()
    outcome = call("run", *options)
    assert outcome.code == 0, outcome
    assert (tmp_path / "out.yaml").read_text() == printed.output
    assert (output / "model.gguf").exists()
    assert outcome.output.endswith(f"use it with: llama-cli -m {output}/model.gguf -p 'The capital of France is'\n")
    from_recipe = call("run", tmp_path / "out.yaml", "--overwrite")  # which names no program
    assert from_recipe.output.splitlines()[-1] == outcome.output.splitlines()[-1]
    again = call("run", tmp_path / "out.yaml")
    assert "already holds a finished result" in again.errors


def test_without_options_it_is_two_bits_for_dashq(long_model: Path) -> None:
    printed = call("init", long_model).output
    assert "output: out/pico-2bit\n" in printed
    assert "bits: 2\n" in printed
    assert "dataset: wikitext2 " in printed
    assert printed.endswith("serializer: dashq\n")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--fast", "--best"], "--fast and --best cannot be given together"),
        (["--bits", "9"], "--bits should be from 1 to 8, not 9"),
        (["--for", "lama"], "there is no target 'lama'. Did you mean 'ollama'?"),
        (["--for", "vllm", "--bits", "5"], "bits should be one of 2, 3, 4, 8"),
    ],
)
def test_mistakes_are_told_with_a_way_out(options: list[str], reason: str, long_model: Path) -> None:
    outcome = call("init", long_model, *options)
    assert outcome.code == 2
    assert reason in outcome.errors


def test_a_model_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    outcome = call("init", tmp_path / "none")
    assert outcome.code == 2
    assert "no such model folder" in outcome.errors


@pytest.mark.parametrize(
    "option", [["--bits", "3"], ["--for", "mlx", "--text", "x"], ["--text", "x"], ["--fast"], ["--output", "o"]]
)
def test_wishes_are_for_models_and_not_for_recipes(option: list[str], tmp_path: Path) -> None:
    outcome = call("run", tmp_path / "recipe.yaml", *option)
    assert outcome.code == 2
    assert "where no --for solves a recipe again for another program" in outcome.errors


def test_a_result_is_solved_again_for_another_program(long_model: Path, tmp_path: Path) -> None:
    first = ["--bits", "4", "--text", "pydoc", "--fast", "--output", tmp_path / "first"]
    assert call("run", long_model, *first).code == 0
    again = [tmp_path / "first" / "recipe.yaml", "--for", "llama.cpp", "--fast", "--output", tmp_path / "second"]
    planned = call("plan", *again)
    assert "for llama.cpp: " in planned.output
    assert not (tmp_path / "second.yaml").exists()
    outcome = call("run", *again)
    assert outcome.code == 0, outcome
    assert (tmp_path / "second" / "model.gguf").exists()
    assert f"use it with: llama-cli -m {tmp_path}/second/model.gguf" in outcome.output
    assert "pydoc" in (tmp_path / "second.yaml").read_text()
    assert "kept from the recipe" not in planned.output + outcome.output


def test_a_fast_result_that_is_solved_again_says_that_its_calibration_stays(long_model: Path, tmp_path: Path) -> None:
    registry = load_registry()
    wish = wish_for(str(long_model), 4, tmp_path / "first", "pydoc", "fast")
    first = recipe_of(registry.targets["dashq"], wish, registry)
    write_recipe(tmp_path / "recipe.yaml", first.model_dump(mode="json"))  # as it lies beside the result
    again = [tmp_path / "recipe.yaml", "--for", "mlx", "--output", tmp_path / "second"]
    sentence = (
        "kept from the recipe, where mlx would have others: calibration.error_correction: 0.0 (0.5); "
        "calibration.propagate: original (sequential)\n"
    )
    assert sentence in call("plan", *again).output
    assert sentence not in call("plan", *again, "--fast").output
    better = ["--set", "calibration.propagate=sequential", "--set", "calibration.error_correction=0.5"]
    assert "kept from the recipe" not in call("plan", *again, *better).output


def test_a_run_begins_with_what_the_recipe_says_otherwise_than_its_target(long_model: Path, tmp_path: Path) -> None:
    own = {"calibration": {"dataset": "pydoc", "samples": 3}, "for": {"name": "dashq", "bits": 4, "level": "fast"}}
    path = write_recipe(tmp_path / "recipe.yaml", {"model": str(long_model), "output": str(tmp_path / "out"), **own})
    outcome = call("run", path)
    assert outcome.code == 0, outcome
    sentence, *_ = outcome.output.splitlines()
    assert sentence == "kept from the recipe, where dashq would have others: calibration.samples: 3 (16)"
    assert call("run", path, "--quiet", "--overwrite").output == ""


def test_what_calibration_learned_is_read_when_a_result_is_solved_again(long_model: Path, tmp_path: Path) -> None:
    wished = call("init", long_model, "--bits", "4", "--text", "pydoc", "--fast", "--output", tmp_path / "first")
    (tmp_path / "first.yaml").write_text(wished.output)
    keep = ["--set", f"calibration.keep={tmp_path / 'kept'}"]
    assert call("run", tmp_path / "first.yaml", *keep).code == 0
    again = [tmp_path / "first" / "recipe.yaml", "--for", "mlx", "--bits", "3", "--fast"]
    again += ["--output", tmp_path / "second"]
    assert "calibration: not done again, but read from" in call("plan", *again).output
    assert call("run", *again).code == 0
    assert read_report(tmp_path / "second").calibration == "read"


def test_a_setting_is_for_a_recipe_and_not_for_a_model(long_model: Path) -> None:
    outcome = call("run", long_model, "--set", "scheme.bits=3")
    assert outcome.code == 2
    assert f"--set is for a recipe: `dashq init {long_model} > my.yaml` writes one" in outcome.errors
