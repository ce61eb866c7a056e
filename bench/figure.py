"""Draw perplexity against bits, samples, seconds, bytes, steps or choices of schemes, and growth, from results."""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.figure import Figure

from dashq_cli.charts import COLORS, INK, THEME

# The lines of each method of `peers`: bits per weight and perplexity, the best where there are several.
PEERS = {
    "GPTQ": ("gptqmodel", "llm-compressor-gptq"),
    "AutoRound": ("auto-round",),
    "closed_form": ("closed_form",),
    "hybrid, feedback": ("hybrid",),
}
METHODS = {
    "paper": "irls, paper settings",
    "closed_form": "closed_form",
    "full": "full, feedback",
    "hybrid": "hybrid, feedback",
}
SECONDS = {
    "closed_form": "closed_form",
    "hybrid": "hybrid, feedback",
    "gptqmodel": "GPTQ, gptqmodel",
    "llm-compressor-gptq": "GPTQ, llm-compressor",
    "auto-round": "AutoRound",
}
CONTEXT = 1024  # tokens in the windows of the figure of robustness
MOST_PERPLEXITY = 1000  # in the figure of files: nothing is left of a model above it
OWN_FORMAT = "dashq, own format, 2 bits, by bits of the table"
# Whole files by what they are made by or for: color, mark, and how far above it labels stand.
MAKERS = {
    "dashq, for llama.cpp": (COLORS[0], "D", -12),
    "llama-quantize": (COLORS[1], "^", 6),
    "dashq, for mlx": (COLORS[2], "o", -12),
    "mlx-lm": (COLORS[3], "s", 6),
    OWN_FORMAT: (COLORS[4], "v", 6),
}
HOLLOW: Mapping[str, Any] = {"markerfacecolor": "none", "linestyle": ":"}
TEXTS = {"wikitext2": "WikiText-2 test", "c4": "C4, calibrated on WikiText-2"}
# In the figure of the tuner: the rate of the scales, and what is marked at the axes.
RATE = 0.003
TICKS = {"wikitext2": [20, 30, 40, 50], "c4": [40, 60, 80, 100, 120]}
# What grows in runs: the number along the axis, what counts as one, and what it is.
GROWING = {
    "blocks": ("blocks", 1, "blocks"),
    "width": ("weights", 1e6, "million weights, by width"),
    "experts": ("experts", 1, "experts in a block"),
    "tokens": ("tokens", 1e3, "thousand tokens of text"),
}

Rows = list[dict[str, Any]]


def main() -> None:
    """Read the figures, write an SVG."""
    parser = argparse.ArgumentParser(prog="python -m bench figure", description=__doc__)
    parser.add_argument("bench", nargs="?", choices=DRAWINGS, default="smollm2")
    arguments = parser.parse_args()
    output = Path(f"docs/figures/{arguments.bench}.svg")
    pyplot.rcParams.update(THEME)
    figure = DRAWINGS[arguments.bench]()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, metadata={"Date": None})


def read(bench: str) -> Rows:
    """The lines of a file of results."""
    return [json.loads(line) for line in Path(f"bench/results/{bench}.jsonl").read_text("utf-8").splitlines()]


def against_bits() -> Figure:
    """Perplexity against bits per weight, at equal storage: whole zeros on the left of real ones."""
    peers = [row for row in read("peers") if "perplexity" in row]
    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    for label, methods in PEERS.items():
        lines = {"integer": "o--", "real": "o-"} if len(methods) == 1 and methods[0] in METHODS else {"integer": "o--"}
        color = None
        for zero, style in lines.items():
            best: dict[float, float] = {}
            for row in peers:
                if row["method"] in methods and row["zero"] == zero:
                    bits, measured = row["bits_per_weight"], row["perplexity"]["wikitext2"]
                    best[bits] = min(measured, best.get(bits, measured))
            name = f"{label}{', real zeros' if zero == 'real' else ''}"
            (line,) = axes.plot([*best], [*best.values()], style, color=color, label=name, markersize=4)
            color = line.get_color()
    hybrid = axes.lines[-1].get_color()
    budgets: dict[float, float] = {}
    for row in read("budgets"):
        measured = row["perplexity"]["wikitext2"]
        budgets[row["budget"]] = min(measured, budgets.get(row["budget"], measured))
    axes.plot([*budgets], [*budgets.values()], "s:", color=hybrid, label="hybrid within a budget", markersize=4)
    original = next(row["perplexity"]["wikitext2"] for row in peers if row["method"] == "original")
    axes.axhline(original, color=INK, linestyle="--", linewidth=1, label=f"original, 16 bits: {original:.2f}")
    axes.set(xlabel="bits per weight, scales and zeros included", ylabel="perplexity", yscale="log")
    axes.set_yticks(ticks := [20, 50, 100, 200, 500, 1000, 2000], map(str, ticks))
    axes.set_title("SmolLM2-135M-Instruct, WikiText-2 test")
    axes.legend()
    return figure


