"""Draw perplexity against bits (`smollm2`) or against calibration samples (`robustness`) from the files of results."""

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
CONTEXT = 1024  # tokens in the windows of the figure of robustness
TEXTS = {"wikitext2": "WikiText-2 test", "c4": "C4, calibrated on WikiText-2"}

Rows = list[dict[str, Any]]


def main() -> None:
    """Read the figures, write an SVG."""
    parser = argparse.ArgumentParser(prog="python -m bench figure", description=__doc__)
    parser.add_argument("bench", nargs="?", choices=DRAWINGS, default="smollm2")
    arguments = parser.parse_args()
    output = Path(f"docs/figures/{arguments.bench}.svg")
    pyplot.rcParams["svg.hashsalt"] = "dashq"  # the same figures give the same file
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
    axes.axhline(original, color="gray", linestyle="--", linewidth=1, label=f"original, 16 bits: {original:.2f}")
    axes.set(xlabel="bits per weight, scales and zeros included", ylabel="perplexity", yscale="log")
    axes.set_yticks(ticks := [20, 50, 100, 200, 500, 1000, 2000], map(str, ticks))
    axes.set_title("SmolLM2-135M-Instruct, WikiText-2 test", fontsize=10)
    axes.legend(fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
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


DRAWINGS: Mapping[str, Callable[[], Figure]] = {"smollm2": against_bits, "robustness": against_samples}

if __name__ == "__main__":
    main()
