"""`dashq run` as a user meets them: output, files, and exit codes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from commands import call, execute
from dashq.results.events import BlockDone
from dashq_cli.progress import JsonLog
from recipes import small_recipe, write_recipe


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", small_recipe(model, tmp_path / "out"))


def totals(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "report.json").read_text())["totals"]
    return content


def test_run_shows_what_it_achieved(recipe: Path, tmp_path: Path) -> None:
    outcome = execute("run", recipe, "--set", "scheme.bits=2", "--set", "scheme.grouper.size=8")
    assert outcome.code == 0, outcome
    achieved = totals(tmp_path / "out")
    assert achieved["bits_per_weight"] == 2 + 32 / 8
    assert "6.000, scales and offsets included" in outcome.output
    assert f"21, {achieved['weights']:,} weights" in outcome.output
    assert f"{achieved['mean_error']:.4f} on average ({achieved['mean_minmax_error']:.4f}" in outcome.output
    assert f"the result is in {tmp_path / 'out'}" in outcome.output.replace("\n", "")
    assert outcome.output.endswith(f"use it with: dashq chat {tmp_path / 'out'}\n")
    assert outcome.errors == ""


def test_quiet_means_silent(recipe: Path, tmp_path: Path) -> None:
    outcome = call("run", recipe, "--quiet")
    assert (outcome.code, outcome.output, outcome.errors) == (0, "", "")
    assert totals(tmp_path / "out")["layers"] == 21


def test_every_line_of_the_json_log_is_an_event(recipe: Path) -> None:
    outcome = call("run", recipe, "--log-json", "--set", "dtype=float32", "--set", "device=cpu")
    events = [json.loads(line) for line in outcome.output.splitlines()]
    assert (outcome.code, outcome.errors) == (0, "")
    before, after = ["RunBegun", "PhaseBegun", "RunStarted"], ["PhaseBegun", "PhaseBegun", "RunDone"]
    assert [event["event"] for event in events] == [*before, *(["LayerDone"] * 7 + ["BlockDone"]) * 3, *after]
    assert [event["what"] for event in events if event["event"] == "PhaseBegun"] == [
        "reading text",
        "judging",
        "writing",
    ]
    times = [event.pop("elapsed") for event in events]
    assert times == sorted(times)
    output = str(recipe.with_name("out"))
    sizes = {"blocks": 3, "layers": 21, "weights": totals(recipe.with_name("out"))["weights"]}
    model = yaml.safe_load(recipe.read_text())["model"]
    assert events[0] == {"event": "RunBegun", "model": model, "output": output, **sizes}
    started = {"blocks": 3, "layers": 21, "tokens": 120, "computed": "on cpu in float32", "warnings": [], "kept": ""}
    assert events[2] == {"event": "RunStarted", **started}
    assert {"name", "bits", "error", "minmax_error", "tokens"} <= events[3].keys()
    report = json.loads((recipe.with_name("out") / "report.json").read_text())
    ending = {key: report[key] for key in ("totals", "seconds", "judgement")}
    assert events[-1] == {"event": "RunDone", "output": output, **ending}
    assert [event["name"] for event in events if event["event"] == "BlockDone"] == [
        f"model.layers.{i}" for i in (0, 1, 2)
    ]


def test_a_mistake_of_the_user_ends_with_2_and_no_traceback(recipe: Path, tmp_path: Path) -> None:
    outcome = execute("run", recipe, "--set", "scheme.bitz=3")
    assert (outcome.code, outcome.output) == (2, "")
    assert outcome.errors.startswith(
        "dashq: --set scheme.bitz=3: scheme.bitz: unknown key 'bitz'. Did you mean 'bits'?"
    )
    assert "Traceback" not in outcome.errors
    assert not (tmp_path / "out").exists()


FAILING = """
from dashq import hookimpl
from dashq_plugins.solvers.rtn import RoundToNearestSolver

class FailingSolver(RoundToNearestSolver):
    name = "failing"

    def solve(self, weight, curvature, grouping, grid):
        raise RuntimeError("a bug in this plugin")

@hookimpl
def dashq_solvers():
    return [FailingSolver]
"""


def test_a_failure_in_a_plugin_names_it_and_shows_its_traceback_on_demand(recipe: Path, tmp_path: Path) -> None:
    info = tmp_path / "site" / "failing-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: failing\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dashq]\nfailing = failing_solver\n")
    (tmp_path / "site" / "failing_solver.py").write_text(FAILING)
    environment = {"PYTHONPATH": str(tmp_path / "site"), "DASHQ_TRACEBACK": "1"}
    outcome = execute("run", recipe, "--set", "scheme.solver=failing", **environment)
    assert outcome.code == 2
    *_, before, sentence = outcome.errors.splitlines()
    assert before == "RuntimeError: a bug in this plugin"
    assert sentence.startswith("dashq: plugin 'failing' from failing fails in solve (failing_solver, line ")
    assert "failing_solver.py" in outcome.errors


def test_an_interrupted_run_says_how_to_go_on(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(log: JsonLog, event: object) -> None:
        if isinstance(event, BlockDone):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(JsonLog, "hear", interrupt)
        outcome = call("run", recipe, "--log-json")
    assert outcome.code == 130
    kept = f"1 block is finished and kept in {tmp_path / 'out'}: the same command goes on after them"
    assert outcome.errors == f"dashq: interrupted; {kept}\n"
    resumed = call("run", recipe, "--log-json")
    assert resumed.code == 0
    assert resumed.output.count('"LayerDone"') == 14  # the first block is not solved again


def test_a_run_that_is_interrupted_at_once_says_that_nothing_is_finished(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(log: JsonLog, event: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(JsonLog, "hear", interrupt)
    outcome = call("run", recipe, "--log-json")
    assert outcome.errors == "dashq: interrupted; no block is finished yet: the same command begins anew\n"


def test_overwrite_is_needed_to_replace_a_result(recipe: Path, result: Path, tmp_path: Path) -> None:
    shutil.copytree(result, tmp_path / "out")
    outcome = call("run", recipe, "-q", "--set", "scheme.bits=1")
    assert outcome.code == 2
    assert "already holds a finished result; --overwrite replaces it" in outcome.errors
    assert call("run", recipe, "-q", "--set", "scheme.bits=1", "--overwrite").code == 0
    assert totals(tmp_path / "out")["bits_per_weight"] == 3
