"""Layers in strips of rows that are solved apart: fixed by shape and solver, so that any process can solve one."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from dashq.processes.balance import balanced
from dashq.recipe.plan import LayerPlan

MOST = 8  # strips of a layer
LEAST = 1 << 21  # weights in a strip: with fewer, a solver's calls would take longer than for the layer as a whole
MORE = 0.05  # of the cost of a layer at most, by which it may grow where it is cut
MULTIPLE = 64  # of rows, so that kernels find whole registers
TOGETHER = 0.75  # of the cost of layers apart: those that cost no more in one call are solved together


def strips_of(plan: LayerPlan) -> list[slice]:
    """The rows of a layer cut into as many strips as cost little more than the whole, by what its solver claims."""
    layer, whole = plan.layer, sum(_costs(plan, [slice(0, plan.layer.rows)]))
    for count in range(MOST, 1, -1):
        rows = -(-layer.rows // (count * MULTIPLE)) * MULTIPLE
        strips = [slice(start, min(start + rows, layer.rows)) for start in range(0, layer.rows, rows)]
        if rows * layer.columns >= LEAST and sum(_costs(plan, strips)) <= (1 + MORE) * whole:
            return strips
    return [slice(0, layer.rows)]


def solved_together(plans: Sequence[LayerPlan]) -> list[list[LayerPlan]]:
    """Layers that share their inputs, such as q, k and v, in lists of those whose rows are solved in one call.

    They are planned alike, and too small for strips; and by what their solver claims, one call takes much less time
    than one for each. A layer that is solved alone is a list of its own.
    """
    alike: list[list[LayerPlan]] = []
    for plan in plans:
        same = (some for some in alike if _planned_alike(plan, some[0]))
        if some := next(same, None):
            some.append(plan)
        else:
            alike.append([plan])
    lists: list[list[LayerPlan]] = []
    for some in alike:
        apart = sum(sum(_costs(plan, strips_of(plan))) for plan in some)
        whole = all(len(strips_of(plan)) == 1 for plan in some)
        if whole and sum(_costs(some[0], [_all_rows(some)])) <= TOGETHER * apart:
            lists.append(some)
        else:
            lists += [[plan] for plan in some]
    return lists


def solvers_of(plans: Sequence[LayerPlan], processes: int, shared: bool = False) -> Mapping[str, Sequence[int]]:
    """The process that solves each strip, by the layer's name, so that all have about as much to do.

    A layer's strips are those of as few processes as that allows: each needs to know all about the layer's inputs.
    Where the layers have `shared` inputs, those that are solved together are one process's.
    """
    lists = solved_together(plans) if shared else [[plan] for plan in plans]
    costs = [_costs(some[0], [_all_rows(some)] if len(some) > 1 else strips_of(some[0])) for some in lists]
    order = sorted(range(len(lists)), key=lambda number: -sum(costs[number]))
    chosen = iter(balanced([cost for number in order for cost in costs[number]], processes))
    solvers: dict[str, Sequence[int]] = {}
    for number in order:
        own = [next(chosen) for _ in costs[number]]
        solvers |= {plan.layer.name: own for plan in lists[number]}
    return solvers


def _planned_alike(plan: LayerPlan, other: LayerPlan) -> bool:
    """True for layers as wide with the same scheme, whose columns stay in their own order."""
    alike = (plan.scheme, plan.grid, plan.size) == (other.scheme, other.grid, other.size)
    return alike and plan.layer.columns == other.layer.columns and not plan.scheme.grouper.reorders


def _all_rows(plans: Sequence[LayerPlan]) -> slice:
    return slice(0, sum(plan.layer.rows for plan in plans))


def _costs(plan: LayerPlan, strips: Sequence[slice]) -> list[float]:
    """Nanoseconds to solve each of some strips."""
    layers = [replace(plan.layer, rows=strip.stop - strip.start) for strip in strips]
    return [layer.weights * plan.scheme.solver.nanoseconds(layer, plan.size, plan.grid) for layer in layers]
