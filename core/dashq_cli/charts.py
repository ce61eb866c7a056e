"""Figures of an analysis, by layer, and of a sweep: its members by bytes and quality."""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dashq.measuring.analysis import LayerAnalysis

INCHES_PER_BLOCK, INCHES_PER_LAYER = 0.2, 0.3
# Tones that can be read on white and on dark pages; the background is that of the page.
INK = "#7d828c"
COLORS = ["#3b82f6", "#e8833a", "#2fa866", "#d6517d", "#8b6fd8", "#a8862c"]
THEME: dict[Any, Any] = {
    "svg.hashsalt": "dashq",  # the same figures give the same file
    "axes.prop_cycle": cycler(color=COLORS),
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "grid.color": INK,
    **{f"{part}.color": INK for part in ("text", "xtick", "ytick")},
    **{f"axes.{part}color": INK for part in ("edge", "label", "title")},
}
themed = matplotlib.rc_context(THEME)


@themed
def save(figure: Figure, path: Path) -> None:
    """Write a figure; the same one gives the same file."""
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else {})


@themed
def sensitivity(layers: Sequence[LayerAnalysis]) -> Figure:
    """A map for each number of bits: a column for each block, a row for each kind of layer; experts are added up.

    Groups are those of the scheme.
    """
    costs: dict[int, dict[tuple[str, int], float]] = defaultdict(lambda: defaultdict(float))
    for layer in layers:
        block, kind = _place(layer)
        for choice in layer.choices:
            if choice.grouper == layer.choices[0].grouper:
                costs[choice.bits][kind, block] += choice.sensitivity
    kinds = list(dict.fromkeys(_place(layer)[1] for layer in layers))
    blocks = 1 + max(block for cells in costs.values() for _, block in cells)
    positive = [1000 * cost for cells in costs.values() for cost in cells.values() if cost > 0]
    scale = LogNorm(min(positive), max(positive)) if positive else None
    size = (max(6.0, 2.2 + INCHES_PER_BLOCK * blocks), 0.9 + len(costs) * (0.5 + INCHES_PER_LAYER * len(kinds)))
    figure = Figure(figsize=size, layout="constrained")
    rows = figure.subplots(len(costs), 1, squeeze=False, sharex=True)[:, 0]
    for axes, bits in zip(rows, sorted(costs), strict=True):
        grid = [[1000 * costs[bits].get((kind, b), 0.0) or float("nan") for b in range(blocks)] for kind in kinds]
        axes.imshow(grid, aspect="auto", norm=scale, cmap="viridis", interpolation="nearest")
        axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
        axes.set_title(f"{bits} bits", fontsize=9, loc="left")
    rows[-1].set_xlabel("block")
    rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    colors = ScalarMappable(scale, "viridis")
    figure.colorbar(colors, ax=list(rows), label="expected loss, thousandths of a nat per token", aspect=40, pad=0.01)
    return figure


@themed
def noise(layers: Sequence[LayerAnalysis]) -> Figure:
    """For each layer two boxes, of the entries on the diagonal of H and off it: quartiles, and from 5 % to 95 %."""
    figure = Figure(figsize=(7.0, 1.2 + 2 * INCHES_PER_LAYER * len(layers)), layout="constrained")
    axes = figure.subplots()
    noises = {index: layer.signal_to_noise for index, layer in enumerate(layers) if layer.signal_to_noise}
    diagonal = [noise.diagonal for noise in noises.values()]
    off_diagonal = [noise.off_diagonal for noise in noises.values()]
    for shift, color, label, rows in (
        (-0.2, COLORS[0], "on the diagonal", diagonal),
        (0.2, COLORS[1], "off the diagonal", off_diagonal),
    ):
        boxes: list[dict[str, Any]] = [
            dict(zip(("whislo", "q1", "med", "q3", "whishi"), quantiles, strict=True)) for quantiles in rows
        ]
        if not boxes:
            continue
        drawn = axes.bxp(
            boxes,
            positions=[index + shift for index in noises],
            widths=0.3,
            orientation="horizontal",
            showfliers=False,
            patch_artist=True,
            boxprops={"facecolor": color, "edgecolor": color, "alpha": 0.6},
            medianprops={"color": INK, "linewidth": 1.5},
            whiskerprops={"color": color},
            capprops={"color": color},
        )
        drawn["boxes"][0].set_label(label)
    axes.axvline(1, color=INK, linestyle="--", linewidth=1, label="as large as its standard error")
    axes.set_yticks(range(len(layers)), [layer.name for layer in layers], fontsize=8)
    axes.set(xscale="log", xlabel="|mean| / standard error of an entry of H", ylim=(len(layers) - 0.4, -0.6))
    figure.legend(loc="outside upper right", ncols=3)
    return figure


@themed
def quality(points: Sequence[tuple[str, int, float]]) -> Figure:
    """Results by name, bytes on disk and divergence from the original, in nats per token.

    A line joins those that no other beats in both.
    """
    figure = Figure(figsize=(7.2, 4.5), layout="constrained")
    axes = figure.subplots()
    megabytes = [size / 1e6 for _, size, _ in points]
    axes.scatter(megabytes, [divergence for *_, divergence in points], color="C0", zorder=3)
    best: list[tuple[float, float]] = []
    for size, divergence in sorted((size / 1e6, divergence) for _, size, divergence in points):
        if not best or divergence < best[-1][1]:
            best.append((size, divergence))
    axes.step(*zip(*best, strict=True), where="post", color="C1", linewidth=1, label="best at this size")
    for name, size, divergence in points:
        axes.annotate(
            name.replace("_", "\n"), (size / 1e6, divergence), xytext=(5, 3), textcoords="offset points", fontsize=7
        )
    axes.set(xlabel="size on disk [MB]", ylabel="divergence from the original [nats per token]")
    if all(divergence > 0 for *_, divergence in points):
        axes.set_yscale("log")
    axes.margins(x=0.25, y=0.15)  # for names
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _place(layer: LayerAnalysis) -> tuple[int, str]:
    """The number of the block, and the name inside it without an expert's number."""
    block = layer.layer.block
    number, inside = int(block.rpartition(".")[2]) if block else 0, layer.name.removeprefix(f"{block}.")
    return number, re.sub(rf"\.{layer.expert}(?=\.|$)", "", inside) if layer.expert is not None else inside
