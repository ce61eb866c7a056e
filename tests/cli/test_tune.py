"""`dashq tune` lets a finished result learn from its original model, in its place or in a folder of its own."""

import importlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from commands import call
from dashq import hookimpl, load_registry, run
from dashq.results.checkpoint import open_checkpoint
from dashq.results.events import Tuning
from dashq.strategies import Tuner
from dashq_cli.progress import JsonLog
from interruptions import contents, weights
from recipes import build_recipe, small_scheme

TUNER = "{name: distill, samples: 4, sequence_length: 128, scales: 0.01}"
FEW_BITS = small_scheme(bits=2)


@pytest.fixture(autouse=True)
def _short_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dashq.calibration.tokens.TUNER_HELD_OUT_TOKENS", 128)


@pytest.fixture(scope="module")
def untuned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(build_recipe(model, tmp_path_factory.mktemp("tune") / "untuned", scheme=FEW_BITS))


@pytest.fixture
def folder(untuned: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(untuned, tmp_path / "out"))


def refusal(*arguments: object) -> str:
    """The one line of a command that must end with exit code 2."""
    outcome = call("tune", *arguments)
    assert outcome.code == 2, outcome
    [line] = outcome.errors.splitlines()
    return line


def test_a_result_is_tuned_in_its_place_and_its_codes_stay(folder: Path, untuned: Path) -> None:
    (folder / "my-notes.txt").write_text("kept")
    outcome = call("tune", folder, "--tuner", TUNER)
    assert outcome.code == 0, outcome
    tuned = json.loads((folder / "report.json").read_text())["tuned"]
    assert tuned["checks"][0]["step"] == 0
    assert min(check["divergence"] for check in tuned["checks"]) < tuned["checks"][0]["divergence"]
    summary = " ".join(outcome.output.split())
    assert re.search(
        r"tuned divergence from the original [\d.]+ → [\d.]+ nats per token on text that the tuner did", summary
    )
    assert re.search(
        r"steps of distill on 512 tokens, which change 3,456 scales, 3,456 offsets, 336 gains of norms", summary
    )
    assert "| tuned | divergence from the original" in (folder / "README.md").read_text()
    assert (folder / "my-notes.txt").read_text() == "kept"
    assert {path.name for path in folder.parent.iterdir()} == {"out"}
    before, after = open_checkpoint(untuned), open_checkpoint(folder)
    for name in before.layers:
        assert after.quantized(name).codes.equal(before.quantized(name).codes)
    assert any(not after.quantized(name).scale.equal(before.quantized(name).scale) for name in before.layers)
    assert call("verify", folder).code == 0


def test_quiet_means_silent_and_another_folder_leaves_the_result_as_it_is(folder: Path, tmp_path: Path) -> None:
    before = contents(folder)
    outcome = call("tune", folder, "--tuner", TUNER, "--output", tmp_path / "tuned", "-q")
    assert (outcome.code, outcome.output, outcome.errors) == (0, "", "")
    assert contents(folder) == before
    assert (tmp_path / "tuned" / "report.json").is_file()
    assert "--overwrite replaces it" in call("tune", folder, "--tuner", TUNER, "--output", tmp_path / "tuned").errors


def test_without_a_name_it_is_the_tuner_of_the_recipe(folder: Path, tmp_path: Path) -> None:
    assert call("tune", folder, "--tuner", TUNER, "-q").code == 0
    assert call("tune", folder, "--output", tmp_path / "again", "-q").code == 0
    recipes = [(path / "recipe.yaml").read_text() for path in (folder, tmp_path / "again")]
    assert all("samples: 4\n" in text and "scales: 0.01\n" in text for text in recipes)


class Another(Tuner):
    """Never asked."""

    name = "another"

    def optimizer(self, tunables: object) -> torch.optim.Optimizer:
        raise NotImplementedError

    def loss(self, original: object, quantized: object, next_tokens: object) -> torch.Tensor:
        raise NotImplementedError


class AnotherPlugin:
    @hookimpl
    def dashq_tuners(self) -> list[type[Tuner]]:
        return [Another]


