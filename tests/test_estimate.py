"""What `dashq plan` says a run will take grows with what the run has to do."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from dashq import estimate as module
from dashq.calibration import paused
from dashq.estimate import Estimate, estimate
from dashq.quantizing.opening import open_model, plan_model
from dashq.solving import compiled
from pico import pico_model
from recipes import TEXT, build_recipe, small_scheme


@pytest.fixture(autouse=True)
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that multiplies equally fast each time."""
    monkeypatch.setattr(module, "_products_per_second", lambda model, dtype: 1e6)


def costs(
    folder: Path,
    router: str = "routed",
    tokens: int = 40,
    estimator: str = "diagonal",
    solver: str = "irls",
    **sizes: Any,
) -> Estimate:
    """The estimate for a pico Mixtral."""
    model = folder / "-".join(["mixtral", *map(str, sizes.values())])
    if not model.exists():
        pico_model("mixtral", model, max_position_embeddings=100_000, **sizes)
    text = TEXT | {"sequence_length": tokens}
    recipe = build_recipe(
        model, folder / "out", calibration=text, scheme=small_scheme(router=router, estimator=estimator, solver=solver)
    )
    opened = open_model(recipe)
    return estimate(opened, plan_model(recipe, opened), recipe)


def test_sums_that_are_read_take_the_time_of_a_disk_and_not_of_passes(tmp_path: Path) -> None:
    model = pico_model("llama", tmp_path / "model")
    recipe = build_recipe(model, tmp_path / "out", calibration=TEXT | {"samples": 99})
    opened = open_model(recipe)
    plans = plan_model(recipe, opened)
    done, read, read_more = (estimate(opened, plans, recipe, taken=taken) for taken in (None, 1000, 10**9))
    assert read.seconds < read_more.seconds < done.seconds


def test_more_tokens_take_longer_and_more_memory(tmp_path: Path) -> None:
    few, many = (costs(tmp_path, tokens=tokens) for tokens in (40, 4000))
    assert few.seconds < many.seconds
    assert few.memory < many.memory


def test_more_experts_take_longer_and_more_memory(tmp_path: Path) -> None:
    few, many = (costs(tmp_path, num_local_experts=experts) for experts in (4, 16))
    assert few.seconds < many.seconds
    assert few.memory < many.memory


def test_more_blocks_take_longer_and_no_more_memory(tmp_path: Path) -> None:
    few, many = (costs(tmp_path, num_hidden_layers=blocks) for blocks in (2, 6))
    assert few.seconds < many.seconds
    assert few.memory == many.memory


def test_a_model_that_is_opened_whole_at_the_end_has_room_for_that_and_a_larger_one_needs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = costs(tmp_path)
    monkeypatch.setattr(module, "whole_bytes", lambda model: 1.5e9)
    assert costs(tmp_path).memory == module.STARTED + 1.5e9
    monkeypatch.setattr(module, "whole_bytes", lambda model: 3e9)
    assert costs(tmp_path).memory == usual.memory


def test_a_router_that_counts_all_tokens_for_all_experts_takes_longer_than_one_that_follows_the_model(
    tmp_path: Path,
) -> None:
    seconds = {router: costs(tmp_path, router).seconds for router in ("routed", "gated", "blended", "every_expert")}
    assert seconds["routed"] == seconds["gated"] < seconds["blended"] == seconds["every_expert"]


def test_an_expert_that_no_token_chooses_costs_the_model_itself_nothing(tmp_path: Path) -> None:
    """Blocks of twice as many experts, of which a token takes two as before, take less than twice as long to pass."""
    tokens = 100_000  # so many that nothing else counts

    def passing(experts: int) -> float:
        return costs(tmp_path, tokens=tokens, num_local_experts=experts).seconds

    assert passing(16) < 1.2 * passing(4)


def test_a_whole_curvature_takes_longer_and_more_memory_than_its_diagonal(tmp_path: Path) -> None:
    diagonal, full = (costs(tmp_path, estimator=estimator) for estimator in ("diagonal", "full"))
    assert diagonal.seconds < full.seconds
    assert diagonal.memory < full.memory


def test_a_curvature_within_blocks_takes_less_than_a_whole_one(tmp_path: Path) -> None:
    wide: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512}
    blocks, full = (costs(tmp_path, estimator=estimator, **wide) for estimator in ("block_diagonal", "full"))
    assert blocks.seconds < full.seconds
    assert blocks.memory < full.memory


def test_a_solver_tells_how_long_it_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiled, "COMPILE_FROM", 0)  # pico layers are too small to compile anything for
    assert costs(tmp_path, solver="rtn").seconds < costs(tmp_path, solver="exact").seconds


def test_layers_in_turn_take_memory_where_there_is_some_and_else_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimates = []
    for free in (1 << 40, 0):
        monkeypatch.setattr(paused, "free_memory", lambda device, free=free: free)
        recipe = build_recipe(
            pico_model("llama", tmp_path / "model"), tmp_path / "out", calibration=TEXT | {"propagate": "sequential"}
        )
        model = open_model(recipe)
        estimates.append(estimate(model, plan_model(recipe, model), recipe))
    pausing, repeating = estimates
    assert pausing.pausing is not None
    assert repeating.pausing is not None
    assert (pausing.pausing.fits, repeating.pausing.fits) == (True, False)
    assert pausing.memory - repeating.memory == pausing.pausing.memory == repeating.pausing.memory
    assert pausing.seconds < repeating.seconds
    assert costs(tmp_path).pausing is None


