"""Results for the Metal kernels of transformers: one setting for all layers, and weights read bit by bit."""

from pathlib import Path

import pytest

from dashq import PlanError, run
from dashq.results.verify import verify
from format_results import FormatResults
from pico import TRAINED_MIXTURE
from recipes import PLAIN_EXPERTS, build_recipe, small_scheme


def test_stock_transformers_opens_the_files_bit_by_bit(results: FormatResults) -> None:
    checks = list(verify(results["metal"], "transformers"))
    assert all(check.passed for check in checks)
    assert {check.against for check in checks} == {"solver", "report", "format", "transformers"}
    assert checks[-1].name == "logits"


def test_metal_refuses_two_settings_and_names_the_layer(wide_model: Path, tmp_path: Path) -> None:
    override = [{"match": ".*layers.0.mlp.down_proj", "bits": 4}]
    recipe = build_recipe(
        wide_model, tmp_path / "out", scheme=small_scheme(64, bits=2), overrides=override, serializer="metal"
    )
    with pytest.raises(PlanError, match=r"model.layers.0.mlp.down_proj: format metal has one setting"):
        run(recipe)


def test_transformers_opens_a_mixture_whose_experts_are_left_alone(tmp_path: Path) -> None:
    serializer = {"name": "metal", "dtype": "bfloat16"}
    recipe = build_recipe(
        TRAINED_MIXTURE,
        tmp_path / "out",
        scheme=small_scheme(32, bits=4, router="routed"),
        serializer=serializer,
        overrides=[PLAIN_EXPERTS],
    )
    assert all(check.passed for check in verify(run(recipe), "transformers"))
