"""Layers in strips of rows that are solved apart: fixed by shape and solver, so that any process can solve one."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from dashq.processes.balance import balanced
from dashq.recipe.plan import LayerPlan

MOST = 8  # strips of a layer
LEAST = 1 << 21  # weights in a strip: with fewer, a solver's calls would take longer than for the layer as a whole
MORE = 0.05  # of the cost of a layer at most, by which it may grow where it is cut
MULTIPLE = 64  # of rows, so that kernels find whole registers


def strips_of(plan: LayerPlan) -> list[slice]:
    """The rows of a layer cut into as many strips as cost little more than the whole, by what its solver claims."""
    layer, whole = plan.layer, sum(_costs(plan, [slice(0, plan.layer.rows)]))
    for count in range(MOST, 1, -1):
        rows = -(-layer.rows // (count * MULTIPLE)) * MULTIPLE
        strips = [slice(start, min(start + rows, layer.rows)) for start in range(0, layer.rows, rows)]
        if rows * layer.columns >= LEAST and sum(_costs(plan, strips)) <= (1 + MORE) * whole:
            return strips
    return [slice(0, layer.rows)]


def solvers_of(plans: Sequence[LayerPlan], processes: int) -> Mapping[str, Sequence[int]]:
    """The process that solves each strip, by the layer's name, so that all have about as much to do.

    A layer's strips are those of as few processes as that allows: each needs to know all about the layer's inputs.
    """
    costs = {plan.layer.name: _costs(plan, strips_of(plan)) for plan in plans}
    names = sorted(costs, key=lambda name: -sum(costs[name]))
    chosen = iter(balanced([cost for name in names for cost in costs[name]], processes))
    return {name: [next(chosen) for _ in costs[name]] for name in names}


def _costs(plan: LayerPlan, strips: Sequence[slice]) -> list[float]:
    """Nanoseconds to solve each of some strips."""
    layers = [replace(plan.layer, rows=strip.stop - strip.start) for strip in strips]
    return [layer.weights * plan.scheme.solver.nanoseconds(layer, plan.size, plan.grid) for layer in layers]
