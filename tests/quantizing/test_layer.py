"""One layer is solved, and its report says how exact it is and what had to be done without."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from broken_models import DOWN, change, refusal
from dashq import Curvature, Diagonal, Full, Grid, Grouping, PluginError, Quantized, hookimpl, load_registry, run
from dashq.calibration import strips
from dashq.calibration.layers import Observation
from dashq.quantizing.layer import LayerWork, Preparations, Prepared, quantize_layer, solve_together
from dashq.quantizing.opening import open_model, plan_model
from dashq.solving import round_to_nearest, weighted_error
from dashq_plugins.solvers.rtn import RoundToNearestSolver
from pico import pico_model
from recipes import build_recipe, small_scheme
from tensors import noise


def test_weights_beyond_the_numbers_of_the_format_are_refused_by_layer(tmp_path: Path) -> None:
    model = pico_model("llama", tmp_path / "model", shard="100KB")
    change(model, DOWN, lambda tensors: tensors[DOWN].view(-1)[:1].fill_(1e6))
    message = refusal(model)
    assert message.startswith(f"{DOWN.removesuffix('.weight')}: weights up to 1e+06 do not fit")


class Chatty(RoundToNearestSolver):
    name = "chatty"

    def solve(self, weight: Tensor, curvature: Curvature, grouping: Grouping, grid: Grid) -> Quantized:
        return replace(super().solve(weight, curvature, grouping, grid), statistics={"gamma": 1.0})


def test_figures_of_one_name_from_estimator_and_solver_are_no_figure(model: Path, tmp_path: Path) -> None:
    registry = load_registry(SimpleNamespace(dashq_solvers=hookimpl(lambda: [Chatty])))
    recipe = build_recipe(model, tmp_path / "out", registry, scheme=small_scheme(solver="chatty", estimator="hybrid"))
    with pytest.raises(PluginError, match=r"^model\.layers\.0\.\S+: estimator 'hybrid' and solver 'chatty' .* 'gamma'"):
        run(recipe)


def test_errors_are_weighted_by_the_curvature_and_told_beside_those_of_min_max_rounding(
    model: Path, tmp_path: Path
) -> None:
    recipe = build_recipe(model, tmp_path / "out", scheme=small_scheme(solver="closed_form"))
    plan = plan_model(recipe, open_model(recipe))[0]
    weight, importance = noise(0, 48, 48), noise(1, 48).square()
    quantized, report = quantize_layer(plan, weight, Observation(Diagonal(importance), tokens=9))
    assert (report.name, report.tokens, report.fallbacks) == (plan.layer.name, 9, ())
    assert report.error == pytest.approx(weighted_error(weight, quantized.dequantize(), Diagonal(importance)))
    assert 0 < report.error < report.minmax_error


def test_errors_of_strips_are_those_of_the_whole_layer(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("LEAST", 1), ("MULTIPLE", 16), ("MORE", 100)):
        monkeypatch.setattr(strips, name, value)
    recipe = build_recipe(model, tmp_path / "out", scheme=small_scheme(solver="closed_form"))
    plan = plan_model(recipe, open_model(recipe))[0]
    weight, importance, rows = noise(0, 48, 48), Diagonal(noise(1, 48).square()), noise(2, 48).square()
    quantized, report = quantize_layer(plan, weight, Observation(importance, tokens=9, row_weights=rows))
    minmax = round_to_nearest(quantized.grouping.split(weight), plan.grid, quantized.grouping)
    for error, layer in ((report.error, quantized), (report.minmax_error, minmax)):
        assert error == pytest.approx(weighted_error(weight, layer.dequantize(), importance, rows))


def test_groups_that_saw_no_input_or_lie_below_the_scales_are_told(model: Path, tmp_path: Path) -> None:
    recipe = build_recipe(model, tmp_path / "out")
    plan = plan_model(recipe, open_model(recipe))[0]
    weight, importance = noise(0, 48, 48), torch.ones(48)
    weight[:2, :16] *= 1e-9
    importance[16:32] = 0
    _, report = quantize_layer(plan, weight, Observation(Diagonal(importance), tokens=9))
    unseen, small = report.fallbacks
    assert unseen == "1 of 3 groups of columns saw no input: treated as flat"
    assert small.startswith("2 of 144 groups have weights too small for scales of at least ")


@pytest.mark.parametrize("solver", ["closed_form", "feedback"])
def test_whoever_solves_a_strip_the_layer_is_the_same(
    solver: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("LEAST", 1), ("MULTIPLE", 16), ("MORE", 100)):
        monkeypatch.setattr(strips, name, value)
    scheme = small_scheme(solver=solver, estimator="full")
    recipe = build_recipe(model, tmp_path / "out", scheme=scheme)
    plan = plan_model(recipe, open_model(recipe))[0]
    assert len(strips.strips_of(plan)) == 3
    x = noise(1, 200, 48)
    weight, observation = noise(0, 48, 48), Observation(Full(x.T @ x), tokens=200)
    works = [LayerWork(plan, weight, observation) for _ in range(2)]
    works[0].solve([0, 2])
    works[1].solve([1])
    assert not works[0].is_whole
    works[0].take(1, works[1].solved(1))
    quantized, report = works[0].finished()
    alone, alone_report = quantize_layer(plan, weight, observation)
    assert quantized.codes.equal(alone.codes)
    assert replace(report, seconds=0.0) == replace(alone_report, seconds=0.0)
    solve = plan.scheme.solver.prepared(observation.curvature, alone.grouping, plan.grid)
    parts = [solve(weight[strip]) for strip in strips.strips_of(plan)]
    assert torch.cat([part.codes for part in parts]).equal(quantized.codes)
    for figure in parts[0].statistics:
        assert report.statistics[figure] == pytest.approx(sum(part.statistics[figure] for part in parts) / 3)


@pytest.mark.parametrize("solver", ["closed_form", "feedback"])
def test_layers_that_are_solved_together_are_the_rows_of_one_call(solver: str, model: Path, tmp_path: Path) -> None:
    recipe = build_recipe(model, tmp_path / "out", scheme=small_scheme(solver=solver, estimator="full"))
    plan = plan_model(recipe, open_model(recipe))[0]
    x = noise(1, 200, 48)
    observation, preparations = Observation(Full(x.T @ x), tokens=200), Preparations()
    sizes = (48, 16, 32)
    plans = [replace(plan, layer=replace(plan.layer, rows=rows)) for rows in sizes]
    weights = [noise(seed, rows, 48) for seed, rows in enumerate(sizes)]
    works = [LayerWork(own, weight, observation, preparations) for own, weight in zip(plans, weights, strict=True)]
    solve_together(works)
    whole = plan.scheme.solver.prepared(observation.curvature, works[0].finished()[0].grouping, plan.grid)
    call = whole(torch.cat(weights))
    finished = [work.finished() for work in works]
    assert torch.cat([quantized.codes for quantized, _ in finished]).equal(call.codes)
    assert torch.cat([quantized.scale for quantized, _ in finished]).equal(call.scale)
    for weight, (quantized, report) in zip(weights, finished, strict=True):
        assert report.rows == len(weight)
        assert report.error == pytest.approx(weighted_error(weight, quantized.dequantize(), observation.curvature))
        assert call.statistics.items() <= report.statistics.items()
    assert finished[0][1].seconds == pytest.approx(3 * finished[1][1].seconds)


def test_layers_with_curvatures_of_their_own_are_not_solved_in_one_call(model: Path, tmp_path: Path) -> None:
    recipe = build_recipe(model, tmp_path / "out", scheme=small_scheme(solver="feedback", estimator="full"))
    plan = plan_model(recipe, open_model(recipe))[0]
    observations = [Observation(Full(x.T @ x), tokens=200) for x in (noise(1, 200, 48), noise(2, 200, 48))]
    weight, preparations = noise(0, 48, 48), Preparations()
    works = [LayerWork(plan, weight, observation, preparations) for observation in observations]
    solve_together(works)
    for work, observation in zip(works, observations, strict=True):
        assert work.finished()[0].codes.equal(quantize_layer(plan, weight, observation)[0].codes)


class Preparing(RoundToNearestSolver):
    """Notes for which importance of the first column something is prepared."""

    name = "preparing"
    prepared_for: ClassVar[list[float]] = []

    def prepared(
        self, curvature: Curvature, grouping: Grouping, grid: Grid
    ) -> Callable[[Float[Tensor, "rows columns"]], Quantized]:
        self.prepared_for.append(float(curvature.diagonal()[0]))
        return super().prepared(curvature, grouping, grid)


def test_layers_that_share_their_inputs_share_what_is_prepared(model: Path, tmp_path: Path) -> None:
    registry = load_registry(SimpleNamespace(dashq_solvers=hookimpl(lambda: [Preparing])))
    recipe = build_recipe(model, tmp_path / "out", registry, scheme=small_scheme(solver="preparing"))
    plan = plan_model(recipe, open_model(recipe))[0]
    one, other = (Observation(Diagonal(torch.full((48,), h)), 9) for h in (1.0, 2.0))
    preparations, weight = Preparations(), noise(0, 48, 48)
    expected = {observation: quantize_layer(plan, weight, observation)[0].codes for observation in (one, other)}
    Preparing.prepared_for.clear()
    for observation in (one, one, other, one):
        work = LayerWork(plan, weight, observation, preparations)
        work.solve()
        assert work.finished()[0].codes.equal(expected[observation])
    assert Preparing.prepared_for == [1.0, 2.0, 1.0]


def test_layers_whose_groups_or_grids_differ_share_nothing() -> None:
    curvature, grid = Diagonal(torch.ones(8)), Grid(bits=2, dtype=torch.float16)
    solver, order = RoundToNearestSolver(), torch.arange(8)
    grouping = Grouping(columns=8, size=4)
    prepared = Prepared(solver, curvature, grouping, grid, solver.prepared(curvature, grouping, grid))
    plan = SimpleNamespace(scheme=SimpleNamespace(solver=solver), grid=grid)
    serves: Any = prepared.serves
    assert serves(plan, curvature, Grouping(columns=8, size=4))
    assert not serves(plan, curvature, Grouping(columns=8, size=8))
    assert not serves(plan, curvature, Grouping(columns=8, size=4, order=order))
    assert not serves(plan, Diagonal(torch.ones(8)), Grouping(columns=8, size=4))
    plan.grid = Grid(bits=3, dtype=torch.float16)
    assert not serves(plan, curvature, Grouping(columns=8, size=4))
