"""Layers are cut into strips of rows by shape and solver alone, and each process has some in a row."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashq import Layer, LayerPlan, Recipe
from dashq.calibration import strips as under_test
from dashq.calibration.strips import solved_together, solvers_of, strips_of
from dashq.recipe.plan import plan_layer
from recipes import build_recipe, small_scheme


@cache
def recipe_with(solver: str, bits: int = 3) -> Recipe:
    estimator = "full" if solver == "feedback" else "diagonal"
    scheme = small_scheme(solver=solver, estimator=estimator, grouper={"name": "contiguous", "size": 16}, bits=bits)
    with TemporaryDirectory() as folder:
        return build_recipe(Path(folder) / "model", Path(folder) / "out", scheme=scheme)


def planned(rows: int, columns: int, solver: str = "closed_form", name: str = "layer", bits: int = 3) -> LayerPlan:
    recipe = recipe_with(solver, bits)
    return plan_layer(recipe, Layer(name=name, rows=rows, columns=columns), recipe.scheme, "scheme")


@given(rows=st.integers(1, 40_000), columns=st.sampled_from([576, 4096, 28672]))
def test_strips_are_all_rows_in_their_order_and_none_is_small(rows: int, columns: int) -> None:
    strips = strips_of(planned(rows, columns))
    assert [row for strip in strips for row in (strip.start, strip.stop)][1:-1] == [
        row for strip in strips[1:] for row in (strip.start, strip.start)
    ]
    assert (strips[0].start, strips[-1].stop) == (0, rows)
    assert len(strips) <= under_test.MOST
    for strip in strips[:-1]:
        assert (strip.stop - strip.start) % under_test.MULTIPLE == 0
        assert (strip.stop - strip.start) * columns >= under_test.LEAST


def test_layers_are_cut_where_it_costs_little() -> None:
    assert len(strips_of(planned(576, 576))) == 1  # too small
    assert len(strips_of(planned(8192, 8192))) == 8
    # Columns take their turns in each strip anew, which counts for less the wider a layer is.
    assert len(strips_of(planned(2048, 2048, "feedback"))) == 1
    assert len(strips_of(planned(4096, 4096, "feedback"))) == 2
    assert len(strips_of(planned(8192, 28672, "feedback"))) == 8


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_strips_are_spread_and_a_layer_s_stay_together(processes: int) -> None:
    plans = [planned(rows, 4096, name=f"layer {rows}") for rows in (1024, 4096, 8192)]
    solvers = solvers_of(plans, processes)
    assert {name: len(own) for name, own in solvers.items()} == {
        plan.layer.name: len(strips_of(plan)) for plan in plans
    }
    assert {process for own in solvers.values() for process in own} == set(range(processes))
    assert all(list(own) == sorted(own) for own in solvers.values())


def names(lists: list[list[LayerPlan]]) -> list[list[str]]:
    return [[plan.layer.name for plan in some] for some in lists]


def test_layers_are_solved_together_where_that_saves_much() -> None:
    def together(rows: dict[str, int], columns: int, solver: str = "feedback") -> list[list[str]]:
        return names(solved_together([planned(own, columns, solver, name) for name, own in rows.items()]))

    # Columns take their turns once for all of them, which is most of what a small layer takes.
    assert together({"q": 576, "k": 192, "v": 192}, 576) == [["q", "k", "v"]]
    assert together({"gate": 1536, "up": 1536}, 576) == [["gate"], ["up"]]
    assert together({"q": 576, "k": 192, "v": 192}, 576, "closed_form") == [["q"], ["k"], ["v"]]
    assert together({"q": 4096, "k": 64, "v": 64}, 4096) == [["q"], ["k"], ["v"]]  # one has strips


def test_layers_that_are_planned_otherwise_are_solved_apart() -> None:
    plans = [planned(192, 576, "feedback", name, bits) for name, bits in (("q", 3), ("k", 4), ("v", 3))]
    assert names(solved_together(plans)) == [["q", "v"], ["k"]]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_layers_that_are_solved_together_are_one_process_s(processes: int) -> None:
    plans = [planned(rows, 576, "feedback", name) for name, rows in (("q", 576), ("k", 192), ("v", 192))]
    assert len({tuple(own) for own in solvers_of(plans, processes, shared=True).values()}) == 1
    assert len({tuple(own) for own in solvers_of(plans, processes).values()}) == processes
