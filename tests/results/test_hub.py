"""A finished result is uploaded to the Hugging Face hub, and tells it nothing of this machine."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import RepoUrl

from commands import call
from dashq import OutputError
from dashq.results.card import Origin, model_card
from dashq.results.hub import check_repository, push
from dashq.results.report import read_report
from format_results import FormatResults
from recipes import REGISTRY, small_recipe, write_recipe

Calls = list[tuple[str, dict[str, Any]]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What is asked of a hub that agrees to everything."""
    heard: Calls = []

    class Api:
        def create_repo(self, repository: str, exist_ok: bool) -> RepoUrl:
            heard.append(("create", {"repository": repository, "exist_ok": exist_ok}))
            return RepoUrl(f"https://huggingface.co/me/{repository.split('/')[-1]}")

        def upload_folder(self, **options: Any) -> None:
            heard.append(("folder", options))

        def upload_file(self, **options: Any) -> None:
            heard.append(("file", options))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    return heard


def front_matter(card: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(card.split("---")[1])
    return content


def test_push_uploads_the_files_of_a_finished_result_alone(
    results: FormatResults, tmp_path: Path, calls: Calls
) -> None:
    out = tmp_path / "new"
    outcome = call("convert", results["metal"], "--to", "mlx", "--output", out, "--push-to-hub", "mine")
    assert outcome.code == 0, outcome.errors
    assert "https://huggingface.co/me/mine" in outcome.output
    (_, create), (_, folder), (_, recipe), (_, sent_card) = calls
    assert create == {"repository": "mine", "exist_ok": True}
    assert (folder["repo_id"], folder["folder_path"]) == ("me/mine", out)
    assert {*folder["allow_patterns"], "recipe.yaml", "README.md"} == {path.name for path in out.iterdir()}
    assert (recipe["path_in_repo"], sent_card["path_in_repo"]) == ("recipe.yaml", "README.md")
    code = sent_card["path_or_fileobj"].decode().partition("## How to open it")[2].partition("## Recipe")[0]
    assert 'load("me/mine")' in code
    assert "dashq chat me/mine" in code
    assert "mlx_lm.generate --model me/mine --prompt" in code


def test_nothing_that_is_pushed_names_a_folder_of_this_machine(
    results: FormatResults, tmp_path: Path, calls: Calls
) -> None:
    out = shutil.copytree(results["Q4_K"], tmp_path / "out")
    push(out, "me/mine")
    (_, folder), (_, file), (_, sent_card) = calls[1:]
    contents = [(out / name).read_bytes() for name in folder["allow_patterns"]]
    contents += [file["path_or_fileobj"], sent_card["path_or_fileobj"]]
    assert len(contents) > 5
    assert not [content for content in contents if str(results.model.parent).encode() in content]
    recipe = yaml.safe_load(file["path_or_fileobj"])
    assert (recipe["model"], recipe["output"]) == (results.model.name, results["Q4_K"].name)


def test_the_base_model_is_named_only_where_it_came_from_the_hub(results: FormatResults) -> None:
    report = read_report(results["dashq"])
    recipe = yaml.safe_load((results["dashq"] / "recipe.yaml").read_text())
    serializer = REGISTRY.serializers["dashq"]()
    local = front_matter((results["dashq"] / "README.md").read_text())
    task = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    assert local == {**task, "tags": ["dashq", "quantized", "3-bit"]}
    card = model_card(recipe, replace(report, base_model="org/name"), serializer, Origin())
    base = {"base_model": "org/name", "base_model_relation": "quantized"}
    assert front_matter(card) == {**local, **base}


def test_a_conversion_keeps_the_name_of_the_base_model(results: FormatResults, tmp_path: Path, calls: Calls) -> None:
    folder = shutil.copytree(results["metal"], tmp_path / "of_the_hub")
    report = replace(read_report(folder), base_model="org/name")
    (folder / "report.json").write_text(json.dumps(report.to_json()))
    assert call("convert", folder, "--to", "mlx", "--output", tmp_path / "new").code == 0
    assert front_matter((tmp_path / "new/README.md").read_text())["base_model"] == "org/name"
    assert read_report(tmp_path / "new").base_model == "org/name"


@pytest.mark.parametrize("name", ["a b/c", "one/two/three", "", "x" * 200, "me/..", "/me"])
def test_what_cannot_name_a_repository_is_refused_before_anything_is_done(
    name: str, model: Path, tmp_path: Path, calls: Calls
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", small_recipe(model, tmp_path / "out"))
    outcome = call("run", recipe, "--push-to-hub", name)
    assert outcome.code == 2
    assert f"{name!r} cannot name a repository of the hub: " in outcome.errors
    assert len(outcome.errors.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert not calls


def test_no_run_begins_without_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(OutputError, match=r"without a token of the hub: `hf auth login` keeps one, or set HF_TOKEN"):
        check_repository("me/mine")


@pytest.mark.parametrize("error", [ConnectionError("no network"), ValueError("Invalid metadata\nin README.md")])
def test_what_the_hub_or_the_network_says_is_one_line(
    error: Exception, results: FormatResults, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def fail(self: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", fail)
    with pytest.raises(OutputError, match=r"cannot push to 'me/mine': .*\. The result is whole in .*") as caught:
        push(results["mlx"], "me/mine")
    assert "\n" not in str(caught.value)
