"""A curvature of a plugin's own kind, which gives its matrix and nothing else, counts wherever a full one does."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dashq import Coupled, Curvature, Full, Layer, PluginError, Recipe, run
from dashq.measuring.choosing import choices_for
from dashq.measuring.sensitivity import analyze
from dashq.quantizing.opening import open_model
from dashq.strategies import Estimator
from dashq.testing import check_estimator
from dashq_plugins.estimators.diagonal import DiagonalEstimator
from dashq_plugins.solvers.rtn import RoundToNearestSolver
from pico import pico_model
from recipes import FEEDBACK, build_recipe, small_recipe


@dataclass(frozen=True, eq=False)
class Banded(Coupled):
    """The second moments of columns that lie within a few columns of one another, band by band."""

    bands: Tensor  # [offset columns]; the last `offset` entries of each band are no one's

    def dense(self) -> Tensor:
        columns = self.bands.shape[1]
        upper = torch.zeros(columns, columns)
        for offset, band in enumerate(self.bands[:columns]):
            upper += torch.diag(band[: columns - offset], offset)
        return upper + upper.triu(1).T


class BandedEstimator(Estimator):
    """Sums of x_j · x_(j + offset), weighted so that the matrix is positive; `whole` gives the same as a `Full`."""

    name = "banded"
    produces: ClassVar[type[Curvature]] = Coupled
    whole: bool = False

    def start(self, layer: Layer) -> tuple[Tensor, Tensor]:
        return torch.zeros(3, layer.columns), torch.zeros(())

    def update(self, state: tuple[Tensor, Tensor], x: Tensor, token_weight: Tensor) -> tuple[Tensor, Tensor]:
        products = [(1 - offset / 3) * (token_weight @ (x * x.roll(-offset, dims=1))) for offset in range(3)]
        return state[0] + torch.stack(products), state[1] + token_weight.sum()

    def merge(self, state: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return state[0] + other[0], state[1] + other[1]

    def finish(self, state: tuple[Tensor, Tensor]) -> Curvature:
        banded = Banded(state[0] / state[1].clamp_min(1e-12))
        return Full(banded.dense()) if self.whole else banded


def recipe_with(family: str, folder: Path, estimator: Estimator, **changes: Any) -> Recipe:
    folder = folder / str(estimator)
    folder.mkdir(parents=True)
    scheme: dict[str, Any] = small_recipe(folder, folder)["scheme"] | {"estimator": "full", "solver": FEEDBACK}
    recipe = build_recipe(
        pico_model(family, folder / "model", num_hidden_layers=2),
        folder / "out",
        dtype="float32",
        scheme=scheme | changes.pop("scheme", {}),
        **changes,
    )
    return recipe.model_copy(update={"scheme": recipe.scheme.model_copy(update={"estimator": estimator})})


def results(family: str, folder: Path, **changes: Any) -> list[Mapping[str, Tensor]]:
    """The tensors of a run with the banded curvature, with the same as a `Full`, and with its diagonal alone."""
    own, whole = BandedEstimator(), BandedEstimator(whole=True)
    diagonal = {"scheme": changes.get("scheme", {}) | {"solver": "closed_form"}}
    recipes = [
        recipe_with(family, folder, own, **changes),
        recipe_with(family, folder, whole, **changes),
        recipe_with(family, folder, DiagonalEstimator(), **changes | diagonal),
    ]
    return [load_file(run(recipe) / "model.safetensors") for recipe in recipes]


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(tensor.equal(other[name]) for name, tensor in one.items())


def test_the_estimator_keeps_its_contract() -> None:
    check_estimator(BandedEstimator)


def test_it_corrects_the_error_of_earlier_layers_as_the_same_full_one_does(tmp_path: Path) -> None:
    text = small_recipe(tmp_path, tmp_path)["calibration"] | {"propagate": "sequential", "error_correction": 0.5}
    own, whole, diagonal = results("llama", tmp_path, calibration=text)
    assert same(own, whole)
    assert not same(own, diagonal)


def test_it_is_pooled_across_experts_as_the_same_full_one_is(tmp_path: Path) -> None:
    own, whole, diagonal = results("qwen3_moe", tmp_path, scheme={"router": "routed", "pooling_tokens": 30})
    assert same(own, whole)
    assert not same(own, diagonal)


def test_an_analysis_weighs_errors_with_it_as_with_the_same_full_one(tmp_path: Path) -> None:
    errors = []
    for estimator in (BandedEstimator(), BandedEstimator(whole=True), DiagonalEstimator()):
        recipe = recipe_with("llama", tmp_path, estimator, scheme={"solver": "rtn"})
        model = open_model(recipe)
        layers = analyze(recipe, model, choices_for(recipe, model)).layers
        errors.append([choice.error for layer in layers for choice in layer.choices])
    assert errors[0] == errors[1]
    assert errors[0] != errors[2]


def test_a_solver_that_needs_it_is_not_given_a_blend_that_is_something_else(tmp_path: Path) -> None:
    class BandedSolver(RoundToNearestSolver):
        name = "banded"
        needs: ClassVar[type[Curvature]] = Banded

    class BandedOnlyEstimator(BandedEstimator):
        name = "banded_only"
        produces: ClassVar[type[Curvature]] = Banded

    scheme = {"router": "routed", "pooling_tokens": 30, "solver": "rtn"}
    recipe = recipe_with("qwen3_moe", tmp_path, BandedOnlyEstimator(), scheme=scheme)
    recipe = recipe.model_copy(update={"scheme": recipe.scheme.model_copy(update={"solver": BandedSolver()})})
    message = (
        r"experts\..*: blended with the pooled estimate its curvature is Full, but solver 'banded' needs Banded; ov"
    )
    with pytest.raises(PluginError, match=message):
        run(recipe)
