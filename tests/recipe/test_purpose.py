"""A recipe for a program says what it wants itself, and the program's target chooses the rest."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dashq import RecipeError, load_recipe
from dashq.quantizing.opening import open_model, plan_model
from dashq.recipe.purpose import Purpose, completed
from dashq.recipe.yaml_text import parse
from dashq.starting import solved_again
from pico import WIDE, pico_model
from recipes import REGISTRY


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_model("llama", tmp_path_factory.mktemp("models") / "model", torch.float16, **WIDE)


def write(path: Path, folder: Path, **entries: Any) -> Path:
    path.write_text(yaml.safe_dump({"for": "llama.cpp", "model": str(folder), "output": "out"} | entries))
    return path


def test_a_program_alone_makes_a_recipe(model: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path / "r.yaml", model), REGISTRY)
    assert (recipe.serializer.name, recipe.scheme.bits, recipe.scheme.solver.name) == ("gguf", 2, "feedback")
    assert "serializer: gguf" in recipe.completed
    assert recipe.overruling == ""
    assert len(plan_model(recipe, open_model(recipe))) == 14 + 1  # the matrix that is embeddings and head


def test_a_strategy_of_the_target_may_be_named_either_way(model: Path, tmp_path: Path) -> None:
    own = {"scheme": {"estimator": {"name": "hybrid"}, "solver": "feedback"}}
    assert load_recipe(write(tmp_path / "r.yaml", model, **own), REGISTRY).overruling == ""


def test_what_the_recipe_says_wins(model: Path, tmp_path: Path) -> None:
    own = {
        "calibration": {"dataset": "pydoc", "samples": 3},
        "scheme": {"bits": 3, "estimator": "diagonal", "solver": "k_quant"},
        "overrides": [{"match": r".*\.0\..*", "skip": True}],
    }
    recipe = load_recipe(write(tmp_path / "r.yaml", model, **own), REGISTRY)
    assert (recipe.scheme.bits, recipe.scheme.solver.name) == (3, "k_quant")
    assert (recipe.calibration.samples, recipe.calibration.propagate) == (3, "sequential")
    assert "calibration.samples" not in recipe.completed
    assert "calibration.propagate: sequential" in recipe.completed
    assert recipe.overruling == (
        "kept from the recipe, where llama.cpp would have others: calibration.samples: 3 (16); "
        "scheme.estimator: diagonal (hybrid); scheme.solver: k_quant (feedback)"
    )
    assert len(plan_model(recipe, open_model(recipe))) == 7 + 1


def test_bits_and_level_stand_beside_the_program(model: Path, tmp_path: Path) -> None:
    purpose = {"name": "dashq", "bits": 3.3, "level": "fast"}
    recipe = load_recipe(write(tmp_path / "r.yaml", model, **{"for": purpose}), REGISTRY)
    assert (recipe.scheme.bits, recipe.scheme.solver.name) == (3, "closed_form")


def test_overrides_of_the_recipe_come_after_those_of_the_target_and_keep_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("for: x\nmodel: m\noutput: o\noverrides:\n- {match: a}\n- {match: b}\n")
    document, _, _ = completed(parse(path), {"overrides": [{"match": "c"}], "serializer": "gguf"})
    assert [override["match"] for override in document.data["overrides"]] == ["c", "a", "b"]
    assert document.where(("overrides", 2, "match")) == f"{path}:6"
    assert document.where(("overrides", 0)) == document.where(("serializer",)) == f"{path}:1: for"


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"for": "lama"}, r"r\.yaml:1: for: there is no target 'lama'\. Did you mean 'ollama'\?"),
        ({"for": {"name": "mlx", "bits": 9}}, r"r\.yaml:1: for: bits: should be less than or equal to 8"),
        ({"for": {"name": "mlx", "bits": 7}}, r"r\.yaml:1: for: bits should be one of 2, 3, 4, 5, 6, 8"),
        ({"for": {"bits": 3}}, r"r\.yaml:1: for: name: this entry is missing"),
        ({"model": None}, r"r\.yaml:1: for: a recipe for a program needs `model` as well"),
        ({"scheme": {"solver": "k_quan"}}, r"r\.yaml:\d: scheme\.solver\.name: no solver named 'k_quan'"),
    ],
)
def test_mistakes_are_told_where_they_are(entries: dict[str, Any], words: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=words) as error:
        load_recipe(write(tmp_path / "r.yaml", model, **entries), REGISTRY)
    assert "\n" not in str(error.value)


def test_a_recipe_is_solved_again_with_its_own_model_and_text(model: Path, tmp_path: Path) -> None:
    own = {"calibration": {"dataset": "pydoc", "samples": 3}, "scheme": {"bits": 4}, "device": "cpu"}
    first = write(tmp_path / "r.yaml", model, **{"for": "dashq"}, **own)
    path, text = solved_again(parse(first), Purpose(name="mlx"), tmp_path / "again")
    assert path == tmp_path / "again.yaml"
    recipe = load_recipe(path, REGISTRY, text=text)
    assert (recipe.serializer.name, recipe.scheme.bits, recipe.device) == ("mlx", 4, "cpu")
    assert (recipe.model, recipe.output) == (str(model), tmp_path / "again")
    assert (recipe.calibration.dataset[0].name, recipe.calibration.samples) == ("pydoc", 3)


def test_without_an_output_the_result_lies_beside_the_other_one(model: Path, tmp_path: Path) -> None:
    first = write(tmp_path / "r.yaml", model)
    assert solved_again(parse(first), Purpose(name="mlx"), None)[0] == Path("out-mlx.yaml")
