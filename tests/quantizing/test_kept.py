"""What calibration learned is read where it would be the same, and the result is the same; anything else is not."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from dashq import Diagonal, Estimator, Layer, PlanError, Recipe, load_registry, make_plan, run
from dashq.calibration.tokens import draw_for
from dashq.errors import OutputError
from dashq.quantizing import kept
from dashq.quantizing.kept import Kept, bytes_to_keep, parts_of, remove_kept
from dashq.quantizing.opening import open_model, plan_model
from dashq.results.events import Event, RunStarted
from dashq.results.report import read_report
from family_results import FamilyResults
from interruptions import Interruption, after_layers, weights
from passing import Passes
from recipes import FEEDBACK, REGISTRY, TEXT, build_recipe, mixture_scheme, small_recipe, small_scheme, write_recipe
from spread import run_spread

HYBRID = {"name": "hybrid", "chunk": 8}
SCHEME = small_scheme(solver="rtn")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    return Passes(monkeypatch)


def text(folder: Path, **changes: Any) -> dict[str, Any]:
    return TEXT | {"keep": str(folder / "kept")} | changes


def recipe_of(model: Path, folder: Path, name: str, **changes: Any) -> Recipe:
    """A recipe that keeps what calibration learns beside its output."""
    usual: dict[str, Any] = {"calibration": text(folder), "scheme": SCHEME}
    return build_recipe(model, folder / name, REGISTRY, **(usual | changes))


def files_in(folder: Path) -> list[Path]:
    return sorted((folder / "kept").glob("*/*.safetensors"))


@pytest.mark.parametrize("estimator", ["diagonal", "full", HYBRID, {"name": "block_diagonal", "size": 16}])
def test_the_result_is_the_same_with_and_without(
    model: Path, tmp_path: Path, passes: Passes, estimator: object
) -> None:
    solver = "irls" if estimator == "diagonal" else FEEDBACK
    common: dict[str, Any] = {"scheme": small_scheme(estimator=estimator, solver=solver), "head": {"bits": 4}}
    expected = run(build_recipe(model, tmp_path / "without", **common))
    keeping = recipe_of(model, tmp_path, "keeping", **common)
    assert passes.of(keeping) > 0
    assert passes.said == f"what calibration learns is kept in {files_in(tmp_path)[0].parent}"
    assert len(files_in(tmp_path)) == 4  # three blocks, and the head
    taking = recipe_of(model, tmp_path, "taking", **common)
    assert passes.of(taking) == 0
    assert passes.said.startswith("calibration is not done again: what an earlier run learned is read from ")
    assert weights(keeping.output) == weights(taking.output) == weights(expected)
    reports = [read_report(folder) for folder in (expected, keeping.output, taking.output)]
    assert [report.calibration for report in reports] == ["done", "done", "read"]
    assert ["calibrate" in report.seconds for report in reports] == [True, True, False]
    assert [layer.tokens for layer in reports[0].layers] == [layer.tokens for layer in reports[2].layers]


@pytest.mark.parametrize("estimator", ["diagonal", HYBRID])
def test_experts_and_their_pooled_sums_are_kept_too(
    families: FamilyResults, tmp_path: Path, passes: Passes, estimator: object
) -> None:
    model = families.model("qwen2_moe")
    scheme = mixture_scheme(estimator=estimator, router="gated", pooling_tokens=8)
    expected = run(build_recipe(model, tmp_path / "without", scheme=scheme))
    run(recipe_of(model, tmp_path, "keeping", scheme=scheme))
    taking = recipe_of(model, tmp_path, "taking", scheme=scheme)
    assert passes.of(taking) == 0
    assert weights(taking.output) == weights(expected)
    assert read_report(taking.output).totals.mixtures == read_report(expected).totals.mixtures
    pooled = recipe_of(model, tmp_path, "pooled", scheme=scheme | {"pooling_tokens": 0})
    assert passes.of(pooled) == 0  # what the pooled sums weigh is no part of them
    other = recipe_of(model, tmp_path, "other", scheme=scheme | {"router": "routed"})
    assert passes.of(other) > 0


def test_bits_groups_solver_and_format_are_free(model: Path, tmp_path: Path, passes: Passes) -> None:
    run(recipe_of(model, tmp_path, "first"))
    changes: dict[str, Any] = {
        "scheme": small_scheme(bits=4, solver="irls"),
        "serializer": {"name": "metal", "dtype": "float32"},
    }
    other = recipe_of(model, tmp_path, "other", **changes)
    assert passes.of(other) == 0
    assert weights(other.output) == weights(run(build_recipe(model, tmp_path / "without", **changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {"calibration": {"seed": 1}},
        {"calibration": {"samples": 4}},
        {"scheme": small_scheme(estimator={"name": "diagonal", "damping": 0.1})},
        {"dtype": "float32"},
        {"overrides": [{"match": r".*\.1\..*up_proj", "estimator": "full"}]},
        {"head": {"bits": 4}},
    ],
)
def test_what_would_not_be_the_same_is_not_taken(
    model: Path, tmp_path: Path, passes: Passes, changes: dict[str, Any]
) -> None:
    run(recipe_of(model, tmp_path, "first", dtype="bfloat16"))
    common: dict[str, Any] = {"dtype": "bfloat16"} | changes
    calibration = changes.get("calibration", {})
    other = recipe_of(model, tmp_path, "other", **(common | {"calibration": text(tmp_path, **calibration)}))
    assert passes.of(other) > 0
    assert read_report(other.output).calibration == "done"


def test_another_model_is_not_taken(families: FamilyResults, model: Path, tmp_path: Path, passes: Passes) -> None:
    run(recipe_of(model, tmp_path, "first"))
    changed = shutil.copytree(model, tmp_path / "changed")
    tensors = load_file(changed / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].neg()}, changed / "model.safetensors", metadata={"format": "pt"})
    run(recipe_of(changed, tmp_path, "other"), passes.listen)
    assert passes.said.startswith("what calibration learns is kept")


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums that lie in a record with whole numbers, a text and a list besides."""

    sums: list[Tensor]
    batches: int
    name: str


