"""A budget of bytes is spent as well as it can be: against brute force, at its ends, and at the size of real models."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dashq import PlanError
from dashq.measuring.allocation import Option, allocate

options = st.builds(Option, st.integers(1, 40), st.floats(0, 10).map(lambda cost: round(cost, 3)))
parts = st.lists(st.lists(options, min_size=1, max_size=4), min_size=1, max_size=5)


def spent(parts: Sequence[Sequence[Option]], chosen: Sequence[int]) -> int:
    return sum(options[index].bytes for options, index in zip(parts, chosen, strict=True))


def cost(parts: Sequence[Sequence[Option]], chosen: Sequence[int]) -> float:
    return sum(options[index].cost for options, index in zip(parts, chosen, strict=True))


@given(parts, st.integers(0, 200))
def test_no_choice_within_the_budget_costs_less(parts: list[list[Option]], budget: int) -> None:
    possible = [
        chosen for chosen in itertools.product(*(range(len(p)) for p in parts)) if spent(parts, chosen) <= budget
    ]
    if not possible:
        with pytest.raises(PlanError, match=r"smallest choices take \d+ bytes, \d+ more than"):
            allocate(parts, budget)
        return
    chosen = allocate(parts, budget)
    assert spent(parts, chosen) <= budget
    assert cost(parts, chosen) == pytest.approx(min(cost(parts, other) for other in possible), abs=1e-9)


@given(parts, st.integers(0, 200), st.integers(0, 50))
def test_a_larger_budget_never_costs_more(parts: list[list[Option]], budget: int, more: int) -> None:
    budget = max(budget, sum(min(option.bytes for option in options) for options in parts))
    assert cost(parts, allocate(parts, budget + more)) <= cost(parts, allocate(parts, budget)) + 1e-9


@given(parts)
def test_with_room_for_everything_each_part_takes_its_cheapest_option(parts: list[list[Option]]) -> None:
    chosen = allocate(parts, sum(max(option.bytes for option in options) for options in parts))
    least = sum(min(option.cost for option in options) for options in parts)
    assert cost(parts, chosen) == pytest.approx(least, abs=1e-9)


@settings(max_examples=20)
@given(st.integers(0, 1000), st.floats(1e-12, 1e6))
def test_costs_of_any_unit_give_the_same_choice(seed: int, unit: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    costs = torch.rand(20, 3, generator=generator).tolist()
    parts = [[Option(100 * (index + 2), cost) for index, cost in enumerate(row)] for row in costs]
    scaled = [[Option(option.bytes, unit * option.cost) for option in options] for options in parts]
    assert cost(parts, allocate(parts, 6000)) == pytest.approx(cost(parts, allocate(scaled, 6000)))


def test_a_model_of_odd_sizes_is_allocated_to_the_last_byte_that_pays() -> None:
    """As many layers as a model of seven billion weights has, of sizes without a common unit."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(10**6, 5 * 10**7, (224,), generator=generator).tolist()
    weights = torch.rand(224, generator=generator).tolist()
    parts = [
        [Option(size * bits // 8 + size % 97, weight * size * 4.0**-bits) for bits in (2, 3, 4, 8)]
        for size, weight in zip(sizes, weights, strict=True)
    ]
    budget = int(2.7 * sum(sizes) / 8)
    chosen = allocate(parts, budget)
    assert spent(parts, chosen) <= budget
    used = {4 * 2 ** (index == 3) if index > 1 else index + 2 for index in chosen}
    assert {2, 3, 4} <= used
    # No single part can go on to its next option without leaving the budget.
    room = budget - spent(parts, chosen)
    steps = [options[i + 1].bytes - options[i].bytes for options, i in zip(parts, chosen, strict=True) if i < 3]
    assert min(steps) > room
