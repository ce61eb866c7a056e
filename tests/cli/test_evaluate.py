"""`dashq eval` judges models side by side."""

import json
from pathlib import Path
from typing import Any

import pytest

from commands import call
from dashq.calibration.tokens import evaluation_windows
from dashq.measuring.evaluate import load_model, perplexity
from dashq.results.judged import measured
from dashq.runtime.kernel_choice import ARK_INT8X2
from dashq.text_source import TextSource
from family_results import FamilyResults
from kernel_layers import GRID
from lm_tasks import offer_task


def totals(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "report.json").read_text())["totals"]
    return content


def test_eval_judges_original_and_result_side_by_side(model: Path, result: Path, tmp_path: Path) -> None:
    options = (
        "--context",
        32,
        "--windows",
        4,
        "--dtype",
        "float32",
        "--prompt",
        "while",
        "--json",
        tmp_path / "figures",
    )
    outcome = call("eval", result, *options)
    assert outcome.code == 0, outcome
    verdicts = json.loads((tmp_path / "figures").read_text())
    assert [verdict["model"] for verdict in verdicts] == [str(model), str(result)]
    row = ""
    for verdict in verdicts:
        loaded = load_model(verdict["model"], dtype="float32")
        windows = evaluation_windows(TextSource(name="pydoc", split="test"), loaded.tokenizer, 32, 4)
        assert verdict["perplexity"] == {"pydoc": pytest.approx(perplexity(loaded.network, windows))}
        assert verdict["bytes_on_disk"] == loaded.bytes_on_disk
        row = next(line for line in outcome.output.splitlines() if line.startswith(f"{verdict['model']} "))
        assert measured(verdict["perplexity"]["pydoc"], verdict["perplexity_error"]["pydoc"]) in row
        assert f"{verdict['tokens_per_second']:,.0f}" in row
        assert f"{verdict['written_per_second']:,.1f}" in row
        assert f"{verdict['bits_per_weight']:.2f}" in row
        assert verdict["continuation"] in outcome.output
    assert verdicts[1]["bits_per_weight"] == totals(result)["bits_per_weight"]
    assert verdicts[0]["perplexity"] != verdicts[1]["perplexity"]
    assert (verdicts[0]["original"], verdicts[0]["divergence"]) == (None, {})
    assert verdicts[1]["original"] == str(model)
    assert verdicts[1]["divergence"]["pydoc"] > verdicts[1]["divergence_error"]["pydoc"] > 0
    assert 0 < verdicts[1]["agreement"]["pydoc"] < 1
    assert measured(verdicts[1]["divergence"]["pydoc"], verdicts[1]["divergence_error"]["pydoc"]) in row


def test_every_result_is_compared_with_its_own_original_and_all_with_another_where_that_is_asked_for(
    model: Path, result: Path, families: FamilyResults, tmp_path: Path
) -> None:
    other = families.result("llama-untied-biased")
    options = ("--context", 32, "--windows", 2, "--dtype", "float32", "--json", tmp_path / "figures")
    outcome = call("eval", result, other, model, *options)
    assert outcome.code == 0, outcome
    pairs = [(verdict["model"], verdict["original"]) for verdict in json.loads((tmp_path / "figures").read_text())]
    second = str(families.model("llama-untied-biased"))
    assert pairs == [(str(model), None), (str(result), str(model)), (second, None), (str(other), second)]
    outcome = call("eval", result, "--against", other, *options)
    assert outcome.code == 0, outcome
    pairs = [(verdict["model"], verdict["original"]) for verdict in json.loads((tmp_path / "figures").read_text())]
    assert pairs == [(str(other), None), (str(result), str(other))]


def test_windows_are_no_longer_than_the_models_have_positions_where_no_length_is_asked_for(
    model: Path, tmp_path: Path
) -> None:
    outcome = call("eval", model, "--windows", 1, "--dtype", "float32", "--json", tmp_path / "figures")
    assert outcome.code == 0, outcome
    assert "note: windows of 256 tokens, as many as the models have positions" in outcome.errors
    loaded = load_model(str(model), dtype="float32")
    windows = evaluation_windows(TextSource(name="pydoc", split="test"), loaded.tokenizer, 256, 1)
    (verdict,) = json.loads((tmp_path / "figures").read_text())
    assert verdict["perplexity"]["pydoc"] == pytest.approx(perplexity(loaded.network, windows))


def test_eval_can_leave_the_original_out_and_read_several_texts(result: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("while True: assert x, y\n" * 40)
    options = ("--context", 32, "--windows", 1, "--text", "pydoc", "--text", tmp_path / "text.txt")
    outcome = call("eval", result, "--no-original", *options, "--json", tmp_path / "figures")
    assert outcome.code == 0, outcome
    (verdict,) = json.loads((tmp_path / "figures").read_text())
    assert verdict["model"] == str(result)
    assert verdict["perplexity"].keys() == {"pydoc", str(tmp_path / "text.txt")}


def test_eval_shows_the_accuracy_in_tasks(result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = offer_task(tmp_path, monkeypatch)
    options = ("--tasks", "pico_choice", "--include-path", folder, "--json", tmp_path / "figures")
    outcome = call("eval", result, "--no-original", *options)
    assert outcome.code == 0, outcome
    (verdict,) = json.loads((tmp_path / "figures").read_text())
    assert not verdict["perplexity"]
    heading, row = (line.split() for line in outcome.output.splitlines() if line.startswith(("model ", str(result))))
    assert row[heading.index("pico_choice") - len(heading)] == f"{100 * verdict['tasks']['pico_choice']['acc']:.2f}"


def test_eval_shows_what_kernels_cost(result: Path, tmp_path: Path) -> None:
    pytest.importorskip("auto_round_kernel")
    options = ("--no-original", "--context", 32, "--windows", 1, "--dtype", "float32", "--json", tmp_path / "figures")
    outcome = call("eval", result, *options, "--kernels", "ark_int8")
    assert outcome.code == 0, outcome
    (verdict,) = json.loads((tmp_path / "figures").read_text())
    own, exact = verdict["kernel_divergence"]
    assert abs(exact) < 1e-9
    if ARK_INT8X2.works(GRID):  # elsewhere the library computes int8 without rounding inputs
        assert own > 1e-9
    assert (
        f"kernels of {result}: ark_int8 in {verdict['kernels']['ark_int8']} layers; KL from float32 {own:.1e}"
        in outcome.output
    )
    refused = call("eval", result, *options, "--kernels", "ark_int")
    assert refused.code == 2
    assert "there are no kernels 'ark_int'" in refused.errors
