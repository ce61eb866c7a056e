"""A run ends with a judgement: the result's predictions beside the original's, on text that calibration did not see."""

import io
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from commands import call
from dashq import Event, LayerDone, load_recipe, run
from dashq.calibration.tokens import Drawn, draw
from dashq.measuring import judgement as under_test
from dashq.measuring.judgement import ORIGINAL, QUANTIZED, Judge, judged_tokens
from dashq.processes.group import Processes
from dashq.quantizing.opening import open_model
from dashq.results.judged import Judgement
from dashq.results.report import read_report
from dashq_cli.progress import print_summary
from family_results import FamilyResults
from pico import beginning_tokenizer
from recipes import REGISTRY, TEXT, build_recipe, small_recipe, small_scheme, write_recipe

pytestmark = pytest.mark.usefixtures("sentences")


def logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    network: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return torch.cat([network(sample).logits[:, :-1] for sample in tokens.split(1)]).double()


def expected_judgement(model: Path, result: Path) -> Judgement:
    """By its definition, on the whole models."""
    recipe = load_recipe(result / "recipe.yaml", REGISTRY)
    drawn = draw(recipe.calibration, AutoTokenizer.from_pretrained(model))
    tokens = judged_tokens(drawn)
    original, quantized = logits(model, tokens), logits(result, tokens)
    p, q = original.log_softmax(-1), quantized.log_softmax(-1)
    losses = [functional.nll_loss(x.flatten(0, 1), tokens[:, 1:].flatten()).exp() for x in (q, p)]
    return Judgement(
        tokens=tokens[:, 1:].numel(),
        held_out=len(drawn.held_out) > 0,
        divergence=float((p.exp() * (p - q)).sum(-1).mean()),
        agreement=float((p.argmax(-1) == q.argmax(-1)).double().mean()),
        perplexity=float(losses[0]),
        original_perplexity=float(losses[1]),
    )


def assert_close(judgement: Judgement | None, expected: Judgement) -> None:
    """The same figures; of their errors only that they are there."""
    assert judgement
    figures = {name: value for name, value in vars(expected).items() if value is not None}
    assert {name: getattr(judgement, name) for name in figures} == pytest.approx(figures, rel=1e-4)
    errors = [value for name, value in vars(judgement).items() if name.endswith("_error")]
    assert len(errors) == 5
    assert all(error > 0 for error in errors)


@pytest.mark.parametrize("family", ["mixtral", "bamba"])
def test_the_judgement_is_that_of_the_opened_models(family: str, families: FamilyResults, tmp_path: Path) -> None:
    if family == "mixtral":
        result = families.result(family)
    else:
        result = run(build_recipe(families.model(family), tmp_path / "out", dtype="float32"))
    judgement = read_report(result).judgement
    assert_close(judgement, expected_judgement(families.model(family), result))
    assert judgement
    assert judgement.held_out
    assert judgement.divergence is not None
    assert judgement.divergence > 1e-4


