"""Full disks, stops and broken files end with one line, or none; nothing is lost, and the same command goes on."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

import dashq.results.shards
from commands import Outcome, call
from dashq.results.events import BlockDone
from dashq_cli.progress import JsonLog
from interruptions import contents, weights
from recipes import small_recipe, write_recipe

PIECEWISE = """
import dashq.results.shards
from dashq_cli import main
dashq.results.shards.PIECE_SECONDS = 0
main()
"""


@pytest.fixture
def recipe(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe whose run puts every block on the disk."""
    monkeypatch.setattr(dashq.results.shards, "PIECE_SECONDS", 0)
    return write_recipe(tmp_path / "recipe.yaml", small_recipe(model, tmp_path / "out"))


def refused(outcome: Outcome) -> str:
    """The one line of a command that was refused."""
    assert outcome.code == 2, outcome
    line = outcome.errors.strip()  # a progress bar that is gone leaves an empty one
    assert line.startswith("dashq: ")
    assert "\n" not in line
    return line


@contextmanager
def largest_file(size: int) -> Generator[None]:
    """No file can grow beyond this size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_limit_of_file_sizes_is_told_and_the_run_goes_on_without_it(
    recipe: Path, result: Path, tmp_path: Path
) -> None:
    for size in (10, 30_000, 70_000):
        with largest_file(size):
            line = refused(call("run", recipe, "--log-json"))
        assert f"{tmp_path / 'out'}" in line
        assert "File too large" in line
    assert call("run", recipe, "-q").code == 0
    assert weights(tmp_path / "out") == weights(result)
    assert contents(tmp_path / "out").keys() == contents(result).keys()


def test_a_run_that_is_killed_goes_on_and_ends_in_the_same_bytes(recipe: Path, result: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-c", PIECEWISE, "run", str(recipe), "--log-json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        while json.loads(process.stdout.readline())["event"] != "BlockDone":
            pass
        process.kill()
    assert process.returncode == -signal.SIGKILL
    outcome = call("run", recipe, "--log-json")
    events = [json.loads(line)["event"] for line in outcome.output.splitlines()]
    assert 0 < events.count("LayerDone") < 21
    assert weights(tmp_path / "out") == weights(result)


def during_the_run(monkeypatch: pytest.MonkeyPatch, action: object) -> None:
    """Do something when the first block is done."""

    def hear(log: JsonLog, event: object) -> None:
        if isinstance(event, BlockDone) and callable(action):
            action()

    monkeypatch.setattr(JsonLog, "hear", hear)


def test_a_folder_that_is_deleted_midway_is_named(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    during_the_run(monkeypatch, lambda: shutil.rmtree(tmp_path / "out", ignore_errors=True))
    line = refused(call("run", recipe, "--log-json"))
    assert str(tmp_path / "out") in line
    assert "No such file or directory" in line


def test_a_model_that_is_changed_during_the_run_is_named(
    model: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(model, tmp_path / "model")
    weights_file = tmp_path / "model" / "model.safetensors"
    content = weights_file.read_bytes()
    write_recipe(recipe, small_recipe(tmp_path / "model", tmp_path / "out"))
    during_the_run(monkeypatch, lambda: weights_file.write_bytes(content[:-40_000] + bytes(40_000)))
    line = refused(call("run", recipe, "--log-json"))
    assert f"{tmp_path / 'model'} was changed while it was quantized: file model.safetensors has changed" in line
    assert not (tmp_path / "out" / "report.json").exists()


def test_being_terminated_is_as_ctrl_c(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        during_the_run(patch, lambda: os.kill(os.getpid(), signal.SIGTERM))
        outcome = call("run", recipe, "--log-json")
    signal.signal(signal.SIGTERM, before)
    assert outcome.code == 130
    kept = f"1 block is finished and kept in {tmp_path / 'out'}: the same command goes on after them"
    assert outcome.errors == f"dashq: interrupted; {kept}\n"
    assert call("run", recipe, "-q").code == 0


GARBAGE = {
    "null": b"null",
    "a number": b"7",
    "a list": b"[]",
    "a word": b'"versions"',
    "not UTF-8": b'{"a": "\xe9"}',
    "nested": b"[\n" * 100_000,  # on one line PyYAML looks ahead for seconds
    "nested mappings": b'{"a":\n' * 100_000,
}


@pytest.mark.parametrize("content", GARBAGE)
@pytest.mark.parametrize("name", ["report.json", "config.json", "recipe.yaml"])
def test_a_broken_file_of_a_result_is_named_in_one_line(name: str, content: str, result: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(result, tmp_path / "result")
    (folder / name).write_bytes(GARBAGE[content])
    before = contents(folder)
    for command in (["verify", folder], ["convert", folder, "--to", "dashq", "--output", tmp_path / "new"]):
        assert str(folder / name) in refused(call(*command))
    assert contents(folder) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("content", GARBAGE)
def test_a_broken_journal_is_named_and_kept(content: str, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "dashq_journal.json").write_bytes(GARBAGE[content])
    before = contents(tmp_path / "out")
    assert "dashq_journal.json is not as dashq writes it" in refused(call("run", recipe, "-q"))
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("content", GARBAGE)
def test_a_broken_measurement_is_none(content: str, recipe: Path, result: Path, tmp_path: Path) -> None:
    shutil.copytree(result, tmp_path / "out")
    (tmp_path / "out" / "analysis.json").write_bytes(GARBAGE[content])
    before = contents(tmp_path / "out")
    outcome = call("plan", recipe, "--set", "budget=4")
    assert outcome.code == 0
    assert "wait for a measurement" in outcome.output
    assert contents(tmp_path / "out") == before


def test_names_that_look_like_markup_are_shown_as_they_are(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, "[b]model[/y]")
    name, copy = "[/x]", "[red]copy[/]"
    recipe = write_recipe(Path("recipe.yaml"), small_recipe(Path("[b]model[/y]"), Path(name)))
    assert call("plan", recipe, "--set", "overrides=[{match: '.*[/]?down_proj', bits: 4}]").code == 0
    assert f"the result is in {name}" in call("run", recipe).output
    assert f"the result is in {copy}" in call("convert", name, "--to", "dashq", "--output", copy).output
    assert call("verify", copy).code == 0
    shown = call("eval", name, "--context", "16", "--windows", "1", "--prompt", "[/z] is", "--no-original").output
    assert name in shown
    assert "[/z] is" in shown
    assert f"the analysis is in {name}" in call("analyze", recipe, "--bits", "2").output
