"""Only what a run wrote is ever deleted, a result never lies where its model does, and what is written stays."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from commands import call
from dashq import OutputError, Recipe, load_recipe, run
from dashq.model.location import Location
from dashq.results.folder import check_apart, check_folder, earlier_files
from format_results import FormatResults
from recipes import REGISTRY, build_recipe, small_recipe, write_recipe

# Another person's work, with names such as results have, or nearly.
WORK = (
    "LICENSE",
    "README.md",
    "config.json",
    "model-finetuned.safetensors",
    "tokenizer_notes.txt",
    "chat_template_old.jinja",
    "part-of-thesis.safetensors",
    "thesis.unfinished",
)
# Files that an earlier result does not hold.
OWN_WORK = (*WORK[3:], "LICENSE.mine", "model-00001-of-00002.safetensors.bak")
ALMOST_OURS = {
    "analysis.json": '{"layers": 3}',
    "report.json": '{"accuracy": 1, "versions": {"python": "3"}}',
    "report.jsonl": "{}",
    "report.json.old": "{}",
    "dashq_journal.json.txt": "{}",
    "analysis.json.bak": "{}",
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put(folder: Path, *names: str) -> dict[str, bytes]:
    """Write files of these names; returns the contents."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(f"all my work on {name}")
    return {name: (folder / name).read_bytes() for name in names}


def recipe_for(model: Path, output: str, folder: Path) -> Recipe:
    """A recipe, which lies in a folder, with this output."""
    return load_recipe(write_recipe(folder / "recipe.yaml", small_recipe(model, Path(output))), REGISTRY)


@pytest.fixture
def result(result: Path, tmp_path: Path) -> Path:
    """A copy of a result, to be changed."""
    return shutil.copytree(result, tmp_path / "out")


def without_list(result: Path) -> None:
    """Make the report that of a version that did not list files."""
    report = json.loads((result / "report.json").read_text())
    del report["files"]
    (result / "report.json").write_text(json.dumps(report))