def test_where_several_are_installed_and_the_recipe_has_none_they_are_listed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = load_registry(AnotherPlugin())
    monkeypatch.setattr("dashq.registry.load_registry", lambda: several)
    assert refusal(folder).endswith("has no tuner: name one with --tuner. Installed: another, distill")


def test_the_bar_and_the_log_tell_steps_and_divergence(folder: Path) -> None:
    outcome = call("tune", folder, "--tuner", TUNER, "--log-json")
    events = [json.loads(line) for line in outcome.output.splitlines()]
    steps = [event for event in events if event["event"] == "Tuning"]
    assert [event["check"]["step"] for event in steps] == list(range(5))
    assert all(event["steps"] == 4 and event["check"]["divergence"] > 0 for event in steps)


def test_a_tuning_that_was_stopped_goes_on_and_ends_in_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("tune", folder, "--tuner", TUNER, "--output", tmp_path / "straight", "-q").code == 0
    before = contents(folder)

    def interrupt(log: JsonLog, event: object) -> None:
        if isinstance(event, Tuning) and event.check.step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(JsonLog, "hear", interrupt)
        outcome = call("tune", folder, "--tuner", TUNER, "--log-json")
    assert outcome.code == 130
    assert "interrupted; the same command goes on after the last saved step" in outcome.errors
    assert contents(folder) == before
    resumed = call("tune", folder, "--tuner", TUNER, "--log-json")
    events = [json.loads(line) for line in resumed.output.splitlines()]
    assert [event["check"]["step"] for event in events if event["event"] == "Tuning"] == [3, 4]
    assert weights(folder) == weights(tmp_path / "straight")


def test_whatever_is_wrong_is_one_line_and_the_result_stays(folder: Path, tmp_path: Path) -> None:
    before = contents(folder)
    assert "no tuner named 'distil'. Did you mean 'distill'? Installed: distill" in refusal(folder, "--tuner", "distil")
    assert "samples: should be greater than 0" in refusal(folder, "--tuner", "{name: distill, samples: 0}")
    assert "is not valid YAML" in refusal(folder, "--tuner", "{name: distill")
    assert "no such folder: " in refusal(tmp_path / "absent")
    for arguments, message in (
        (
            ["--tuner", "{name: distill, samples: 100000, sequence_length: 40}"],
            "but its share is 100000 samples: lower",
        ),
        (
            ["--tuner", "{name: distill, sequence_length: 4000}"],
            "tuner.sequence_length 4000 is more than the 256 positions",
        ),
        (["--model", str(tmp_path / "absent")], "no such model folder: "),
    ):
        outcome = call("tune", folder, *arguments, "-q")
        assert outcome.code == 2, outcome
        assert message in outcome.errors
    assert contents(folder) == before
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_another_model_than_the_original_is_refused(folder: Path, tmp_path: Path, wide_model: Path) -> None:
    outcome = call("tune", folder, "--model", wide_model, "--tuner", TUNER, "-q")
    assert outcome.code == 2, outcome
    assert re.search(r"was not made from .*: it holds model\.layers\.0\..* as \[", outcome.errors)


def test_a_tuner_of_norms_alone_as_the_template_has_it_leaves_scales(
    folder: Path, untuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("plugins", "new", "my_norms", "--kind", "tuner", "--folder", tmp_path).code == 0
    monkeypatch.syspath_prepend(tmp_path / "dashq-my_norms")
    several = load_registry(importlib.import_module("dashq_my_norms"))
    monkeypatch.setattr("dashq.registry.load_registry", lambda: several)
    outcome = call("tune", folder, "--tuner", "{name: my_norms, samples: 4, sequence_length: 128, rate: 0.01}")
    assert outcome.code == 0, outcome
    assert "which change 336 gains of norms" in " ".join(outcome.output.split())
    before, after = open_checkpoint(untuned), open_checkpoint(folder)
    assert all(after.quantized(name).scale.equal(before.quantized(name).scale) for name in before.layers)
    assert not after.tensors["model.norm.weight"][...].equal(before.tensors["model.norm.weight"][...])
