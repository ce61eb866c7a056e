"""Whatever a user can get wrong ends with exit code 2 and a message that says what, where, and the way out."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from commands import call
from pico import pico_model
from recipes import small_recipe, write_recipe

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_model("llama", tmp_path_factory.mktemp("bad") / "model", shard="100KB")


@pytest.fixture
def recipe(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A good recipe in the current folder, for a copy of the model."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(original, "model")
    return write_recipe(Path("recipe.yaml"), small_recipe(Path("model"), Path("out")))


def refusal(*arguments: object) -> str:
    """What a command says that must end with exit code 2, in one line for each mistake."""
    outcome = call(*arguments)
    assert outcome.code == 2, outcome
    assert "Traceback" not in outcome.errors + outcome.output
    assert re.search("^dashq: ", outcome.errors, re.MULTILINE)
    return outcome.errors


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        (
            "model: model",
            "modle: model",
            r"recipe\.yaml:1: modle: unknown key 'modle'\. Did you mean 'model'\? Allowed",
        ),
        ("samples: 3", "sampels: 3", r"recipe\.yaml:5: calibration\.sampels: unknown key .* Did you mean 'samples'\?"),
        ("size: 16", "sise: 16", r"recipe\.yaml:12: scheme\.grouper\.sise: unknown key .* Did you mean 'size'\?"),
        ("bits: 3", "bits: three", r"recipe\.yaml:8: scheme\.bits: should be a whole number, not 'three'"),
        ("bits: 3", "bits: 9", r"recipe\.yaml:8: scheme\.bits: .* less than or equal to 8, not 9"),
        (
            "solver: irls",
            "solver: irsl",
            r"recipe\.yaml:13: .*no solver named 'irsl'\. Did you mean 'irls'\? Installed: .*irls",
        ),
        ("scheme:", "scheme: {", r"recipe\.yaml:\d+: not valid YAML"),
    ],
)
def test_a_mistake_in_the_recipe_is_named_with_its_line(right: str, wrong: str, message: str, recipe: Path) -> None:
    text = recipe.read_text()
    assert right in text
    recipe.write_text(text.replace(right, wrong))
    for command in ("run", "plan"):
        assert re.search(message, refusal(command, recipe))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "scheme.grouper.size=32",
            r"layers\.0\..* and \d+ more: group size 32 does not divide 48 .*that do: .*16.*uneven",
        ),
        ("overrides=[{match: down_proj, bits: 2}]", r"override 1 \('down_proj'\) matches no layer; .*model\.layers\.0"),
        ("scheme.bits=none", r"--set scheme\.bits=none: scheme\.bits: should be a whole number, not 'none'"),
        ("calibration.samples=1000000", r"'pydoc' has \d+ tokens, .*lower samples to \d+"),
        ("calibration.dataset=empty.txt", r"'empty\.txt' holds no text"),
        ("calibration.dataset=absent.txt", r"no file .*absent\.txt"),
        (
            "calibration.dataset=org/name",
            r"'org/name' .*cannot be reached.*local file .*'pydoc', which is always there",
        ),
        ("model=org/name", r"model 'org/name' is neither a local folder .*nor to be had from the Hugging Face hub"),
        ("model=absent", r"no such model folder: .*absent"),
        ("model=recipe.yaml", r"recipe\.yaml is a file: a model is a folder, a \.gguf file, or a name on the hub"),
        ("output=foreign", r"output folder .*foreign exists and is not the result of an earlier run"),
        ("output=recipe.yaml", r"output .*recipe\.yaml is a file, not a folder"),
        ("output=recipe.yaml/below", r"cannot write to the output folder .*below: Not a directory"),
        ("device=tpu", r"device: should be auto, cpu, cuda or cuda:N, not 'tpu'"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_with_the_way_out(setting: str, message: str, recipe: Path) -> None:
    Path("empty.txt").write_text("")
    Path("foreign").mkdir()
    Path("foreign", "thesis.txt").write_text("all my work")
    assert re.search(message, refusal("run", recipe, "--set", setting), re.DOTALL)


def shard_with(tensor: str) -> Path:
    shard: str = json.loads(Path("model/model.safetensors.index.json").read_text())["weight_map"][tensor]
    return Path("model") / shard


def spoil(value: float) -> None:
    path = shard_with(DOWN)
    tensors = load_file(path)
    tensors[DOWN][0, 0] = value
    save_file(tensors, path, metadata={"format": "pt"})


def reshape() -> None:
    path = shard_with(DOWN)
    tensors = load_file(path)
    save_file(tensors | {DOWN: tensors[DOWN].T.contiguous()}, path, metadata={"format": "pt"})


def truncate() -> None:
    path = shard_with(DOWN)
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda: shard_with(DOWN).unlink(), r"model lacks 1 of \d shards: model-0000\d-of-0000\d\.safetensors"),
        (truncate, r"model-0000\d-of-0000\d\.safetensors is truncated or not a safetensors file"),
        (lambda: spoil(float("nan")), rf"the tensor {re.escape(DOWN)} holds NaN or infinite values"),
        (lambda: spoil(float("inf")), rf"the tensor {re.escape(DOWN)} holds NaN or infinite values"),
        (reshape, rf"tensor {re.escape(DOWN)} has shape \[80, 48\] where the model's configuration needs \[48, 80\]"),
        (lambda: Path("model/config.json").write_text("{"), r"model holds no readable config\.json"),
        (lambda: Path("model/tokenizer.json").write_text("{"), r"model holds no readable tokenizer"),
    ],
    ids=["missing shard", "truncated shard", "NaN", "Inf", "shape", "config", "tokenizer"],
)
def test_a_broken_model_is_named(damage: Callable[[], object], message: str, recipe: Path) -> None:
    damage()
    assert re.search(message, refusal("run", recipe))


def install(distribution: str, entry: str, module: str, code: str) -> None:
    """Lay a package with one plugin out on disk, as pip would."""
    info = Path("site", f"{distribution}-1.0.dist-info")
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[dashq]\n{entry} = {module}\n")
    Path("site", f"{module}.py").write_text(code)


PLUGIN = """
import dashq
from dashq_plugins.solvers.rtn import RoundToNearestSolver

