"""Draw perplexity against bits per weight from the lines that `python -m bench smollm2` printed."""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

# Label, and where its figures stand beside the points: the last two lie close together.
LINES = {
    "rtn": ("round to nearest", (6, 7)),
    "paper": ("irls, paper settings", (8, 1)),
    "closed_form": ("closed_form", (6, -12)),
}


def main() -> None:
    """Read the figures, write an SVG."""
    parser = argparse.ArgumentParser(prog="python -m bench figure", description=__doc__)
    parser.add_argument("--figures", type=Path, default=Path("bench/results/smollm2.jsonl"))
    parser.add_argument("--output", type=Path, default=Path("docs/figures/smollm2.svg"))
    arguments = parser.parse_args()
    rows = {row["name"]: row for row in map(json.loads, arguments.figures.read_text().splitlines())}
    pyplot.rcParams["svg.hashsalt"] = "dashq"  # the same figures give the same file
    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    for solver, (label, beside) in LINES.items():
        mine = [rows[f"{solver}-{bits}"] for bits in (2, 3, 4) if f"{solver}-{bits}" in rows]
        if mine:
            bits, measured = [row["bits_per_weight"] for row in mine], [row["perplexity"] for row in mine]
            (line,) = axes.plot(bits, measured, "o-", label=label)
            for x, y in zip(bits, measured, strict=True):
                text = f"{y:,.0f}" if y > 1000 else f"{y:.1f}"
                color = line.get_color()
                axes.annotate(text, (x, y), textcoords="offset points", xytext=beside, fontsize=8, color=color)
    original = rows["original"]["perplexity"]
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
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output, metadata={"Date": None})


if __name__ == "__main__":
    main()