class KeepsARecord(Estimator):
    """The squares of columns, in a state of its own type."""

    name = "keeps_a_record"

    def start(self, layer: Layer) -> Moments:
        return Moments([torch.zeros(layer.columns)] * 2, 0, layer.name)

    def update(
        self, state: Moments, x: Float[Tensor, "tokens columns"], token_weight: Float[Tensor, " tokens"]
    ) -> Moments:
        squares, ones = state.sums
        return replace(state, sums=[squares + token_weight @ x.square(), ones + 1], batches=state.batches + 1)

    def merge(self, state: Moments, other: Moments) -> Moments:
        sums = [one + another for one, another in zip(state.sums, other.sums, strict=True)]
        return Moments(sums, state.batches + other.batches, state.name)

    def finish(self, state: Moments) -> Diagonal:
        return Diagonal(state.sums[0] / state.batches + 0 * len(state.name))


class KeepsACallable(KeepsARecord):
    """A state that no file can hold."""

    name = "keeps_a_callable"

    def start(self, layer: Layer) -> Any:
        return {"call": len}


def test_the_state_of_a_strangers_estimator_survives(model: Path, tmp_path: Path, passes: Passes) -> None:
    class Plugin:
        from dashq import hookimpl

        @hookimpl
        def dashq_estimators(self) -> list[type[Estimator]]:
            return [KeepsARecord, KeepsACallable]

    registry = load_registry(Plugin())
    scheme = small_scheme(estimator="keeps_a_record")

    def recipe(name: str, **changes: Any) -> Recipe:
        return build_recipe(model, tmp_path / name, registry, scheme=scheme, **changes)

    expected = run(recipe("without"))
    run(recipe("keeping", calibration=text(tmp_path)))
    assert passes.of(taking := recipe("taking", calibration=text(tmp_path))) == 0
    assert weights(taking.output) == weights(expected)
    scheme = small_scheme(estimator="keeps_a_callable")
    with pytest.raises(PlanError, match=r"^estimator 'keeps_a_callable': a state that holds a builtin_function_or_"):
        run(recipe("never", calibration=text(tmp_path)))


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [spoil, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-40])])
def test_what_is_damaged_or_partial_is_calibrated_anew_with_a_warning(
    model: Path, tmp_path: Path, passes: Passes, damage: Callable[[Path], object]
) -> None:
    expected = run(recipe_of(model, tmp_path, "first"))
    whole = [path.read_bytes() for path in files_in(tmp_path)]
    damage(files_in(tmp_path)[1])
    again = recipe_of(model, tmp_path, "again")
    assert passes.of(again) > 0
    (warning,) = [sentence for sentence in passes.warnings if "calibrated anew" in sentence]
    assert "is not as it was written" in warning or "keeps 2 of 3 parts" in warning
    assert weights(again.output) == weights(expected)
    assert [path.read_bytes() for path in files_in(tmp_path)] == whole
    assert passes.of(recipe_of(model, tmp_path, "taking")) == 0


