"""transformers is asked with trust said explicitly, of local files alone, and its errors become one line."""

import ast
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from commands import call
from dashq import CheckpointError, run
from dashq.model.loading import is_language_model, read_config, read_network, read_tokenizer
from dashq.model.location import Location
from family_results import FamilyResults
from own_code import CODE, UNRELATED, with_own_code
from recipes import build_recipe, small_recipe, write_recipe

ROOT = Path(__file__).parents[2]
CALLS = {"from_pretrained", "from_config"}
UNPACKERS = "AutoHfQuantizer"  # of transformers' own, which read no code of a model's


def trust_is_said(call: ast.Call) -> bool:
    """True for a keyword of its own, or the arguments of a `Location`."""
    return any(
        keyword.arg == "trust_remote_code"
        or (keyword.arg is None and isinstance(keyword.value, ast.Attribute) and keyword.value.attr == "arguments")
        for keyword in call.keywords
    )


def test_every_call_of_transformers_says_whether_the_models_own_code_is_trusted() -> None:
    calls = {
        f"{path}:{node.lineno}": trust_is_said(node)
        for room in ("core", "plugins")
        for path in sorted(ROOT.glob(f"{room}/**/*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in CALLS
        and not (isinstance(node.func.value, ast.Name) and node.func.value.id == UNPACKERS)
    }
    assert len(calls) >= 5
    assert all(calls.values()), [place for place, said in calls.items() if not said]


def test_what_is_local_is_opened_without_the_hub(tmp_path: Path) -> None:
    assert Location(tmp_path).arguments["local_files_only"] is True


@pytest.mark.parametrize(
    "content", ["null", "7", "[]", '"text"', "\xff", '{"model_type": "llama", "hidden_size": "x"}']
)
def test_a_configuration_of_any_kind_is_refused_in_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"holds no readable config\.json") as caught:
        read_config(Location(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def own(families: FamilyResults, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_own_code(families.model("llama"), tmp_path_factory.mktemp("own") / "model")


@pytest.fixture(scope="module")
def own_result(own: Path) -> Path:
    return run(build_recipe(own, own.with_name("out"), trust_remote_code=True))


def test_a_result_has_the_code_that_its_model_needs_and_no_other(own_result: Path) -> None:
    assert {path.name: path.read_text() for path in own_result.glob("*.py")} == CODE
    assert not (own_result / UNRELATED).exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("verify",),
        ("convert", "--to", "{name: dashq, dtype: bfloat16}"),
        ("tune", "--tuner", "{name: distill, samples: 2, sequence_length: 40}"),
        ("eval", "--context", "32", "--windows", "1"),
        ("eval", "--no-original", "--context", "32", "--windows", "1"),
    ],
)
def test_code_beside_a_result_runs_only_where_the_option_says_so(
    arguments: tuple[str, ...], own_result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is asked, and its own recipe is no proof: whoever made the folder wrote that as well."""
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("asked for trust"))
    folder = shutil.copytree(own_result, tmp_path / "out")
    (folder / "configuration_own.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n" + CODE["configuration_own.py"]
    )
    monkeypatch.chdir(tmp_path)
    command, *options = arguments
    outcome = call(command, folder, *options)
    assert outcome.code == 2, outcome
    assert len([line for line in outcome.errors.splitlines() if line.strip()]) == 1
    assert "`trust_remote_code: true` in the recipe, or --trust-remote-code" in outcome.errors
    assert not Path("ran").exists()
    outcome = call(command, folder, *options, "--trust-remote-code")
    assert Path("ran").exists(), outcome
    # The code has changed since the run, which verify says; convert would have to solve again.
    assert outcome.code == {"verify": 1, "convert": 2, "tune": 0, "eval": 0}[command], outcome


def test_commands_with_a_recipe_take_its_word(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("asked for trust"))
    path = write_recipe(tmp_path / "r.yaml", small_recipe(own, tmp_path / "out"))
    for command in ("plan", "analyze", "run"):
        outcome = call(command, path)
        assert outcome.code == 2, outcome
        assert "`trust_remote_code: true` in the recipe" in outcome.errors
    assert call("plan", path, "--set", "trust_remote_code=true").code == 0


def test_code_of_another_repository_is_not_fetched(own: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(own, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "org/other--configuration_own.OwnConfig"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"names code of another repository, org/other"):
        read_config(Location(folder, trust_remote_code=True))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["null", "[1]", "3"])
def test_a_file_of_the_tokenizer_that_is_no_mapping_is_named(name: str, content: str, model: Path) -> None:
    (model / name).write_text(content)
    with pytest.raises(CheckpointError) as refusal:
        read_tokenizer(Location(model))
    kind = type(json.loads(content)).__name__
    assert str(refusal.value) == f"{model} holds no readable tokenizer: {name}: it holds {kind}, not a mapping"


@pytest.mark.parametrize("setting", [{"model_max_length": "many"}, {"model_max_length": [1]}])
def test_a_tokenizer_that_takes_no_text_is_refused(setting: dict[str, object], model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "copy")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    recipe = write_recipe(tmp_path / "recipe.yaml", small_recipe(folder, tmp_path / "out"))
    for command in (["plan", recipe], ["run", recipe], ["eval", folder, "--context", "16"]):
        outcome = call(*command)
        assert outcome.code == 2
        assert outcome.errors.startswith(f"dashq: {folder} holds no readable tokenizer: TypeError: ")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.2.mlp.down_proj.weight"])
def test_weights_are_not_made_up(name: str, families: FamilyResults, tmp_path: Path) -> None:
    folder = without(name, families.model("llama"), tmp_path / "copy")
    with pytest.raises(CheckpointError, match=f"^{folder} lacks 1 tensors of its model, the first is {name}$"):
        read_network(Location(folder))
    outcome = call("eval", folder, "--context", "16", "--windows", "1")
    assert outcome.code == 2
    assert outcome.errors.strip() == f"dashq: {folder} lacks 1 tensors of its model, the first is {name}"


def test_weights_of_a_result_are_not_made_up_either(result: Path, tmp_path: Path) -> None:
    folder = without("model.norm.weight", result, tmp_path / "result")
    outcome = call("eval", folder, "--context", "16", "--windows", "1")
    assert outcome.code == 2
    assert outcome.errors.strip() == f"dashq: {folder} lacks 1 tensors of its model, the first is model.norm.weight"


def without(name: str, model: Path, folder: Path) -> Path:
    """A copy of a model whose file lacks a tensor."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("kind", "known"), [("llama", True), ("gemma3", True), ("llava", False), ("unheard_of", False)]
)
def test_types_that_transformers_opens_as_language_models_are_known(kind: str, known: bool) -> None:
    assert is_language_model(kind) == known
