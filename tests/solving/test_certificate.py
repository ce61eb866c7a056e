"""A certificate tells the true distance to the optimum, of a sample that is always the same."""

import json
from pathlib import Path

import pytest
import torch

from dashq import Diagonal, Grid, Grouping, run
from dashq.results.report import overall
from dashq.solving.arithmetic import group_importance
from dashq.solving.certificate import Certificate, certify
from dashq.solving.optimum import find_optimum
from pico import pico_model
from recipes import REGISTRY, build_recipe

GRID, GROUPING = Grid(bits=2, dtype=torch.float16), Grouping(columns=48, size=16)


def example() -> tuple[torch.Tensor, Diagonal]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 48, generator=generator)
    return weight, Diagonal(torch.randn(48, generator=generator).exp())


def test_a_sample_of_many_groups_tells_the_gap_of_all() -> None:
    weight, curvature = example()
    quantized = REGISTRY.solvers["irls"]().solve(weight, curvature, GROUPING, GRID)
    h = group_importance(curvature, GROUPING).double()
    error = (h * GROUPING.split((weight - quantized.dequantize()).double()).square()).sum()
    least = find_optimum(GROUPING.split(weight).flatten(0, 1), h.repeat(40, 1), GRID).error.sum()
    certificate = certify("layer", weight, quantized, curvature, 600, most_events=1 << 24)
    assert certificate is not None
    assert certificate.groups == 600
    assert certificate.gap == pytest.approx(float(error / least) - 1, rel=0.15)


def test_the_same_layer_is_sampled_alike_and_another_is_not() -> None:
    weight, curvature = example()
    quantized = REGISTRY.solvers["rtn"]().solve(weight, curvature, GROUPING, GRID)
    first = certify("a", weight, quantized, curvature, 10)
    assert first == certify("a", weight, quantized, curvature, 10) != certify("b", weight, quantized, curvature, 10)


def test_the_optimum_itself_has_no_gap() -> None:
    weight, curvature = example()
    quantized = REGISTRY.solvers["exact"]().solve(weight, curvature, GROUPING, GRID)
    certificate = certify("layer", weight, quantized, curvature, 50)
    assert certificate is not None
    assert certificate.gap < 1e-4  # what storing scales and offsets in float16 costs


def test_weights_that_lie_on_a_grid_have_no_gap() -> None:
    weight = torch.arange(4.0).repeat(40, 12)
    quantized = REGISTRY.solvers["rtn"]().solve(weight, Diagonal(torch.ones(48)), GROUPING, GRID)
    assert certify("layer", weight, quantized, Diagonal(torch.ones(48)), 10) == Certificate(gap=0.0, groups=10)


def test_groups_that_would_take_too_long_have_no_certificate() -> None:
    weight, curvature = example()
    grid = Grid(bits=8, dtype=torch.float16)
    quantized = REGISTRY.solvers["rtn"]().solve(weight, curvature, GROUPING, grid)
    assert certify("layer", weight, quantized, curvature, 10) is None
    assert overall([]) is None


def test_layers_count_by_their_groups() -> None:
    totals = overall([Certificate(gap=0.1, groups=30), Certificate(gap=0.3, groups=10)])
    assert totals
    assert totals.mean_gap == pytest.approx(0.15)
    assert (totals.worst_gap, totals.groups) == (0.3, 40)


@pytest.mark.parametrize("groups", [0, 100])
def test_a_run_certifies_as_many_groups_as_its_recipe_says(tmp_path: Path, groups: int) -> None:
    model = pico_model("llama", tmp_path / "model")
    out = run(build_recipe(model, tmp_path / "out", certificate_groups=groups))
    report = json.loads((out / "report.json").read_text())
    if groups == 0:
        assert report["totals"]["certificate"] is None
        assert "certify" not in report["seconds"]
    else:
        sampled = [layer["certificate"]["groups"] for layer in report["layers"]]
        assert report["totals"]["certificate"]["groups"] == sum(sampled) >= groups
        assert max(sampled) - min(sampled) == 0
