"""The table of `dashq plan`."""

from collections.abc import Sequence
from typing import Literal

from rich.markup import escape
from rich.table import Table

from dashq.recipe.plan import LayerPlan


def plan_table(plans: Sequence[LayerPlan], width: int) -> Table:
    """A row for each layer, or for experts that are planned alike, as wide as the terminal."""
    headings = ("override", "shape", "bits", "group", "bytes", "bits/\nweight")
    rows = {_name(span): _cells(span) for span in _experts_alike(plans)}
    columns = zip(*rows.values(), [heading.split("\n")[-1] for heading in headings], strict=True)
    widths = [max(map(len, column)) for column in columns]
    room = width - sum(widths) - len(widths)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer", overflow="fold", vertical="bottom")
    for heading in headings:
        justify: Literal["left", "right"] = "left" if heading == "override" else "right"
        table.add_column(heading, justify=justify, vertical="bottom", no_wrap=True)
    for name, cells in rows.items():
        table.add_row(escape(_broken(name, room)), *map(escape, cells))
    return table


def _name(span: Sequence[LayerPlan]) -> str:
    """The name of a layer, or of successive experts as `experts.down_proj.0 … 7`."""
    first, last = span[0].layer, span[-1].layer
    if first.stack is None or first == last:
        return first.name
    return first.stack.replace("*", f"{first.expert} … {last.expert}")


def _cells(span: Sequence[LayerPlan]) -> tuple[str, ...]:
    """The other columns of a row; only bytes add up over a span."""
    plan = span[0]
    layer = plan.layer
    override = plan.rule.removeprefix("override ") if plan.rule != "scheme" else "–"
    shape, size = f"{layer.rows}×{layer.columns}", sum(plan.bytes for plan in span)
    return override, shape, str(plan.scheme.bits), str(plan.size), f"{size:,}", f"{plan.bits_per_weight:.3f}"


def _broken(name: str, room: int) -> str:
    """The name in two lines, its last two parts in the second, where there is no room for it in one."""
    head, *rest = name.rsplit(".", 2)
    return f"{head}.\n  {'.'.join(rest)}" if len(name) > room else name


def _experts_alike(plans: Sequence[LayerPlan]) -> list[list[LayerPlan]]:
    """Layers one by one, but successive experts that are planned alike together: there can be thousands."""
    spans: list[list[LayerPlan]] = []
    latest: dict[str, list[LayerPlan]] = {}
    for plan in plans:
        expert = plan.layer.expert
        stack = plan.layer.stack or plan.layer.name
        before = latest[stack][-1] if stack in latest else None
        if (
            before
            and before.layer.expert == (expert or 0) - 1
            and (before.rule, before.scheme, before.bytes) == (plan.rule, plan.scheme, plan.bytes)
        ):
            latest[stack].append(plan)
        else:
            latest[stack] = [plan]
            spans.append(latest[stack])
    return spans