@pytest.mark.parametrize("name", ALMOST_OURS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_files_that_are_almost_called_or_look_like_ours_is_left_alone(
    name: str, overwrite: bool, model: Path, tmp_path: Path
) -> None:
    put(tmp_path / "out", *WORK)
    (tmp_path / "out" / name).write_text(ALMOST_OURS[name])
    before = contents(tmp_path / "out")
    with pytest.raises(OutputError, match="exists and is not the result of an earlier run"):
        run(build_recipe(model, tmp_path / "out"), overwrite=overwrite)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("content", ["null", "7", "[]", '"versions"', '{"versions": 1}', "{", "[" * 100_000, "\udce9"])
def test_a_report_that_is_none_makes_no_folder_ours(content: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(OutputError, match="is not the result of an earlier run"):
        check_folder(tmp_path)


@pytest.mark.parametrize("older", [False, True], ids=["with a list of files", "of an earlier version"])
def test_what_users_put_into_a_result_stays_when_it_is_replaced(older: bool, result: Path, model: Path) -> None:
    if older:
        without_list(result)
    size = json.loads((result / "report.json").read_text())["totals"]["bytes_on_disk"]
    work = put(result, *OWN_WORK)
    run(build_recipe(model, result, overrides=[{"match": ".*", "bits": 1}]), overwrite=True)
    after = contents(result)
    assert work.items() <= after.items()
    report = json.loads(after["report.json"])
    assert {*report["files"]} == after.keys() - work.keys()
    assert report["totals"]["bytes_on_disk"] == (result / "model.safetensors").stat().st_size < size


@pytest.mark.parametrize("label", ["dashq", "gptq", "Q5_1"])
def test_the_report_lists_every_file_of_a_result(label: str, results: FormatResults) -> None:
    files = json.loads((results[label] / "report.json").read_text())["files"]
    assert files == sorted(path.name for path in results[label].iterdir())


def test_a_users_file_that_a_result_would_replace_is_named_and_kept(result: Path, model: Path) -> None:
    report = json.loads((result / "report.json").read_text())
    (result / "report.json").write_text(json.dumps(report | {"files": sorted({*report["files"]} - {"config.json"})}))
    before = contents(result)
    with pytest.raises(OutputError, match=f"no run wrote config.json in the output folder {result}"):
        run(build_recipe(model, result), overwrite=True)
    assert contents(result) == before


def test_a_measurement_alone_makes_no_other_file_ours(tmp_path: Path) -> None:
    (tmp_path / "analysis.json").write_text('{"versions": {"dashq": "0.1.0"}}')
    put(tmp_path, "notes.txt")
    check_folder(tmp_path)
    assert not earlier_files(tmp_path)
    put(tmp_path, "LICENSE")
    with pytest.raises(OutputError, match="no run wrote LICENSE"):
        check_folder(tmp_path)


@pytest.fixture
def place(model: Path, tmp_path: Path) -> Path:
    """A copy of the model in a folder of its own."""
    return shutil.copytree(model, tmp_path / "house" / "model")


@pytest.mark.parametrize("output", ["model", "model/../model", "link", "~/model", "model/below", "."])
def test_a_result_never_lies_where_its_model_does(
    output: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = place.parent
    monkeypatch.chdir(house)
    monkeypatch.setenv("HOME", str(house))
    (house / "link").symlink_to(place)
    for name in ("report.json", "model/report.json"):  # ours by its report, so that nothing else protects it
        (house / name).write_text('{"versions": {"dashq": "0.1.0"}}')
    before = contents(house)
    recipe = recipe_for(place, output, tmp_path)
    with pytest.raises(OutputError, match=f"the output .* would touch the model {place}: choose a folder outside"):
        run(recipe, overwrite=True)
    outcome = call("plan", tmp_path / "recipe.yaml")
    assert outcome.code == 2
    assert "would touch the model" in outcome.errors
    assert contents(house) == before


def test_the_folder_of_a_gguf_file_or_of_a_linked_shard_is_the_models_place(tmp_path: Path) -> None:
    put(tmp_path / "store", "model.gguf", "model.safetensors")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "link.gguf").symlink_to(tmp_path / "store" / "model.gguf")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").symlink_to(tmp_path / "store" / "model.safetensors")
    stored = Location(tmp_path / "store", "model.gguf")
    linked, shards = Location(tmp_path / "files", "link.gguf"), Location(tmp_path / "model")
    for location, output in ((stored, "store"), (linked, "files"), (linked, "store"), (shards, "store")):
        with pytest.raises(OutputError, match="would touch the model"):
            check_apart(tmp_path / output, location)
    check_apart(tmp_path / "store" / "model-2bit", stored)
    check_apart(tmp_path / "model-2bit", shards)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("x" * 241, r"the name of the output .*x is too long: a folder beside it needs 15 bytes more"),
        ("missing/../out", r"the output .*/out leads through .*/missing, which is no folder"),
    ],
)
def test_an_output_that_could_not_be_replaced_or_reached_is_refused_before_the_work(
    output: str, words: str, model: Path, tmp_path: Path
) -> None:
    for command in ("plan", "run"):
        outcome = call(command, write_recipe(tmp_path / "recipe.yaml", small_recipe(model, tmp_path / output)))
        assert outcome.code == 2
        assert re.fullmatch(f"dashq: {words}[^\\n]*\\n", outcome.errors)
        assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    possible = tmp_path / output.replace("missing/../", "")[:240]
    assert call("plan", write_recipe(tmp_path / "recipe.yaml", small_recipe(model, possible))).code == 0


def test_a_tilde_in_the_output_is_the_home_folder(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert recipe_for(model, "~/results/out", tmp_path).output == tmp_path / "results" / "out"
    with pytest.raises(OutputError, match="the output ~nobody-of-this-name/out"):
        recipe_for(model, "~nobody-of-this-name/out", tmp_path)


@pytest.mark.parametrize("mask", [0o027, 0o022])
def test_files_are_as_open_as_the_user_has_them(mask: int, model: Path, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        out = run(build_recipe(model, tmp_path / "out"))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o666 & ~mask}