def against_samples() -> Figure:
    """Perplexity against calibration samples, one panel for each text: the mean over seeds, and each of them a dot."""
    comparable = [row for row in read("robustness") if row["context"] == CONTEXT and row.get("bits", 2) == 2]
    figure, panels = pyplot.subplots(1, len(TEXTS), figsize=(8.4, 3.6), layout="constrained")
    for axes, (text, title) in zip(panels, TEXTS.items(), strict=True):
        for method, label in METHODS.items():
            by_samples: dict[int, list[float]] = defaultdict(list)
            for row in comparable:
                if row["method"] == method:
                    by_samples[row["samples"]].append(row["perplexity"][text])
            samples = sorted(by_samples)
            if not samples:
                continue
            (line,) = axes.plot(samples, [mean(by_samples[number]) for number in samples], "-", label=label)
            dots = [(number, value) for number in samples for value in by_samples[number]]
            axes.plot(*zip(*dots, strict=True), ".", color=line.get_color())
        original = next(row["perplexity"][text] for row in comparable if row["method"] == "original")
        axes.axhline(original, color=INK, linestyle="--", linewidth=1, label="original, 16 bits")
        samples = sorted({row["samples"] for row in comparable if "samples" in row})
        axes.set(xscale="log", yscale="log", xlabel="calibration samples of 512 tokens", ylabel="perplexity")
        axes.set_xticks(samples, map(str, samples), minor=False)
        axes.minorticks_off()
        axes.set_yticks(ticks := [20, 50, 100, 200, 500, 1000], map(str, ticks))
        axes.set_title(title)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def against_seconds() -> Figure:
    """Perplexity at 2 bits against the seconds of the whole process, one dot for each program and kind of zero.

    Seconds of several machines are not to be compared: shown is the one that most lines are of.
    """
    rows = [row for row in read("peers") if row.get("bits") == 2 and row["method"] in SECONDS]
    [(machine, _)] = Counter(row["measured"]["machine"] for row in rows).most_common(1)
    rows = [row for row in rows if row["measured"]["machine"] == machine]
    figure, axes = pyplot.subplots(figsize=(7.6, 3.2), layout="constrained")
    for color, (method, label) in zip(COLORS, SECONDS.items(), strict=False):
        for row in (row for row in rows if row["method"] == method):
            filled = color if row["zero"] == "real" else "none"
            name = ", ".join([label, *([f"{row['iterations']} iterations"] if "iterations" in row else [])])
            axes.plot(
                row["seconds"],
                row["perplexity"]["wikitext2"],
                "^" if row.get("iterations") == 50 else "o",
                color=color,
                markerfacecolor=filled,
                label=f"{name}, {row['bits_per_weight']:.2f} bits",
            )
    axes.set(xscale="log", yscale="log", xlabel="seconds, one thread", ylabel="perplexity")
    axes.set_xticks(ticks := [60, 300, 1200, 4800], map(str, ticks), minor=False)
    axes.minorticks_off()
    axes.set_yticks(ticks := [50, 100, 200, 500, 1000, 2000], map(str, ticks))
    axes.set_title("SmolLM2-135M-Instruct at 2 bits, group 64: quality and time")
    figure.legend(loc="outside right center")
    return figure


