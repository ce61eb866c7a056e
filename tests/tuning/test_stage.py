"""A run with a tuner changes scales, offsets and norms alone, and gives the same bytes after a stop at any moment."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import dashq.results.shards
from dashq import TextError, run
from dashq.errors import OutputError
from dashq.results.convert import convert
from dashq.results.events import BlockDone, Event, RunStarted, Tuning
from dashq.results.output import Output
from dashq.results.report import read_report
from dashq.results.shards import ShardWriter
from dashq.results.verify import verify
from dashq.tuning import loop
from format_results import SCHEMES
from interruptions import Interruption, contents, interrupt, weights
from pico import EVEN, WIDE, pico_model
from recipes import REGISTRY, mixture_scheme, small_scheme
from tunings import DISTILL, LOSS_FACTOR, SHORT, TUNERS, quick_recipe


@pytest.fixture(autouse=True)
def _short_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dashq.calibration.tokens.TUNER_HELD_OUT_TOKENS", 80)
    LOSS_FACTOR[0] = 1.0


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def is_whole(folder: Path) -> bool:
    return all(check.passed for check in verify(folder, registry=TUNERS))


def both(model: Path, folder: Path, **changes: Any) -> tuple[Path, Path]:
    """A result without the tuner, and one with it."""
    changes = {"tuner": DISTILL, **changes}
    plain = quick_recipe(model, folder / "plain", TUNERS, **(changes | {"tuner": None}))
    return run(plain), run(quick_recipe(model, folder / "tuned", TUNERS, **changes))


def test_the_bytes_are_the_same_whether_there_is_room_for_a_steps_passes_or_not(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for name, free in (("kept", 2**40), ("repeated", 0)):
        monkeypatch.setattr("dashq.tuning.planned.free_memory", lambda device, free=free: free)
        results.append(weights(run(quick_recipe(model, tmp_path / name, tuner=DISTILL))))
    assert results[0] == results[1]


@pytest.mark.parametrize("family", ["llama", "llama-untied-biased"])
def test_quantized_embeddings_and_head_stay_and_are_computed_with(family: str, tmp_path: Path) -> None:
    entries: dict[str, Any] = {"embeddings": {"bits": 2}}
    entries |= {"head": {"bits": 2}} if family != "llama" else {}
    plain, tuned = both(pico_model(family, tmp_path / "model"), tmp_path, **entries)
    before, after = tensors(plain), tensors(tuned)
    outside = [name for name in before if name.startswith(("model.embed_tokens.", "lm_head."))]
    assert len(outside) == 3 * len(entries)
    assert all(before[name].equal(after[name]) for name in outside)
    assert not before["model.norm.weight"].equal(after["model.norm.weight"])
    assert is_whole(tuned)
    judged, learned = (read_report(folder) for folder in (plain, tuned))
    assert judged.judgement
    assert learned.judgement
    assert learned.tuned
    assert learned.judgement.divergence != judged.judgement.divergence


def test_scales_offsets_and_norms_change_and_nothing_else(model: Path, tmp_path: Path) -> None:
    plain, tuned = both(model, tmp_path)
    before, after = tensors(plain), tensors(tuned)
    assert before.keys() == after.keys()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert {name.rpartition(".")[2] for name in changed if "norm" not in name} == {"scale", "offset"}
    assert "model.norm.weight" in changed
    assert not [name for name in changed if name.endswith((".codes", "embed_tokens.weight"))]
    assert all(before[name].dtype is after[name].dtype for name in before)
    report = read_report(tuned)
    assert report.tuned
    assert report.tuned.best.divergence < report.tuned.before
    assert json.loads((tuned / "report.json").read_text())["tuned"]["checks"][0]["step"] == 0
    assert contents(plain).keys() == contents(tuned).keys()
    assert is_whole(tuned)


def test_a_rate_of_0_leaves_every_byte_of_the_weights(model: Path, tmp_path: Path) -> None:
    still = {"name": "descent", **SHORT, "rate": 0.0}
    runs = [
        run(quick_recipe(model, tmp_path / name, TUNERS, **changes))
        for name, changes in {"plain": {}, "tuned": {"tuner": still}}.items()
    ]
    assert weights(runs[0]) == weights(runs[1])
    plain, tuned = map(read_report, runs)
    assert [layer.digest for layer in plain.layers] == [layer.digest for layer in tuned.layers]
    assert plain.tensors == tuned.tensors


CASES: Mapping[str, Mapping[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "tuner's kinds": {"tuner": {**DISTILL, "scales": 0, "norms": 0}},
    "skipped layers": {"overrides": [{"match": ".*self_attn.*", "skip": True}]},
    "several bits": {"overrides": [{"match": ".*mlp.*", "bits": 4}]},
}


@pytest.mark.parametrize("name", CASES)
def test_other_recipes_are_tuned_as_well(name: str, model: Path, tmp_path: Path) -> None:
    plain, tuned = both(model, tmp_path, **CASES[name])
    before, after = tensors(plain), tensors(tuned)
    changed = {name.rpartition(".")[2] for name in before if not before[name].equal(after[name])}
    expected = {"offset"} if name == "tuner's kinds" else {"scale", "offset", "weight"}
    assert changed == expected
    report = read_report(tuned).tuned
    assert report
    assert report.best.divergence <= report.before


# Every kind of grid: real zeros, stored zeros, whole ones, symmetric ones, super-blocks of both kinds.
@pytest.mark.parametrize("label", ["mlx", "metal", "compressed-tensors-integer", "gptq-v1", "Q2_K", "Q3_K", "Q4_1"])
def test_every_format_holds_what_was_tuned(label: str, tmp_path: Path) -> None:
    serializer, bits, size, _ = SCHEMES[label]
    sizes: dict[str, Any] = WIDE | {"num_hidden_layers": 1}
    folder = pico_model("llama", tmp_path / "model", torch.float16, **sizes)
    scheme = small_scheme(size, bits=bits, solver="k_quant" if "_K" in label else "rtn")
    recipe = quick_recipe(folder, tmp_path / "out", scheme=scheme, serializer=serializer, tuner=DISTILL)
    tuned = run(recipe)
    assert is_whole(tuned)
    report = read_report(tuned).tuned
    assert report
    assert report.best.divergence <= report.before
    assert convert(tuned, recipe.serializer, tmp_path / "again")
    assert weights(tmp_path / "again") == weights(tuned)


def test_a_tuned_result_of_one_grid_is_converted_without_another_number(tmp_path: Path) -> None:
    folder = pico_model("llama", tmp_path / "model", torch.float16, **EVEN)
    recipe = quick_recipe(folder, tmp_path / "out", scheme=small_scheme(32, solver="rtn"), tuner=DISTILL)
    tuned = run(recipe)
    there = convert(tuned, REGISTRY.serializers["mlx"](), tmp_path / "mlx")
    back = convert(there, recipe.serializer, tmp_path / "back")
    assert weights(back) == weights(tuned)


@pytest.mark.parametrize("family", ["mixtral", "gpt2"])
def test_mixtures_and_transposed_weights_are_tuned(family: str, tmp_path: Path) -> None:
    folder = pico_model(family, tmp_path / "model", num_hidden_layers=2)
    scheme = mixture_scheme() if family == "mixtral" else small_scheme(solver="rtn")
    recipe = quick_recipe(folder, tmp_path / "out", scheme=scheme, tuner=DISTILL)
    report = read_report(run(recipe)).tuned
    assert report
    assert report.best.divergence < report.before


class Moments:
    """A run with a tuner, every part in a shard of its own, that is stopped at some moment and then goes on."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.recipe = quick_recipe(model, folder / "out", tuner=DISTILL | {"samples": 3})

    def stopped(self, listen: Callable[[Event], None] = lambda event: None) -> None:
        with pytest.raises(Interruption):
            run(self.recipe, listen)

    def resumed(self) -> dict[str, bytes]:
        return comparable(run(self.recipe))


