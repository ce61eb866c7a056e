"""The tables of `dashq plan`: a line for layers alike, or for each layer."""

from collections.abc import Sequence
from typing import Literal

from rich.markup import escape
from rich.table import Table

from dashq.recipe.plan import LayerPlan
from dashq_cli.formats import runs

NO_OVERRIDE = "–"


def kind_table(plans: Sequence[LayerPlan]) -> Table:
    """A row for all layers of one kind that are planned alike, with the blocks that they are in."""
    kinds: dict[tuple[object, ...], list[LayerPlan]] = {}
    for plan in plans:
        alike = (_kind(plan), plan.rule, plan.bytes, plan.layer.rows, plan.layer.columns)  # a rule stands for a scheme
        kinds.setdefault(alike, []).append(plan)
    order = list(dict.fromkeys(_kind(plan) for plan in plans))
    groups = sorted(kinds.values(), key=lambda group: order.index(_kind(group[0])))
    prefixes = {_prefix(plan) for plan in plans} - {""}
    shared = f"{prefixes.pop()}.*." if len(prefixes) == 1 else ""
    title = f"layers of {shared.removesuffix('.')}" if shared else "layers"
    with_overrides = any(plan.rule != "scheme" for plan in plans)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(title, overflow="fold", vertical="bottom")
    table.add_column("in blocks", overflow="fold", vertical="bottom")
    for heading in (*(["override"] if with_overrides else []), "shape", "bits", "group", "size", "bits/\nweight"):
        justify: Literal["left", "right"] = "left" if heading == "override" else "right"
        table.add_column(heading, justify=justify, vertical="bottom", no_wrap=True)
    for group in groups:
        first = group[0]
        blocks = runs(sorted({int(plan.layer.block.rpartition(".")[2]) for plan in group if _prefix(plan)}))
        override = [_override(first)] if with_overrides else []
        cells = (
            *override,
            f"{first.layer.rows}×{first.layer.columns}",
            _bits(first),
            str(first.size),
            size(sum(plan.bytes for plan in group)),
            f"{first.bits_per_weight:.3f}",
        )
        table.add_row(escape(_kind(first).removeprefix(shared)), blocks or NO_OVERRIDE, *cells)
    return table


def layer_table(plans: Sequence[LayerPlan], width: int) -> Table:
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


def size(count: float) -> str:
    """Bytes in words."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _kind(plan: LayerPlan) -> str:
    """The name of a layer with stars in the place of the numbers of its block and its expert."""
    name, prefix = plan.layer.stack or plan.layer.name, _prefix(plan)
    return f"{prefix}.*{name[len(plan.layer.block) :]}" if prefix else name


def _prefix(plan: LayerPlan) -> str:
    """The name that all decoder blocks have in common, before their numbers; empty for a layer outside of them."""
    prefix, _, number = plan.layer.block.rpartition(".")
    return prefix if number.isdecimal() else ""


def _override(plan: LayerPlan) -> str:
    return plan.rule.removeprefix("override ") if plan.rule != "scheme" else NO_OVERRIDE


def _bits(plan: LayerPlan) -> str:
    """The bits of a layer, and the type that the recipe names."""
    return f"{plan.scheme.bits} {plan.scheme.type}" if plan.scheme.type else str(plan.scheme.bits)


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
    shape, total = f"{layer.rows}×{layer.columns}", sum(plan.bytes for plan in span)
    return _override(plan), shape, _bits(plan), str(plan.size), f"{total:,}", f"{plan.bits_per_weight:.3f}"


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
