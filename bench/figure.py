"""Draw what `python -m bench smollm2` or `python -m bench robustness` measured."""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.figure import Figure

# Label, and where its figures stand beside the points: the last two lie close together.
LINES = {
    "rtn": ("round to nearest", (6, 7)),
    "paper": ("irls, paper settings", (8, 1)),
    "closed_form": ("closed_form", (6, -12)),
}
METHODS = {
    "paper": "irls, paper settings",
    "closed_form": "closed_form",
    "full": "full, feedback",
    "hybrid": "hybrid, feedback",
}
CONTEXT = 1024  # tokens in the windows of the figure of robustness
TEXTS = {"wikitext2": "WikiText-2 test", "c4": "C4, calibrated on WikiText-2"}

Rows = list[dict[str, Any]]


def main() -> None:
    """Read the figures, write an SVG."""
    parser = argparse.ArgumentParser(prog="python -m bench figure", description=__doc__)
    parser.add_argument("bench", nargs="?", choices=DRAWINGS, default="smollm2")
    arguments = parser.parse_args()
    lines = Path(f"bench/results/{arguments.bench}.jsonl").read_text().splitlines()
    output = Path(f"docs/figures/{arguments.bench}.svg")
    pyplot.rcParams["svg.hashsalt"] = "dashq"  # the same figures give the same file
    figure = DRAWINGS[arguments.bench]([json.loads(line) for line in lines])
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, metadata={"Date": None})


def against_bits(rows: Rows) -> Figure:
    """Perplexity against bits per weight."""
    by_name = {row["name"]: row for row in rows}
    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    for solver, (label, beside) in LINES.items():
        mine = [by_name[f"{solver}-{bits}"] for bits in (2, 3, 4) if f"{solver}-{bits}" in by_name]
        if mine:
            bits, measured = [row["bits_per_weight"] for row in mine], [row["perplexity"] for row in mine]
            (line,) = axes.plot(bits, measured, "o-", label=label)
            for x, y in zip(bits, measured, strict=True):
                text = f"{y:,.0f}" if y > 1000 else f"{y:.1f}"
                color = line.get_color()
                axes.annotate(text, (x, y), textcoords="offset points", xytext=beside, fontsize=8, color=color)
    original = by_name["original"]["perplexity"]
    axes.axhline(original, color="gray", linestyle="--", linewidth=1, label=f"original, 16 bits: {original:.2f}")
    axes.set(
        xlabel="bits per weight, scales and offsets included",
        ylabel="perplexity",
        yscale="log",
        xlim=(2.35, 4.8),
        ylim=(10, 2e6),
    )
    axes.set_title("SmolLM2-135M-Instruct, WikiText-2 test", fontsize=10)
    axes.legend(fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def against_samples(rows: Rows) -> Figure:
    """Perplexity against calibration samples, one panel for each text: the mean over seeds, and each of them a dot."""
    comparable = [row for row in rows if row["context"] == CONTEXT and row.get("bits", 2) == 2]
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
        axes.axhline(original, color="gray", linestyle="--", linewidth=1, label="original, 16 bits")
        samples = sorted({row["samples"] for row in comparable if "samples" in row})
        axes.set(xscale="log", yscale="log", xlabel="calibration samples of 512 tokens", ylabel="perplexity")
        axes.set_xticks(samples, map(str, samples), minor=False)
        axes.minorticks_off()
        axes.set_yticks(ticks := [20, 50, 100, 200, 500, 1000], map(str, ticks))
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


DRAWINGS: Mapping[str, Callable[[Rows], Figure]] = {"smollm2": against_bits, "robustness": against_samples}

if __name__ == "__main__":
    main()