def of_choices() -> Figure:
    """Perplexity within a budget beside uniform schemes, and with more bits in a critical tenth of the weights."""
    rows = {row["name"]: row for row in read("allocation")}
    figure, (budgets, critical) = pyplot.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained", width_ratios=[5, 4])
    for label, prefix, style, below in (("uniform", "uniform", "o-", 5), ("within a budget", "budget", "s-", -11)):
        chosen = [row for name, row in rows.items() if name.startswith(prefix) and " of " not in name]
        budgets.plot(
            [row["bits_per_weight"] for row in chosen], [row["perplexity"] for row in chosen], style, label=label
        )
        for row in chosen:
            place = (row["bits_per_weight"], row["perplexity"])
            budgets.annotate(
                f"{row['perplexity']:.0f}", place, (5, below), textcoords="offset points", fontsize=8, color=INK
            )
    budgets.axhline(rows["original"]["perplexity"], color=INK, linestyle="--", linewidth=1, label="original")
    budgets.set(xlabel="bits per weight", ylabel="perplexity", yscale="log", xlim=(2.4, 3.7))
    budgets.set_yticks(ticks := [20, 50, 100, 200], map(str, ticks))
    budgets.minorticks_off()
    budgets.set_title("closed_form: bits where they matter")
    budgets.legend()
    random = [row["perplexity"] for name, row in rows.items() if name.startswith("critical random")]
    bars = {
        "none: 2 bits throughout": rows["uniform 2/64"]["perplexity"],
        "at random, mean of 3": mean(random),
        **{f"by {key}": rows[f"critical {key}"]["perplexity"] for key in ("error", "snr", "sensitivity")},
    }
    critical.barh([*bars], [*bars.values()], color=[INK, INK, *COLORS[1:2] * 2, COLORS[0]], height=0.6)
    for index, value in enumerate(bars.values()):
        critical.annotate(f"{value:.0f}", (value, index), (4, 0), textcoords="offset points", va="center", color=INK)
    critical.set(xlabel="perplexity", xlim=(0, 260))
    critical.set_title("4 bits for a critical tenth: 2.7 bits")
    return figure


def against_bytes() -> Figure:
    """Perplexity against the bytes of the whole file, embeddings included: what programs make, each point labelled.

    Hollow marks are results of `--fast`. Of files in dashq's own format the labels say how embeddings are stored.
    """
    figure, axes = pyplot.subplots(figsize=(7.2, 4.2), layout="constrained")
    points: dict[tuple[str, bool], dict[str, tuple[float, float]]] = defaultdict(dict)
    for row in read("files"):
        maker, label, fast = _made_by(row)
        points[maker, fast][label] = row["bytes_on_disk"] / 1e6, row["perplexity"]["wikitext2"]
    for row in sorted(read("embeddings"), key=lambda row: -row["perplexity"]["wikitext2"]):  # the best comes last
        label = f"{row['embeddings']['bits'] if row['embeddings'] else 16}"
        points[OWN_FORMAT, False][label] = row["bytes_on_disk"] / 1e6, row["perplexity"]["wikitext2"]
    for (maker, fast), own in points.items():
        shown = {label: point for label, point in own.items() if point[1] < MOST_PERPLEXITY}
        color, mark, above = MAKERS[maker]
        style: Any = {"color": color, "marker": mark, "markersize": 5, "linewidth": 0.8}
        name = None if fast and (maker, False) in points else maker
        axes.plot(*zip(*sorted(shown.values()), strict=True), **style, label=name, **HOLLOW if fast else {})
        usual: Any = {"xytext": (7, 2), "ha": "left"} if fast else {"xytext": (0, above), "ha": "center"}
        for point in dict.fromkeys(shown.values()):  # types that a model's widths make the same file share a label
            label = ", ".join(label for label, other in shown.items() if other == point)
            place = {"xytext": (-7, -2), "ha": "right"} if "--best" in label else usual
            axes.annotate(label, point, textcoords="offset points", fontsize=7, color=color, **place)
    axes.plot([], [], "o", color=INK, markersize=5, label="hollow: --fast", **HOLLOW)
    axes.set(yscale="log", xlabel="megabytes of the whole file", ylabel="perplexity, WikiText-2 test")
    axes.minorticks_off()
    axes.set_yticks(ticks := [25, 30, 40, 50, 100, 200], map(str, ticks))
    axes.margins(0.08)
    axes.legend()
    return figure