def comparable(folder: Path) -> dict[str, bytes]:
    """The files of a result without seconds; and its report without them."""
    told = ("report.json", "report.html", "README.md")
    files = {name: content for name, content in contents(folder).items() if name not in told}
    report = json.loads((folder / "report.json").read_text())
    files["figures"] = json.dumps([report["tuned"], report["judgement"], report["tensors"], report["files"]]).encode()
    return files


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_model("llama", tmp_path_factory.mktemp("small") / "model", num_hidden_layers=1)


@pytest.fixture
def moments(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Moments:
    monkeypatch.setattr(dashq.results.shards, "SHARD_BYTES", 1)
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    return Moments(small_model, tmp_path)


@pytest.fixture
def whole(moments: Moments) -> dict[str, bytes]:
    """The same run undisturbed, at the same place."""
    files = comparable(run(moments.recipe))
    shutil.rmtree(moments.recipe.output)
    return files


@pytest.mark.parametrize("step", range(4))
def test_stopped_at_a_step_it_ends_with_the_same_bytes(step: int, moments: Moments, whole: dict[str, bytes]) -> None:
    def listen(event: Event) -> None:
        if isinstance(event, Tuning) and event.check.step == step:
            raise Interruption

    moments.stopped(listen)
    assert moments.resumed() == whole


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("done", [False, True])
def test_stopped_while_shards_change_it_ends_with_the_same_bytes(
    number: int, done: bool, moments: Moments, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    save, count = ShardWriter._save, [0]

    def failing(self: ShardWriter, name: str, *arguments: Any) -> Any:
        count[0] += name.startswith("tuned")
        is_last = name.startswith("tuned") and count[0] == number
        shard = save(self, name, *arguments) if done or not is_last else None
        if is_last:
            raise Interruption
        return shard

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "_save", failing)
        moments.stopped()
    assert moments.resumed() == whole


@pytest.mark.parametrize("method", ["finish", "report"])
def test_stopped_before_the_end_it_ends_with_the_same_bytes(
    method: str, moments: Moments, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Output, method, interrupt)
        moments.stopped()
    assert moments.resumed() == whole


def test_another_tuner_is_another_recipe(moments: Moments) -> None:
    def listen(event: Event) -> None:
        if isinstance(event, Tuning):
            raise Interruption

    moments.stopped(listen)
    other = moments.recipe.model_copy(update={"tuner": REGISTRY.tuners["distill"](**SHORT, seed=1)})
    for recipe in (other, moments.recipe.model_copy(update={"tuner": None})):
        with pytest.raises(OutputError, match="holds an unfinished run of a different recipe"):
            run(recipe)


def test_a_broken_state_is_one_clear_error_and_overwriting_begins_anew(
    moments: Moments, whole: dict[str, bytes]
) -> None:
    def listen(event: Event) -> None:
        if isinstance(event, Tuning) and event.check.step == 2:
            raise Interruption

    moments.stopped(listen)
    (moments.recipe.output / "dashq_tuning.safetensors").write_bytes(b"broken")
    with pytest.raises(OutputError, match=r"dashq_tuning\.safetensors is not as the interrupted run wrote it") as error:
        run(moments.recipe)
    assert "\n" not in str(error.value)
    assert comparable(run(moments.recipe, overwrite=True)) == whole


def test_numbers_that_end_are_said_in_the_report(model: Path, tmp_path: Path) -> None:
    broken = {"name": "descent", **SHORT, "rate": 1e-3, "broken_at": 0.5}
    out = run(quick_recipe(model, tmp_path / "out", TUNERS, tuner=broken))
    report = read_report(out).tuned
    assert report
    assert report.note == "it stopped at step 4 of 4, where predictions are no numbers"
    assert report.best.divergence <= report.before
    assert is_whole(out)


@pytest.mark.parametrize("name", ["idle", "foreign"])
def test_a_tuner_that_cannot_be_is_refused_by_name(name: str, small_model: Path, tmp_path: Path) -> None:
    recipe = quick_recipe(small_model, tmp_path / "out", TUNERS, tuner={"name": name, **SHORT})
    with pytest.raises(Exception, match=f"^tuner '{name}'"):
        run(recipe)


def test_too_little_text_is_refused_before_a_block_is_solved(small_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three " * 40)
    tuner = DISTILL | {"dataset": str(text), "samples": 400}
    recipe = quick_recipe(small_model, tmp_path / "out", tuner=tuner)
    heard: list[Event] = []
    with pytest.raises(TextError, match=r"text\.txt' has .* but its share is 400 samples: lower samples to"):
        run(recipe, heard.append)
    assert not any(isinstance(event, (RunStarted, BlockDone)) for event in heard)