@pytest.mark.parametrize("propagate", ["original", "sequential"])
def test_it_is_the_same_however_calibration_propagates_and_after_an_interruption(
    propagate: str, model: Path, tmp_path: Path
) -> None:
    calibration = TEXT | {"propagate": propagate}
    recipe = build_recipe(model, tmp_path / "out", dtype="float32", calibration=calibration)

    def interrupt(event: Event) -> None:
        if isinstance(event, LayerDone) and event.report.name.startswith("model.layers.2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, interrupt)
    result = run(recipe)
    assert_close(read_report(result).judgement, expected_judgement(model, result))


def test_a_model_that_was_not_changed_agrees_with_itself(model: Path, tmp_path: Path) -> None:
    recipe = build_recipe(model, tmp_path / "out")
    opened = open_model(recipe)
    judge = Judge(opened, draw(recipe.calibration, opened.tokenizer))
    for block in opened.walk():
        judge.pass_original(block)
        judge.pass_quantized(block)
    judgement = judge.judgement()
    assert (judgement.divergence, judgement.agreement, judgement.warning) == (0, 1, None)
    assert judgement.perplexity == judgement.original_perplexity


@pytest.mark.parametrize(("tokens", "unjudged"), [(["<s>"], 1), (["<s>", "<lang>"], 2)])
def test_tokens_that_begin_every_text_are_not_judged(
    tokens: list[str], unjudged: int, model: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    tokenizer = beginning_tokenizer(*tokens)
    tokenizer.save_pretrained(folder)
    recipe = build_recipe(folder, tmp_path / "out", dtype="float32")
    drawn = draw(recipe.calibration, tokenizer)
    assert drawn.beginning == unjudged
    result = run(recipe)
    judgement = read_report(result).judgement
    assert judgement
    pieces = judged_tokens(drawn)
    assert judgement.tokens == len(pieces) * (pieces.shape[1] - unjudged)
    predictions = logits(result, pieces)[:, unjudged - 1 :]
    loss = functional.nll_loss(predictions.log_softmax(-1).flatten(0, 1), pieces[:, unjudged:].flatten())
    assert judgement.perplexity == pytest.approx(float(loss.exp()), rel=1e-4)


def test_a_text_without_further_pieces_is_judged_on_its_samples_and_says_so(model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = tmp_path / "short.txt"
    text.write_text(str(tokenizer.decode(tokenizer("for else while " * 99)["input_ids"][:90])))
    recipe = build_recipe(model, tmp_path / "out", calibration=TEXT | {"dataset": str(text), "samples": 2})
    judgement = read_report(run(recipe)).judgement
    assert judgement
    assert (judgement.held_out, judgement.tokens) == (False, 2 * 39)
    assert "tokens of the calibration text" in str(judgement)


def test_long_samples_are_cut(model: Path, tmp_path: Path) -> None:
    recipe = build_recipe(model, tmp_path / "out", calibration=TEXT | {"sequence_length": 200})
    drawn = draw(recipe.calibration, AutoTokenizer.from_pretrained(model))
    long = Drawn(drawn.samples.repeat(1, 9), drawn.held_out.repeat(1, 9))
    assert judged_tokens(drawn).shape == (5, 200)
    assert judged_tokens(long).equal(long.held_out[:1, :1024])


def test_the_ratio_is_surer_than_either_perplexity(result: Path) -> None:
    judgement = read_report(result).judgement
    assert judgement
    assert judgement.perplexity
    assert judgement.original_perplexity
    assert judgement.ratio
    assert judgement.ratio == judgement.perplexity / judgement.original_perplexity
    assert judgement.ratio_error
    assert judgement.perplexity_error
    assert judgement.ratio_error / judgement.ratio < judgement.perplexity_error / judgement.perplexity


def test_summary_and_card_tell_the_judgement_and_warn(result: Path, tmp_path: Path) -> None:
    report = read_report(result)
    assert report.judgement
    assert f"| beside the original | {report.judgement} |" in (result / "README.md").read_text()
    bad = replace(report.judgement, divergence=5.0)
    content = json.dumps(replace(report, judgement=bad).to_json())
    (tmp_path / "report.json").write_text(content)
    console = Console(record=True, width=300, file=io.StringIO())
    print_summary(console, tmp_path)
    text = console.export_text()
    assert str(bad) in text
    assert f"warning {bad.warning}" in text


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("read_back", [False, True])
def test_every_piece_is_passed_once_and_all_processes_have_about_as_many(
    read_back: bool, count: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_model(build_recipe(model, tmp_path / "out"))
    judge = Judge(opened, Drawn(torch.ones(7, 128).long(), torch.ones(7, 128).long()), read_back)
    passes: list[list[list[int]]] = [[], []]  # the pieces of each process, by model
    for rank in range(count):
        monkeypatch.setattr(under_test, "here", lambda rank=rank: Processes(rank, count))
        for model_passes, of in zip(passes, (ORIGINAL, QUANTIZED), strict=True):
            model_passes.append(judge._own(of))
    for model_passes in passes:
        assert sorted(piece for own in model_passes for piece in own) == [*range(7)]
    # What goes through at a time: one model after the other, or both with the walk.
    loads = [[len(own) for own in model_passes] for model_passes in passes]
    for at_a_time in loads if read_back else [[sum(both) for both in zip(*loads, strict=True)]]:
        assert max(at_a_time) - min(at_a_time) <= 1


def test_predictions_that_are_no_numbers_are_no_traceback(model: Path, tmp_path: Path) -> None:
    recipe = build_recipe(model, tmp_path / "out")
    opened = open_model(recipe)
    judge = Judge(opened, draw(recipe.calibration, opened.tokenizer))
    for block in opened.walk():
        judge.pass_original(block)
        next(block.module.parameters()).data.fill_(math.nan)
        judge.pass_quantized(block)
    judgement = judge.judgement()
    assert (judgement.divergence, judgement.perplexity) == (None, None)
    assert judgement.original_perplexity
    assert judgement.warning


def test_a_converted_result_keeps_it(wide_model: Path, tmp_path: Path) -> None:
    result = run(build_recipe(wide_model, tmp_path / "native", scheme=small_scheme(64)))
    assert call("convert", result, "--to", "mlx", "--output", tmp_path / "mlx").code == 0
    assert read_report(tmp_path / "mlx").judgement == read_report(result).judgement is not None


@pytest.mark.parametrize(("bits", "warned"), [(2, True), (3, False)])
def test_a_grid_that_destroys_is_told_before_the_run(bits: int, warned: bool, wide_model: Path, tmp_path: Path) -> None:
    changes = {"scheme": small_scheme(64, bits=bits), "serializer": "compressed-tensors"}
    plan = call("plan", write_recipe(tmp_path / "recipe.yaml", small_recipe(wide_model, tmp_path / "out", **changes)))
    assert plan.code == 0
    assert ("symmetric zeros at 2 bits" in " ".join(plan.output.split())) == warned