def _made_by(row: Mapping[str, Any]) -> tuple[str, str, bool]:
    """The program that a file was made for or by, its type in short, and whether that was done by `--fast`."""
    kind = str(row["type"])
    if row["by"] != "dashq":
        return row["by"], kind.partition(",")[0], False
    words = kind.split()  # as `--bits 2 --for mlx --fast`
    label = f"{words[1]} bits{', --best' if '--best' in words else ''}"
    return f"dashq, for {words[3]}", label, "--fast" in words


def against_sizes() -> Figure:
    """The processor's seconds and peak memory of runs, one column for each size that grows, from zero on."""
    by_axis: dict[str, Rows] = defaultdict(list)
    for row in read("growth"):
        by_axis[row.get("axis", "")].append(row)
    growing = {axis: shown for axis, shown in GROWING.items() if axis in by_axis}
    figure, panels = pyplot.subplots(2, len(growing), figsize=(1 + 2.6 * len(growing), 4.4), layout="constrained")
    for (above, below), (axis, (key, unit, label)) in zip(panels.T, growing.items(), strict=True):
        own = sorted(by_axis[axis], key=lambda row: row[key])
        sizes = [row[key] / unit for row in own]
        above.plot(sizes, [row["cpu_seconds"] for row in own], "o-", markersize=4)
        below.plot(sizes, [row["bytes"] / 1e6 for row in own], "o-", markersize=4)
        above.set_title(label)
        below.set(xlabel=label)
        for axes in (above, below):
            axes.set(xlim=(0, None), ylim=(0, 1.1 * axes.dataLim.y1))  # the highest point is whole
    panels[0, 0].set(ylabel="seconds of the processor")
    panels[1, 0].set(ylabel="peak memory, MB")
    return figure


def against_steps() -> Figure:
    """Perplexity against the steps of a tuner, one panel for each text, beside the untuned result and the original."""
    start = {"method": "hybrid", "bits": 2, "format": "dashq", "seed": 0, "settings": ["dtype=float32"]}
    rows = [row for row in read("tuner") if all(row[key] == value for key, value in start.items())]
    untuned = next(row for row in rows if row["tuner"] is None)
    tuned = [row for row in rows if row["tuner"] and row["tuner"]["scales"] == RATE]
    original = next(row for row in read("peers") if row["method"] == "original")
    figure, panels = pyplot.subplots(1, len(TEXTS), figsize=(8.4, 3.4), layout="constrained")
    for axes, text, title in zip(panels, TEXTS, ("WikiText-2 test, tuned on its training text", "C4"), strict=True):
        for length in (256, 512):
            points = sorted(
                (row["tuner"]["samples"] * row["tuner"]["epochs"], row["perplexity"][text])
                for row in tuned
                if row["tuner"]["sequence_length"] == length
            )
            axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=f"steps of {length} tokens")
        for row, label, style in ((untuned, "untuned", ":"), (original, "original, 16 bits", "--")):
            if text in row["perplexity"]:
                value = row["perplexity"][text]
                axes.axhline(value, color=INK, linestyle=style, linewidth=1, label=f"{label}: {value:.1f}")
        axes.set(xscale="log", yscale="log", xlabel="steps", ylabel="perplexity")
        axes.set_xticks(ticks := [30, 60, 120, 240, 480, 960], map(str, ticks))
        axes.set_yticks(ticks := TICKS[text], map(str, ticks))
        axes.minorticks_off()
        axes.set_title(title)
        axes.legend(loc=(0.03, 0.1))
    return figure


DRAWINGS: Mapping[str, Callable[[], Figure]] = {
    "smollm2": against_bits,
    "robustness": against_samples,
    "peers": against_seconds,
    "allocation": of_choices,
    "files": against_bytes,
    "growth": against_sizes,
    "tuner": against_steps,
}

if __name__ == "__main__":
    main()