@pytest.mark.parametrize("moment", [0, 2])
def test_a_run_that_is_killed_while_it_keeps_leaves_nothing_that_is_taken(
    model: Path, tmp_path: Path, passes: Passes, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    expected = run(build_recipe(model, tmp_path / "without", scheme=SCHEME))
    save, calls = save_file, iter(range(9))

    def killed(tensors: dict[str, Tensor], path: Path, **options: Any) -> None:
        if next(calls) == moment:
            save({"0": torch.zeros(1)}, path, **options)  # a part of the file
            raise Interruption
        save(tensors, path, **options)

    recipe = recipe_of(model, tmp_path, "out")
    with monkeypatch.context() as patch:
        patch.setattr(kept, "save_file", killed)
        with pytest.raises(Interruption):
            run(recipe)
        assert len(files_in(tmp_path)) == moment
    run(recipe)
    assert weights(recipe.output) == weights(expected)
    assert len(list((tmp_path / "kept").glob("*/*"))) == 4  # those of three blocks, and what they are made from
    assert passes.of(taking := recipe_of(model, tmp_path, "taking")) == 0
    assert weights(taking.output) == weights(expected)


def test_an_interrupted_run_goes_on_in_both_directions(model: Path, tmp_path: Path, passes: Passes) -> None:
    expected = run(recipe_of(model, tmp_path, "first"))

    def interrupted(name: str) -> Recipe:
        recipe = recipe_of(model, tmp_path, name)
        with pytest.raises(Interruption):
            run(recipe, after_layers(9))
        return recipe

    reading = interrupted("reading")
    assert passes.of(reading) == 0
    assert read_report(reading.output).calibration == "read"
    bereaved = interrupted("bereaved")
    remove_kept(tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
    assert passes.of(bereaved) > 0  # what it needs of the finished blocks is learned again, and kept
    assert len(files_in(tmp_path)) == 3
    remove_kept(tmp_path / "kept")
    forming = interrupted("forming")
    passes.of(recipe_of(model, tmp_path, "another"))
    assert passes.of(forming) == 0
    assert read_report(forming.output).calibration == "read"  # no block was saved before the interruption
    remove_kept(tmp_path / "kept")
    elsewhere = interrupted("elsewhere")
    moved = recipe_of(model, tmp_path, "elsewhere", calibration=TEXT | {"keep": str(tmp_path / "other")})
    run(moved)  # goes on although the folder has another name
    for recipe in (reading, bereaved, forming, elsewhere):
        assert weights(recipe.output) == weights(expected)


def test_sums_that_go_while_they_are_read_end_the_run_which_then_goes_on(
    model: Path, tmp_path: Path, passes: Passes
) -> None:
    expected = run(recipe_of(model, tmp_path, "first"))
    recipe = recipe_of(model, tmp_path, "out")

    def remove(event: Event) -> None:
        if isinstance(event, RunStarted):
            files_in(tmp_path)[2].unlink()

    with pytest.raises(OutputError, match="has gone or changed while it was needed; the same command goes on"):
        run(recipe, remove)
    assert passes.of(recipe) > 0
    assert weights(recipe.output) == weights(expected)


def test_processes_keep_and_take_the_same_sums(families: FamilyResults, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "device": "cpu",
        "scheme": mixture_scheme(estimator=HYBRID, router="blended", pooling_tokens=16),
        "embeddings": {"bits": 4},
    }
    paths = {}
    for name in ("keeping", "together", "alone", "without"):
        samples = {"samples": 8, "sequence_length": 32} | ({"keep": None} if name == "without" else {})
        recipe = small_recipe(families.model("mixtral"), tmp_path / name, calibration=text(tmp_path, **samples))
        paths[name] = write_recipe(tmp_path / f"{name}.yaml", recipe | changes)
    for count, names in ((2, ("keeping", "together")), (1, ("alone", "without"))):
        outcomes = run_spread(count, [paths[name] for name in names])
        assert [outcome.code for outcome in outcomes] == [0] * count, outcomes
    assert {name: read_report(tmp_path / name).calibration for name in paths} == {
        "keeping": "done",
        "together": "read",
        "alone": "read",
        "without": "done",
    }
    assert all(weights(tmp_path / name) == weights(tmp_path / "without") for name in paths)


def test_a_folder_keeps_the_sums_of_any_number_of_recipes_part_by_part(model: Path, tmp_path: Path) -> None:
    run(recipe_of(model, tmp_path, "first"))
    run(recipe_of(model, tmp_path, "headed", head={"bits": 4}))
    assert len({path.parent for path in files_in(tmp_path)}) == 1
    assert len(files_in(tmp_path)) == 4  # the blocks' were there
    run(recipe_of(model, tmp_path, "seeded", calibration=text(tmp_path, seed=1)))
    assert len({path.parent for path in files_in(tmp_path)}) == 2
    made_from = [json.loads(path.read_text()) for path in (tmp_path / "kept").glob("*/made_from.json")]
    assert len({entries["calibration text"] for entries in made_from}) == 2
    strangers = tmp_path / "kept" / "notes.txt"
    strangers.write_text("mine")
    remove_kept(tmp_path / "kept")
    assert list((tmp_path / "kept").iterdir()) == [strangers]


def test_recipes_that_depend_on_quantized_layers_keep_nothing(model: Path, tmp_path: Path) -> None:
    recipe = build_recipe(model, tmp_path / "out", calibration=TEXT | {"propagate": "sequential"})
    opened = open_model(recipe)
    plans, tokens = plan_model(recipe, opened), draw_for(opened, recipe.calibration).samples
    assert Kept.of(recipe, opened, plans, tokens) is None
    assert Kept.of(recipe.keeping(tmp_path / "kept"), opened, plans, tokens) is None  # as a sweep asks for it
    plain = build_recipe(model, tmp_path / "plain")
    assert Kept.of(plain, opened, plans, tokens) is None
    own = Kept.of(plain.keeping(tmp_path / "kept"), opened, plans, tokens)
    assert own
    assert own.folder.parent == tmp_path / "kept"


@given(estimator=st.sampled_from(["diagonal", "full", "hybrid"]), columns=st.integers(1, 40), count=st.integers(1, 5))
def test_the_bytes_on_disk_are_those_of_states(estimator: str, columns: int, count: int) -> None:
    layers = [Layer(name=f"model.layers.{n}.up", rows=16, columns=16 * columns) for n in range(count)]
    recipe = build_recipe(Path("m"), Path("/tmp") / "never", scheme=small_scheme(estimator=estimator))
    plans = make_plan(recipe, layers)
    assert len(parts_of(plans)) == count
    start = plans[0].scheme.estimator.start(layers[0])
    parts: Iterator[Tensor] = iter(vars(start).values())
    assert bytes_to_keep(plans) == count * sum(part.nbytes for part in parts)
