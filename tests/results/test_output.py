"""An output folder harms nobody's files, goes on after an interruption, and is complete."""

import itertools
import json
import os
import shutil
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import dashq.results.shards
from dashq import OutputError, Recipe, run
from dashq.model.decoder import OUTSIDE
from dashq.results.card import OPENINGS
from dashq.results.events import Event, LayerDone
from dashq.results.folder import RESULT_FILES
from dashq.results.output import Output
from dashq.results.report import LayerReport
from format_results import SCHEMES, FormatResults
from interruptions import Interruption, after_layers, contents, interrupt, weights
from pico import pico_model
from recipes import REGISTRY, TEXT, build_recipe, small_scheme


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part of the model fills a shard."""
    monkeypatch.setattr(dashq.results.shards, "SHARD_BYTES", 1)


def test_a_folder_of_somebody_else_is_refused_untouched(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("all my work")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=f"{tmp_path / 'out'} exists and is not the result of an earlier run"):
            run(build_recipe(model, tmp_path / "out"), overwrite=overwrite)
    assert contents(tmp_path / "out") == {"thesis.txt": b"all my work"}


def test_the_model_itself_is_never_the_output(model: Path) -> None:
    before = contents(model)
    with pytest.raises(OutputError, match=f"the output {model} would touch the model {model}"):
        run(build_recipe(model, model), overwrite=True)
    assert contents(model) == before


def test_a_file_in_the_way_is_refused_untouched(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("all my work")
    with pytest.raises(OutputError, match=f"the output {tmp_path / 'out'} is a file, not a folder"):
        run(build_recipe(model, tmp_path / "out"), overwrite=True)
    assert (tmp_path / "out").read_text() == "all my work"


def test_a_folder_that_cannot_be_written_is_named_with_the_reason(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    recipe = build_recipe(model, tmp_path / "out").model_copy(update={"output": tmp_path / "file" / "below"})
    with pytest.raises(OutputError, match=f"cannot write to the output folder {tmp_path}/file/below: Not a directory"):
        run(recipe)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named_with_the_reason(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o500)
    with pytest.raises(OutputError, match=f"cannot write to the output folder {tmp_path}/out: Permission denied"):
        run(build_recipe(model, tmp_path / "out"))


def test_a_finished_result_is_replaced_only_when_asked(model: Path, tmp_path: Path) -> None:
    out = run(build_recipe(model, tmp_path / "out"))
    before = contents(out)
    coarse = build_recipe(model, out, overrides=[{"match": ".*", "bits": 1}])
    with pytest.raises(OutputError, match="already holds a finished result; --overwrite replaces it"):
        run(coarse)
    assert contents(out) == before
    run(coarse, overwrite=True)
    assert {layer["bits"] for layer in json.loads((out / "report.json").read_text())["layers"]} == {1}


@pytest.mark.usefixtures("small_shards")
def test_replacing_removes_the_whole_earlier_result_and_nothing_else(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = shutil.copytree(model, tmp_path / "plain")
    (plain / "generation_config.json").unlink()
    (plain / "chat_template.jinja").unlink()
    fresh = run(build_recipe(plain, tmp_path / "fresh"))
    monkeypatch.setattr(dashq.results.shards, "SHARD_BYTES", 2**30)
    out = run(build_recipe(model, tmp_path / "out"))
    (out / "notes.txt").write_text("mine")
    monkeypatch.setattr(dashq.results.shards, "SHARD_BYTES", 1)
    run(build_recipe(plain, out), overwrite=True)
    assert contents(out).keys() == contents(fresh).keys() | {"notes.txt"}
    assert weights(out) == weights(fresh)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize(
    ("propagate", "correction", "overwrite"),
    [("original", 0, False), ("quantized", 0, True), ("sequential", 0.5, True)],
)
def test_an_interrupted_run_goes_on_and_ends_in_the_same_bytes(
    propagate: str, correction: float, overwrite: bool, model: Path, tmp_path: Path
) -> None:
    def recipe(output: str) -> Recipe:
        text = TEXT | {"propagate": propagate, "error_correction": correction}
        return build_recipe(model, tmp_path / output, calibration=text)

    events: list[Event] = []
    whole = run(recipe("whole"), events.append)
    layers = [event.report.name for event in events if isinstance(event, LayerDone)]
    per_block = len(layers) // 3

    with pytest.raises(Interruption):
        run(recipe("resumed"), after_layers(per_block + 2), overwrite)
    events.clear()
    resumed = run(recipe("resumed"), events.append, overwrite)
    assert [event.report.name for event in events if isinstance(event, LayerDone)] == layers[per_block:]
    assert weights(resumed) == weights(whole)
    assert contents(resumed).keys() == contents(whole).keys()
    assert (resumed / "config.json").read_bytes() == (whole / "config.json").read_bytes()
    names = [layer["name"] for layer in json.loads((resumed / "report.json").read_text())["layers"]]
    assert names == layers


@pytest.mark.usefixtures("small_shards", "sentences")
@pytest.mark.parametrize("layers", [3, 8, 9])  # in the block, between embeddings and head, and behind both
def test_a_run_that_quantizes_embeddings_and_head_goes_on_and_ends_in_the_same_bytes(
    layers: int, tmp_path: Path
) -> None:
    pico_model("llama-untied-biased", tmp_path / "model", num_hidden_layers=1)

    def recipe(output: str) -> Recipe:
        text = TEXT | {"propagate": "sequential", "error_correction": 0.5}
        entries: dict[str, Any] = {"embeddings": {"bits": 4}, "head": {"bits": 5}}
        return build_recipe(tmp_path / "model", tmp_path / output, calibration=text, **entries)

    whole = run(recipe("whole"))
    with pytest.raises(Interruption):
        run(recipe("resumed"), after_layers(layers))
    events: list[Event] = []
    resumed = run(recipe("resumed"), events.append)
    solved = [event.report.name for event in events if isinstance(event, LayerDone)]
    assert solved[-2:] == ["model.embed_tokens", "lm_head"]
    assert len(solved) == (9 if layers < 7 else 2)
    assert weights(resumed) == weights(whole)
    reports = [json.loads((folder / "report.json").read_text()) for folder in (whole, resumed)]
    assert reports[0]["judgement"] == reports[1]["judgement"]


@pytest.mark.usefixtures("small_shards")
def test_another_recipe_does_not_go_on_with_an_interrupted_run(model: Path, tmp_path: Path) -> None:
    with pytest.raises(Interruption):
        run(build_recipe(model, tmp_path / "out"), after_layers(10))
    before = contents(tmp_path / "out")
    other = build_recipe(model, tmp_path / "out", overrides=[{"match": ".*", "bits": 4}])
    with pytest.raises(OutputError, match="holds an unfinished run of a different recipe; --overwrite discards it"):
        run(other)
    assert contents(tmp_path / "out") == before
    assert "report.json" in contents(run(other, overwrite=True))


def test_the_same_recipe_gives_the_same_bytes_in_one_shard_or_in_several(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, same = (run(build_recipe(model, tmp_path / name)) for name in ("one", "same"))
    assert weights(one) == weights(same)
    assert weights(one).keys() == {"model.safetensors"}

    monkeypatch.setattr(dashq.results.shards, "SHARD_BYTES", 1)
    several = run(build_recipe(model, tmp_path / "several"))
    shards = [f"model-{number:05}-of-00004.safetensors" for number in range(1, 5)]
    assert weights(several).keys() == {*shards, "model.safetensors.index.json"}
    whole, parts = load_file(one / "model.safetensors"), [load_file(several / shard) for shard in shards]
    assert sum(map(len, parts)) == len(whole)
    for part in parts:
        for name, tensor in part.items():
            assert torch.equal(tensor, whole[name]), name
    ids = torch.arange(9)[None]
    logits = [AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (one, several)]
    assert torch.equal(*logits)


def test_embeddings_and_head_leave_memory_before_the_first_layer(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    add = Output.add

    def note(self: Output, part: str, tensors: Mapping[str, Tensor], layers: Iterable[LayerReport] = ()) -> None:
        outside.extend(map(weakref.ref, tensors.values()) if part == OUTSIDE else ())
        add(self, part, tensors, layers)

    monkeypatch.setattr(Output, "add", note)
    run(build_recipe(model, tmp_path / "out"), lambda event: alive.append(sum(ref() is not None for ref in outside)))
    assert outside
    assert alive[1:] == [0] * (len(alive) - 1)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("other_recipe", [False, True])
def test_half_a_shard_does_not_outlive_the_next_start(
    other_recipe: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()

    def write_half(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        save_file(tensors, path, metadata)
        if next(calls) == 1:
            os.truncate(path, path.stat().st_size // 2)
            raise Interruption

    monkeypatch.setattr(dashq.results.shards, "save_file", write_half)
    folder = tmp_path / "out"
    with pytest.raises(Interruption):
        run(build_recipe(model, folder))
    assert set(contents(folder)) == {
        "dashq_journal.json",
        "part-00001.safetensors",
        "part-00002.safetensors.unfinished",
    }
    changes: dict[str, Any] = {"certificate_groups": 8} if other_recipe else {}
    with pytest.raises(Interruption):
        run(build_recipe(model, folder, **changes), interrupt, overwrite=other_recipe)
    kept = set() if other_recipe else {"part-00001.safetensors"}
    assert set(contents(folder)) == {"dashq_journal.json"} | kept


def test_shards_beside_a_finished_file_go_at_the_next_touch(results: FormatResults, tmp_path: Path) -> None:
    scheme, serializer = small_scheme(32, bits=8, solver="rtn"), {"name": "gguf"}
    recipe = build_recipe(results.model, tmp_path / "out", scheme=scheme, serializer=serializer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", interrupt)
        with pytest.raises(Interruption):
            run(recipe)
    finished = contents(tmp_path / "out")
    assert {"part-00001.safetensors", "dashq_journal.json", "report.json", "model.gguf"} <= finished.keys()
    with pytest.raises(OutputError, match="already holds a finished result"):
        run(recipe)
    for name in ("part-00001.safetensors", "dashq_journal.json", "dashq.lock"):
        del finished[name]
    assert contents(tmp_path / "out") == finished


def test_only_licence_files_of_the_model_itself_are_carried(model: Path, tmp_path: Path) -> None:
    source = shutil.copytree(model, tmp_path / "model")
    (source / "LICENSES").mkdir()
    (source / "LICENSE-gone").symlink_to(source / "absent")
    (tmp_path / "private.txt").write_text("a secret")
    (source / "LICENSE-private").symlink_to(tmp_path / "private.txt")
    (source / "terms.txt").write_text("do as you like")
    (source / "LICENSE").symlink_to(source / "terms.txt")
    out = run(build_recipe(source, tmp_path / "out"))
    assert {path.name: path.read_text() for path in out.glob("LICENSE*")} == {"LICENSE": "do as you like"}
    assert not (out / "LICENSE").is_symlink()


def test_replacing_removes_the_files_of_another_format(results: FormatResults, tmp_path: Path) -> None:
    folder = shutil.copytree(results["Q5_1"], tmp_path / "out")
    (folder / "notes.txt").write_text("mine")
    run(build_recipe(results.model, folder, certificate_groups=0), overwrite=True)
    assert not (folder / "model.gguf").exists()
    assert (folder / "notes.txt").exists()


@pytest.mark.usefixtures("small_shards")
def test_a_broken_journal_is_told_and_can_be_overwritten(model: Path, tmp_path: Path) -> None:
    recipe = build_recipe(model, tmp_path / "out")
    with pytest.raises(Interruption):
        run(recipe, after_layers(10))
    journal = tmp_path / "out" / "dashq_journal.json"
    for text in ("{", json.dumps({"recipe": {}, "seconds": {}, "shards": [{"parts": []}]})):
        journal.write_text(text)
        with pytest.raises(OutputError, match=f"{journal} is not as dashq writes it; --overwrite discards the run"):
            run(recipe)
    assert (run(recipe, overwrite=True) / "report.json").exists()


@pytest.mark.parametrize("label", SCHEMES)
def test_a_format_tells_all_files_that_its_results_hold(label: str, results: FormatResults) -> None:
    told = REGISTRY.serializers[format_of(label)].files
    known = {path for pattern in (*RESULT_FILES, *told) for path in results[label].glob(pattern)}
    assert set(results[label].iterdir()) == known


def format_of(label: str) -> str:
    serializer = SCHEMES[label][0]
    return serializer if isinstance(serializer, str) else serializer["name"]


@pytest.mark.parametrize("label", SCHEMES)
def test_every_folder_is_complete(label: str, results: FormatResults) -> None:
    folder = results[label]
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "LICENSE"} <= names
    assert {"README.md", "recipe.yaml", "report.json"} <= names
    assert {"model.gguf"} <= names if format_of(label) == "gguf" else {"model.safetensors"} <= names
    assert not any(name.startswith("part-") or name.endswith(".unfinished") for name in names)
    card = (folder / "README.md").read_text()
    assert "bits per weight" in card
    assert OPENINGS in card