class OtherSolver(RoundToNearestSolver):
    name = "{name}"
    needs = dashq.Full

@dashq.hookimpl
def {hook}():
    return [OtherSolver]
"""


@pytest.mark.parametrize(
    ("module", "code", "message"),
    [
        ("broken", "import nowhere_to_be_found", r"'bad' from bad-package does not load: .*DASHQ_DISABLE_PLUGINS=bad"),
        (
            "duplicate",
            PLUGIN.format(name="irls", hook="dashq_solvers"),
            r"two plugins bring a Solver named 'irls': .*solvers\.irls\.IrlsSolver and duplicate\.OtherSolver",
        ),
        (
            "misspelt",
            PLUGIN.format(name="full", hook="dashq_solver"),
            r"unknown hook 'dashq_solver' .*hooks are: .*dashq_solvers",
        ),
        (
            "misplaced",
            PLUGIN.format(name="full", hook="dashq_groupers"),
            r"misplaced\.OtherSolver.* is not a subclass of Grouper",
        ),
        (
            "demanding",
            PLUGIN.format(name="full", hook="dashq_solvers"),
            r"layers\.0\..* and 20 more: solver 'full' needs Full curvature, but estimator 'diagonal' produces Diag",
        ),
    ],
)
def test_a_plugin_that_does_not_fit_is_named(
    module: str, code: str, message: str, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("bad-package", "bad", module, code)
    monkeypatch.syspath_prepend(str(Path("site").absolute()))
    try:
        assert re.search(message, refusal("run", recipe, "--set", "scheme.solver=full"))
    finally:
        sys.modules.pop(module, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "absent.yaml"], r"cannot read the recipe absent\.yaml: No such file"),
        (["run", "recipe.yaml", "--set", "bits"], r"--set bits: expected key=value, such as scheme\.bits=3"),
        (["eval", "absent"], r"no such model folder: .*absent"),
        (["eval", "model", "--context", "9", "--text", "absent.txt"], r"no file .*absent\.txt"),
        (["eval", "model", "--context", "9", "--split", "dev"], r"'pydoc' has no split 'dev'.* It has: train, test"),
        (["eval", "model", "--context", "1000000"], r"--context 1000000 is more than the 256 positions of the model"),
        (["eval", "model", "--context", "9", "--dtype", "int3"], r"dtype: .*'int3'; use auto, float32"),
        (["eval", "model", "--context", "9", "--device", "tpu"], r"device: .*'tpu'"),
        (
            ["eval", "model", "--windows", "1", "--context", "9", "--json", "absent/figures.json"],
            r"absent/figures\.json",
        ),
        (["eval", "model", "absent"], r"no such model folder: .*absent"),
        (["eval", "model", "--tasks", "x", "--include-path", "absent"], r"no folder of tasks .*absent"),
    ],
)
def test_a_wrong_argument_is_named(arguments: list[str], message: str, recipe: Path) -> None:
    assert re.search(message, refusal(*arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "Missing argument 'RECIPE|MODEL'"),
        (["walk"], "No such command 'walk'"),
        (["run", "recipe.yaml", "--over"], "No such option: --over"),
        (["eval", "model", "--windows", "0"], "Invalid value for '--windows'"),
    ],
)
def test_a_command_that_does_not_exist_is_named(arguments: list[str], message: str) -> None:
    outcome = call(*arguments)
    assert outcome.code == 2
    assert message in outcome.errors


def test_eval_says_what_is_wrong_before_it_measures(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dashq.measuring.evaluate.load_model", lambda *arguments: pytest.fail("a model is opened"))
    for arguments in (
        ["--text", "pydoc", "--tasks", "typo", "--include-path", "absent"],
        ["--text", "absent.txt"],
        ["--json", "absent/figures.json"],
        ["absent"],
    ):
        refusal("eval", "model", *arguments)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("calibration.dataset=absent.txt", r"there is no file .*absent\.txt"),
        ("calibration.samples=1000000", r"'pydoc' has \d+ tokens, .*lower samples to \d+"),
        ("output=foreign", r"output folder .*foreign exists and is not the result of an earlier run"),
        ("output=recipe.yaml", r"output .*recipe\.yaml is a file, not a folder"),
        ("output=recipe.yaml/below", r"cannot write to the output folder .*below: "),
        (
            "tuner={name: distill, samples: 100000, sequence_length: 40}",
            r"'pydoc' has .* that calibration does not see",
        ),
        ("tuner={name: distill, dataset: absent.txt, sequence_length: 40}", r"there is no file .*absent\.txt"),
        ("tuner={name: distill, sequence_length: 4000}", r"tuner\.sequence_length 4000 is more than the 256 positions"),
        ("tuner={name: distill, sampels: 3}", r"tuner\.sampels: unknown key 'sampels'\. Did you mean 'samples'"),
    ],
)
def test_a_plan_refuses_what_a_run_would_stop_at(setting: str, message: str, recipe: Path) -> None:
    Path("foreign").mkdir()
    Path("foreign", "thesis.txt").write_text("all my work")
    for command in ("plan", "run"):
        assert re.search(message, refusal(command, recipe, "--set", setting))


def test_a_plan_writes_nothing_and_asks_the_hub_for_no_text(recipe: Path) -> None:
    before = sorted(Path.cwd().iterdir())
    assert call("plan", recipe).code == 0
    assert call("plan", recipe, "--set", "calibration.dataset=org/name").code == 0
    assert sorted(Path.cwd().iterdir()) == before


def test_a_format_that_is_not_installed_is_told_as_a_format() -> None:
    errors = refusal("convert", "out", "--to", "nope")
    assert re.fullmatch(r"dashq: no format named 'nope'\. Installed: .*gguf.*\n", errors)
