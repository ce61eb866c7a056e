"""`dashq analyze` as a user meets it: tables, files, figures, and what is refused."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import Outcome, call, execute
from dashq.measuring.analysis import Analysis
from dashq_cli.progress import counted
from pico import pico_model
from recipes import mixture_scheme, small_recipe, write_recipe
from spread import run_together

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("analyze")
    return write_recipe(folder / "recipe.yaml", small_recipe(pico_model("llama", folder / "model"), folder / "out"))


@pytest.fixture(scope="module")
def outcome(recipe: Path) -> Outcome:
    options = ("--kl", "--context", 32, "--windows", 4, "--plot", "svg", "--set", "dtype=float32", "--layers")
    return call("analyze", recipe, *options)


def analysis_of(recipe: Path) -> Analysis:
    analysis = Analysis.load(recipe.with_name("out"))
    assert analysis
    return analysis


def rows(text: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.startswith("model.layers")}


def test_every_layer_has_a_row_with_its_cost_at_each_number_of_bits(recipe: Path, outcome: Outcome) -> None:
    assert (outcome.code, outcome.errors.strip()) == (0, "")  # the bar leaves an empty line
    analysis, shown = analysis_of(recipe), rows(outcome.output)
    costs_of_scheme = {layer.name: layer.choices[0].sensitivity for layer in analysis.layers}
    assert list(shown) == sorted(costs_of_scheme, key=costs_of_scheme.__getitem__, reverse=True)
    assert len(shown) == 21
    for layer in analysis.layers:
        assert [choice.bits for choice in layer.choices] == [3, 2, 4]  # first what the scheme says
        costs = {choice.bits: choice.sensitivity for choice in layer.choices}
        assert costs[2] > costs[3] > costs[4] > 0
        assert layer.divergence is not None
        assert layer.signal_to_noise
        assert shown[layer.name] == [
            *(f"{1000 * costs[bits]:.3g}" for bits in (2, 3, 4)),
            f"{layer.choices[0].error:.4f}",
            f"{1000 * layer.divergence:.3g}",
            f"{layer.signal_to_noise.off_diagonal[2]:.2f}",
        ]


def test_what_is_expected_is_what_is_measured(recipe: Path, outcome: Outcome) -> None:
    analysis = analysis_of(recipe)
    assert analysis.rank_correlation is not None
    assert analysis.rank_correlation > 0.9
    assert f"correlation with the expected loss is {analysis.rank_correlation:.3f}" in outcome.output.replace("\n", " ")
    expected = sum(layer.choices[0].sensitivity for layer in analysis.layers)
    measured = sum(layer.divergence or 0.0 for layer in analysis.layers)
    assert 0.5 < expected / measured < 2


def test_the_figure_and_the_analysis_lie_in_the_output_folder(recipe: Path, outcome: Outcome) -> None:
    out = recipe.with_name("out")
    assert sorted(path.name for path in out.iterdir()) == ["analysis-sensitivity.svg", "analysis.json"]
    assert re.search(r"^it took \d+ seconds on cpu in float32$", outcome.output, re.MULTILINE)
    assert outcome.output.endswith(f"the analysis is in {out / 'analysis.json'}\n")
    svg = (out / "analysis-sensitivity.svg").read_text()
    assert svg.startswith("<?xml")


def test_what_was_measured_is_shown_again_and_measured_anew_only_when_asked(
    recipe: Path, outcome: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = (recipe.with_name("out") / "analysis.json").read_text()
    arguments = ("--snr", r".*\.down_proj", "--plot", "png", "--set", "dtype=float32")
    with monkeypatch.context() as patch:
        patch.setattr("dashq.measuring.choosing.analyze", lambda *arguments: pytest.fail("measured again"))
        again = call("analyze", recipe, *arguments)
    assert (again.code, again.errors.strip()) == (0, "")
    assert re.search(r"^read from disk: measuring it took .*, --overwrite does it anew$", again.output, re.MULTILINE)
    assert list(rows(again.output)) == [f"model.layers.{block}.mlp.down_proj" for block in range(3)]
    noise = analysis_of(recipe).by_name["model.layers.1.mlp.down_proj"].signal_to_noise
    assert noise
    _, low, median, high, _ = noise.off_diagonal
    assert f"{median:.2f} ({low:.2f} to {high:.2f})" in again.output
    assert (recipe.with_name("out") / "analysis-snr.png").read_bytes().startswith(PNG)
    (recipe.with_name("out") / "analysis-snr.png").unlink()
    assert call("analyze", recipe, "--set", "dtype=float32", "--overwrite").code == 0
    assert (recipe.with_name("out") / "analysis.json").read_text() != measured


def test_an_analysis_fits_80_columns(recipe: Path, outcome: Outcome) -> None:
    shown = call("analyze", recipe, "--set", "dtype=float32", columns=80)
    table = [line for line in shown.output.splitlines() if line.startswith("model.layers")]
    assert len(table) == 10
    assert max(map(len, shown.output.splitlines()[:-1])) <= 80  # the folder's name is not broken


def test_the_ten_costliest_are_shown_first_with_their_share_of_the_loss(recipe: Path, outcome: Outcome) -> None:
    costs = sorted(((layer.choices[0].sensitivity, layer.name) for layer in analysis_of(recipe).layers), reverse=True)
    shown = call("analyze", recipe, "--set", "dtype=float32")
    assert list(rows(shown.output)) == [name for _, name in costs[:10]]
    share = sum(cost for cost, _ in costs[:10]) / sum(cost for cost, _ in costs)
    assert f"the 10 costliest of 21 lines, which bear {share:.0%} of the expected loss; --layers" in shown.output


def test_quiet_means_silent(recipe: Path, outcome: Outcome) -> None:
    shown = call("analyze", recipe, "--set", "dtype=float32", "-q")
    assert (shown.code, shown.output, shown.errors) == (0, "", "")


def test_experts_of_a_stack_share_a_row(tmp_path: Path) -> None:
    content = small_recipe(pico_model("mixtral", tmp_path / "model"), tmp_path / "out")
    content["scheme"] |= {"router": "routed", "solver": "rtn"}
    outcome = call(
        "analyze", write_recipe(tmp_path / "recipe.yaml", content), "--bits", "2", "--plot", "png", "--layers"
    )
    assert outcome.code == 0, outcome
    row = rows(outcome.output)["model.layers.0.mlp.experts.down_proj.*"]
    analysis = Analysis.load(tmp_path / "out")
    assert analysis
    experts = [la for la in analysis.layers if la.name.startswith("model.layers.0.mlp.experts.down_proj.")]
    assert len(experts) == 4
    assert (
        row[0] == f"{1000 * sum(choice.sensitivity for la in experts for choice in la.choices if choice.bits == 2):.3g}"
    )
    assert row[-1] == "–"  # the noise of experts in stacks is not measured


def test_a_plan_shows_what_an_analysis_chooses_and_says_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pico_model("llama", tmp_path / "model")
    changes: dict[str, Any] = {"budget": 4.5, "overrides": [{"critical": {"share": 0.1}, "bits": 4}]}
    path = write_recipe(tmp_path / "recipe.yaml", small_recipe(model, tmp_path / "out") | changes)
    before = call("plan", path)
    assert before.code == 0, before
    assert "wait for a measurement: `dashq run` measures first, `dashq analyze` measures now" in before.output
    assert "5.000 bits per weight" in before.output  # of the scheme
    assert call("analyze", path).code == 0
    after = call("plan", path, "--layers")
    assert "wait for a measurement" not in after.output
    settings = (model / "config.json").read_text()
    (model / "config.json").write_text(json.dumps(json.loads(settings) | {"rms_norm_eps": 1e-4}))
    stale = call("plan", path, "--set", "calibration.samples=4")
    (model / "config.json").write_text(settings)
    reason = "that in analysis.json is of something else: the recipe has changed; file config.json has changed"
    assert f"wait for a measurement ({reason})" in " ".join(stale.output.split())
    assert re.search(
        r"chosen override 1: critical by sensitivity, \d\.\d% of the weights: \d layers, model", after.output
    )
    assert {row[2] for row in rows(after.output).values()} == {"2", "3", "4"}
    monkeypatch.setattr("dashq.measuring.choosing.analyze", lambda *arguments: pytest.fail("measured again"))
    run = call("run", path)
    assert run.code == 0, run
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    bits = f"{report['totals']['bits_per_weight']:.3f}"
    assert f"{bits} bits per weight" in after.output
    assert f"{bits}, scales and offsets included" in run.output
    for chosen in report["chosen"]:
        assert f"chosen {chosen['what']}: {counted(chosen['layers'])}" in run.output


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {"embeddings": {"bits": 4}, "budget": 5}), ("mixtral", {"scheme": mixture_scheme()})],
)
def test_several_processes_measure_the_same_numbers_as_one(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    content = small_recipe(pico_model(family, tmp_path / "model"), tmp_path / "out", device="cpu", **changes)
    one = write_recipe(tmp_path / "one.yaml", content)
    several = write_recipe(tmp_path / "several.yaml", content | {"output": str(tmp_path / "several")})
    torch.set_num_threads(1)
    assert call("analyze", one, "--bits", "2").code == 0
    command = ["-m", "dashq", "analyze", str(several), "--bits", "2"]
    first, second = run_together([command] * 2)
    assert (first.code, second.code, second.output, second.errors.strip()) == (0, 0, "", "")
    assert "expected loss of all layers as the scheme says" in first.output
    alone, shared = (Analysis.load(tmp_path / name) for name in ("out", "several"))
    assert alone
    assert shared
    assert shared == alone.model_copy(update={"seconds": shared.seconds})


def test_several_processes_read_what_was_measured(recipe: Path, outcome: Outcome) -> None:
    again, other = run_together([["-m", "dashq", "analyze", str(recipe), "--set", "dtype=float32"]] * 2)
    assert (again.code, again.errors, other.code, other.output, other.errors) == (0, "", 0, "", "")
    assert "read from disk" in again.output


def test_several_processes_that_measure_other_bits_are_refused(recipe: Path) -> None:
    command = ["-m", "dashq", "analyze", str(recipe), "--set", f"output={recipe.with_name('none')}", "--bits"]
    said = "".join(outcome.errors for outcome in run_together([[*command, "2"], [*command, "4"]]))
    assert "process 1 of 2 would not do the same: --bits is 4 where the first has 2" in said
    assert not recipe.with_name("none").exists()


def test_several_processes_need_as_many_shares_and_no_whole_model(recipe: Path) -> None:
    output = f"output={recipe.with_name('none')}"
    one_sample = ["-m", "dashq", "analyze", str(recipe), "--set", output, "--set", "calibration.samples=1"]
    outcomes = run_together([one_sample] * 2)
    assert [outcome.code for outcome in outcomes] == [2, 2]
    errors = "".join(outcome.errors for outcome in outcomes)
    assert "2 processes are more than the 1 shares that the samples of the recipe make" in errors
    whole = execute("analyze", recipe, "--processes", "2", "--kl", "--set", output)
    assert whole.code == 2
    assert "--kl quantizes one layer at a time in the whole model, which one process does, not 2" in whole.errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "2,nine"], r"--bits 2,nine: expected numbers from 1 to 8"),
        (["--bits", "9"], r"--bits 9: expected numbers from 1 to 8"),
        (["--snr", "down_proj"], r"--snr down_proj matches no layer; a match is for the whole name.*model\.layers\.0"),
        (["--snr", "("], r"--snr: '\(' is no regular expression"),
        (["--kl", "--text", "absent.txt"], r"no file .*absent\.txt"),
        (["--set", "budget=1"], r"budget\.bits_per_weight: 1 cannot be met"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_measured(
    arguments: list[str], message: str, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dashq.model.decoder.Model._read", lambda *arguments: pytest.fail("weights are read"))
    outcome = call("analyze", recipe, *arguments)
    assert outcome.code == 2
    assert re.search(message, outcome.errors, re.DOTALL)


def test_without_matplotlib_a_plot_is_refused_with_what_to_install(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "dashq_cli.charts", raising=False)
    monkeypatch.delattr("dashq_cli.charts", raising=False)
    outcome = call("analyze", recipe, "--plot", "svg")
    assert outcome.code == 2
    assert "--plot needs matplotlib, which is not installed: pip install 'dashq[plot]'" in outcome.errors