def tuned(model: Path, **tuner: Any) -> Estimate:
    """The estimate for a pico Llama with a tuner, or without one."""
    strategy = {"name": "distill", **tuner} if tuner else None
    recipe = build_recipe(model, model.parent / "out", dtype="float32", tuner=strategy)
    opened = open_model(recipe)
    return estimate(opened, plan_model(recipe, opened), recipe)


def test_a_tuner_takes_time_and_memory_by_its_steps_and_by_what_it_changes(model: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(model, tmp_path / "model"))
    plain, few = tuned(own), tuned(own, samples=10, sequence_length=50)
    assert plain.tuning is None
    assert few.tuning is not None
    assert few.tuning.tokens == 500
    assert few.seconds == plain.seconds + few.tuning.seconds > plain.seconds
    assert few.memory >= few.tuning.memory
    assert few.memory > plain.memory
    for more in ({"samples": 1000}, {"epochs": 4}):
        longer = tuned(own, **{"samples": 10, "sequence_length": 50, **more}).tuning
        assert longer is not None
        assert longer.seconds > few.tuning.seconds
    norms = tuned(own, samples=10, sequence_length=50, scales=0, offsets=0).tuning
    assert norms is not None
    assert norms.memory < few.tuning.memory
    large = tuned(own, samples=10**6, sequence_length=50).tuning
    assert large is not None
    assert large.memory - few.tuning.memory == (10**6 - 10) * 50 * 48 * 4  # hidden states of width 48, in float32


def test_a_tuner_with_room_for_its_passes_takes_more_memory_and_less_time(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dashq.estimate._products_per_second", lambda model, dtype: 1e9)
    kept = tuned(model, samples=10, sequence_length=50).tuning
    monkeypatch.setattr("dashq.tuning.planned.free_memory", lambda device: 0)
    repeated = tuned(model, samples=10, sequence_length=50).tuning
    assert kept is not None
    assert repeated is not None
    assert kept.memory > repeated.memory
    assert kept.seconds < repeated.seconds


def test_no_run_is_told_to_take_less_than_its_start(tmp_path: Path) -> None:
    assert costs(tmp_path).seconds > module.START


def test_processes_share_a_tuners_checks_and_the_samples_of_its_steps(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dashq.estimate._products_per_second", lambda model, dtype: 1e9)
    times: dict[int, list[float]] = {}
    for batch in (1, 4):
        tuner = {"name": "distill", "samples": 8, "sequence_length": 512, "batch": batch}
        recipe = build_recipe(model, tmp_path / "out", dtype="float32", tuner=tuner)
        opened = open_model(recipe)
        plans = plan_model(recipe, opened)
        costs = [estimate(opened, plans, recipe, processes).tuning for processes in (1, 2, 4)]
        assert all(costs)
        times[batch] = [own.seconds for own in costs if own]
        packed = sum(plan.bytes for plan in plans)
        assert [own.memory - costs[0].memory for own in costs[1:] if own and costs[0]] == [packed, packed]
    assert times[1][0] > times[1][1] > times[1][2] > 0.7 * times[1][0]  # the steps are not shared
    assert times[4][1] < 0.6 * times[4][0]
    assert times[4][2] < 0.7 * times[4][1]  # of the text there are but two batches


def test_full_curvatures_are_counted_as_often_as_they_are_in_memory(model: Path, tmp_path: Path) -> None:
    scheme = small_scheme(estimator="full", solver="feedback")

    def matrices(states: int, **text: Any) -> float:
        """The bytes for a block, in matrices of the widest layer's columns."""
        recipe = build_recipe(model, tmp_path / "out", calibration=TEXT | text, scheme=scheme)
        plans = [plan for plan in plan_model(recipe, open_model(recipe)) if plan.layer.block == "model.layers.0"]
        return module._memory_of_curvature(plans, recipe.calibration, states) / (4 * 80**2)

    in_turn: dict[str, Any] = {"propagate": "sequential"}
    assert matrices(2, **in_turn) == module.MATRICES  # to solve takes more than two sums and one that is formed
    assert matrices(9, **in_turn) == 9 + 1
    assert matrices(9, **in_turn, error_correction=0.5) == 2 * (9 + 1)
    assert matrices(2, propagate="original") == module.MATRICES + 6 * 48**2 / 80**2  # beside those of other layers


def test_several_processes_take_less_time_and_keep_fewer_states_the_more_they_are(model: Path, tmp_path: Path) -> None:
    text = {"dataset": "pydoc", "samples": 64, "sequence_length": 40, "propagate": "original"}
    scheme = small_scheme(estimator="full", solver="feedback")
    recipe = build_recipe(model, tmp_path / "out", calibration=text, scheme=scheme)
    opened = open_model(recipe)
    plans = plan_model(recipe, opened)
    costs = [estimate(opened, plans, recipe, processes) for processes in (1, 2, 4, 8)]
    seconds = [each.seconds for each in costs]
    assert seconds == sorted(seconds, reverse=True)
    assert len(set(seconds)) == 4
    shared = [each.memory for each in costs[1:]]
    assert shared == sorted(shared, reverse=True)


def test_layers_that_are_solved_in_turn_gain_less_from_processes(model: Path, tmp_path: Path) -> None:
    times = {}
    for propagate in ("original", "sequential"):
        text = {"dataset": "pydoc", "samples": 8, "sequence_length": 40, "propagate": propagate}
        recipe = build_recipe(model, tmp_path / propagate, calibration=text)
        plans = plan_model(recipe, open_model(recipe))
        times[propagate] = [module._solving(plans, recipe, processes) for processes in (1, 4)]
    assert times["original"][0] == times["sequential"][0]
    assert times["original"][1] < times["sequential"][1]
