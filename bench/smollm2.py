"""SmolLM2-135M-Instruct at 2, 3 and 4 bits, group 64: perplexity, bits per weight, seconds of each phase.

One-shot calibration on 16 × 2048 tokens; perplexity over consecutive windows of 2048 tokens. With the files of
WikiText-2 (raw training text, raw test rows) these are the figures of the README; without, on pydoc.
"""

import argparse
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import dashq
from dashq.evaluate import load_model, perplexity
from dashq.tokens import TextSource, evaluation_windows

RECIPE = Path("recipes/smollm2_2bit.yaml")
MODEL = "models/SmolLM2-135M-Instruct"
PAPER = "scheme.solver={name: irls, preset: paper}"
CONFIGURATIONS = {
    "rtn-2": ["scheme.bits=2", "scheme.solver=rtn"],
    "paper-2": ["scheme.bits=2", PAPER],
    "irls-2": ["scheme.bits=2", "scheme.solver=irls"],
    "paper-3": ["scheme.bits=3", PAPER],
    "paper-4": ["scheme.bits=4", PAPER],
    "irls-3": ["scheme.bits=3", "scheme.solver=irls"],
    "irls-4": ["scheme.bits=4", "scheme.solver=irls"],
    "rtn-3": ["scheme.bits=3", "scheme.solver=rtn"],
    "rtn-4": ["scheme.bits=4", "scheme.solver=rtn"],
}


@dataclass
class Figure:
    """One row of the table."""

    name: str
    perplexity: float
    bits_per_weight: float = 16.0
    bytes_on_disk: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    mean_error: float | None = None


def main() -> None:
    """Measure, and print a row as soon as it is there."""
    parser = argparse.ArgumentParser(prog="python -m bench smollm2", description=__doc__)
    parser.add_argument("--calibration", default="pydoc", help="text to calibrate on")
    parser.add_argument("--test", default="pydoc", help="text to measure perplexity on")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--only", nargs="*", default=["original", *CONFIGURATIONS], help="configurations by name")
    parser.add_argument("--output", type=Path, default=Path("out/bench-smollm2"))
    arguments = parser.parse_args()
    figures = []
    for name in arguments.only:
        folder = Path(MODEL) if name == "original" else _quantize(name, arguments.calibration, arguments.output)
        figures.append(_judge(name, folder, TextSource(name=arguments.test, split="test"), arguments.windows))
        print(json.dumps(asdict(figures[-1])), flush=True)
        (arguments.output.parent / f"{arguments.output.name}.json").write_text(
            json.dumps([asdict(figure) for figure in figures], indent=1)
        )


def _quantize(name: str, calibration: str, output: Path) -> Path:
    settings = [f"model={MODEL}", f"output={output / name}", f"calibration.dataset={calibration}"]
    settings += ["calibration.samples=16", "calibration.tokens=2048", *CONFIGURATIONS[name]]
    return dashq.run(dashq.load_recipe(RECIPE, dashq.load_registry(), settings), overwrite=True)


def _judge(name: str, folder: Path, text: TextSource, windows: int) -> Figure:
    loaded = load_model(str(folder))
    pieces = evaluation_windows(text, loaded.tokenizer, 2048, windows)
    figure = Figure(name, perplexity(loaded.network, pieces), bytes_on_disk=loaded.bytes_on_disk)
    report = folder / "report.json"
    if report.exists():
        content = json.loads(report.read_text())
        figure.bits_per_weight = content["totals"]["bits_per_weight"]
        figure.mean_error = content["totals"]["mean_error"]
        figure.seconds = content["seconds"]
    return figure


if __name__ == "__main__":
    main()
