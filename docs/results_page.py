"""The page docs/results.md and the table of the README, from bench/results/*.jsonl."""

import json
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple

import yaml

RESULTS = Path(__file__).parents[1] / "bench" / "results"
MISSING = "–"

Row = Mapping[str, Any]
Value = Callable[[Row], str]


class Change(NamedTuple):
    """A change of the code that moved figures: older lines of these are marked."""

    day: str  # lines of earlier days were measured before it
    concerns: Callable[[str, Row], bool]  # of a bench's name and a line
    text: str


class Table(NamedTuple):
    """Lines of a file as rows: the heads of the columns with what stands in each."""

    columns: Mapping[str, Value]
    keep: Callable[[Row], bool] = lambda row: True
    caption: str = ""
    order: Callable[[Row], tuple[object, ...]] = lambda row: ()


class Pivot(NamedTuple):
    """Lines of a file as cells: what names a line's row, its column, and the figure."""

    corner: str
    row: Value
    column: Value
    cell: Value
    keep: Callable[[Row], bool] = lambda row: True
    caption: str = ""


class Section(NamedTuple):
    """A file of results in plain words: a heading, the conditions and columns, and the command."""

    heading: str
    text: str
    command: str


def field(*keys: str, form: str = "") -> Value:
    """The value under a path of keys."""

    def value(row: Row) -> str:
        found: Any = row
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
        return MISSING if found is None else format(found, form)

    return value


def figure(number: float) -> str:
    """A perplexity with as many digits as mean something."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.1f}" if number >= 100 else f"{number:.2f}"


def perplexity(*keys: str) -> Value:
    """The perplexity under a path of keys."""
    found = field(*keys)
    return lambda row: found(row) if found(row) == MISSING else figure(float(found(row)))


def megabytes(*keys: str) -> Value:
    """The bytes under a path of keys as MB."""
    found = field(*keys)
    return lambda row: found(row) if found(row) == MISSING else f"{int(found(row)) / 1e6:,.0f}"


def milliseconds(key: str) -> Value:
    """The seconds of a field in thousandths."""
    return lambda row: f"{1000 * row[key]:,.1f}"


def percent(key: str) -> Value:
    """A share as a percentage."""
    return lambda row: f"{100 * row[key]:.2f} %"


def times_its_passes(row: Row) -> str:
    """The seconds of calibration as a multiple of those of its forward passes."""
    return f"{row['phases']['calibrate'] / row['parts']['passes']:.2f}"


def times_its_products(name: str) -> Value:
    """The seconds of a layer as a multiple of those of the matrix products that `feedback` takes."""

    def value(row: Row) -> str:
        layer = row["layers"][name]
        return f"{layer['seconds']:,.0f} s, {layer['seconds'] / (PRODUCTS * layer['product']):.1f} ×"

    return value


def text_of(row: Row) -> str:
    """The calibration text of a line: samples × tokens."""
    return f"{row['samples']} × {row['tokens']}" if "samples" in row else MISSING


def scheme_of(row: Row) -> str:
    """The solver and bits of a line of `smollm2`."""
    solver, *rest = row["name"].split("-")
    kinds = {"damped": ", importances damped by 0.2", "integer": ", whole zeros", "symmetric": ", symmetric zeros"}
    bits = f", {rest[0]} bit" if rest else ""
    name = {"paper": "`irls`, paper settings", "original": "original"}.get(solver, f"`{solver}`")
    return name + bits + "".join(kinds[word] for word in rest[1:])


METHODS = {
    "original": "original",
    "rtn": "`rtn`",
    "paper": "`irls`, paper settings",
    "closed_form": "`closed_form`",
    "k_quant": "`k_quant`",
    "llama.cpp": "llama.cpp, llama-cpp-python",
    "full": "`full`, `feedback`",
    "hybrid": "`hybrid`, `feedback`",
    "hybrid_sequential": "`hybrid`, `feedback`, `error_correction: 0`",
    "gptqmodel": "GPTQ, gptqmodel",
    "llm-compressor-gptq": "GPTQ, llm-compressor",
    "llm-compressor-awq": "AWQ, llm-compressor",
    "auto-round": "AutoRound",
    "hqq": "HQQ",
}


def method_of(row: Row) -> str:
    """The method of a line, with the version of another program and its iterations."""
    version = row.get("version", "").partition("==")[2]
    iterations = f", {row['iterations']} iterations" if "iterations" in row else ""
    return " ".join(filter(None, [METHODS[row["method"]], version])) + iterations


def zero_of(row: Row) -> str:
    """The kind of zero in plain words."""
    return {"integer": "whole", "real": "real", "symmetric": "symmetric"}.get(row.get("zero", ""), MISSING)


def solver_of(row: Row) -> str:
    """The solver of a line of `solvers`."""
    fields = row["solver"]
    preset = ", paper settings" if fields.get("preset") else ""
    return f"`{fields['name']}`{preset}" + (f", {fields['iterations']} iterations" if "iterations" in fields else "")


def zero_words(row: Row) -> str:
    """The kind of zero of a line where it is not real."""
    return f", {zero_of(row)} zeros" if "zero" in row else ""


def grid_of(row: Row) -> str:
    """The solver, bits and zeros of a line of `solvers`."""
    return f"{solver_of(row)}, {row['bits']} bit{zero_words(row)}"


def on_gpu(row: Row) -> bool:
    """A line of `solvers` with a figure of a graphics processor."""
    return "solver" in row and "NVIDIA" in row["measured"]["machine"]


def square_on_cpu(row: Row) -> bool:
    """A line of `solvers` of 4096 × 4096 weights on the processor."""
    return "solver" in row and not on_gpu(row) and row["weights"] == 2**24


def router_of(row: Row) -> str:
    """The router and the pooling of a line of `experts`."""
    if row["solver"] == "rtn":
        return "`rtn`, without calibration"
    router = {"{name: gated, power: 2}": "`gated`, power 2"}.get(row["router"], f"`{row['router']}`")
    return f"{router}, `pooling_tokens` {row['pooling']}"


def learning_of(row: Row) -> str:
    """The kinds of numbers that learned in a line of `tuner`."""
    return ", ".join(kind for kind in ("scales", "offsets", "norms") if (row["tuner"] or {}).get(kind)) or "nothing"


def within_budget(row: Row) -> bool:
    """True for a line of `tuner` whose bits a budget chose, layer by layer."""
    return any(setting.startswith("budget=") for setting in row["settings"])


def divergence_of(row: Row) -> str:
    """The divergence of a line of `tuner` from the original, before and after."""
    if "divergence" not in row:
        return MISSING
    measured = [divergence for _, divergence in row["divergence"]]
    return f"{measured[0]:.3f} → {min(measured):.3f}"


def steps_of(tuner: Row) -> str:
    """A tuner's samples, how often it goes through them where that is more than once, and the rate of the scales."""
    times = f", {tuner['epochs']} times," if tuner["epochs"] > 1 else ""
    return f"{tuner['samples']} × {tuner['sequence_length']}{times} at {tuner['scales']}"


def words_of(command: str) -> Sequence[str]:
    """The words that name a command: the program, and what it is to do where that is a word of its own."""
    return [word for word in command.split()[:2] if re.fullmatch(r"\w[\w.-]*", word)]


def times_of_fast(row: Row) -> str:
    """The CPU seconds of a level, as a multiple of those of `--fast`."""
    fast = next(line for line in read("levels") if line["level"] == "fast")
    return f"{row['cpu_seconds'] / fast['cpu_seconds']:.1f}"


BEFORE_RECIPROCALS = ("smollm2", "formats", "allocation", "experts", "llama", "seconds", "memory")
CHANGES = (
    Change(
        "2026-11-26",
        lambda bench, row: bench in BEFORE_RECIPROCALS and row.get("name") != "original",
        "codes are found by multiplying with the reciprocal of the scale, which can differ in the last digit",
    ),
    Change(
        "2026-11-27",
        lambda bench, row: row.get("method") in ("full", "hybrid") or str(row.get("model", "")).startswith("hybrid"),
        "`feedback` rounds columns eight at a time, which adds in another order and takes less time",
    ),
    Change(
        "2026-11-27",
        lambda bench, row: bench == "solvers" and "NVIDIA" in row["measured"]["machine"],
        "pieces on a graphics processor are smaller, for less memory",
    ),
    Change(
        "2026-11-30",
        lambda bench, row: bench == "super_blocks" and row["type"].startswith("IQ"),
        "types with a codebook are solved sooner",
    ),
)

PARTS_OF_A_RUN = (
    "passes",
    "second moments and chunks",
    "drift and its sums",
    "factorization",
    "start",
    "feedback",
    "descent",
    "objective",
    "writing",
    "judging",
    "all else",
)
# Products of all weights with all of H that `feedback` takes: half of one to feed errors back, one for the gradient,
# one for each of three sweeps, and half of one for each of two objectives.
PRODUCTS = 5.5

SECTIONS: Mapping[str, Section] = {
    name: Section(**fields)
    for name, fields in yaml.safe_load(Path(__file__).with_name("results.yaml").read_text("utf-8")).items()
}

TABLES: Mapping[str, Sequence[Table | Pivot]] = {
    "smollm2": [
        Table(
            {
                "scheme": scheme_of,
                "bits per weight": field("bits_per_weight", form=".4g"),
                "perplexity": perplexity("perplexity"),
                "weighted error": field("mean_error", form=".4f"),
                "solving, s": field("solve_seconds", form=".1f"),
            }
        )
    ],
    "peers": [
        Table(
            {
                "method": method_of,
                "bits": field("bits"),
                "zeros": zero_of,
                "bits per weight": field("bits_per_weight", form=".3g"),
                "perplexity": perplexity("perplexity", "wikitext2"),
                "seconds": field("seconds", form=",.0f"),
                "peak, MB": megabytes("peak_bytes"),
            },
            order=lambda row: (row.get("bits", 0), row.get("zero", ""), -row["perplexity"]["wikitext2"]),
        )
    ],
    "budgets": [
        Table(
            {
                "budget, bits per weight": field("budget"),
                "bits": lambda row: ", ".join(map(str, row["bits"])),
                "groups": lambda row: ", ".join(map(str, row["groups"])),
                "calibration": text_of,
                "perplexity": field("perplexity", "wikitext2", form=".1f"),
                "seconds": field("seconds"),
                "measuring, s": field("measure_seconds"),
            }
        )
    ],
    "tuner": [
        Table(
            {
                "start": lambda row: method_of(row) + (", within a budget" if within_budget(row) else ""),
                "bits per weight": field("bits_per_weight", form=".3g"),
                "format": lambda row: f"`{row['format']}`",
                "seed": field("seed"),
                "type": lambda row: f"`{row['dtype']}`",
                "tuner": lambda row: steps_of(row["tuner"]) if row["tuner"] else "–",
                "WikiText-2": perplexity("perplexity", "wikitext2"),
                "C4": perplexity("perplexity", "c4"),
                "divergence": divergence_of,
                "seconds": lambda row: f"{row['phases']['tune']:,.0f}" if row["phases"].get("tune") else "–",
            }
        )
    ],
    "tuner_kinds": [
        Table(
            {
                "learning": learning_of,
                "WikiText-2": perplexity("perplexity", "wikitext2"),
                "C4": perplexity("perplexity", "c4"),
                "divergence": divergence_of,
            },
            order=lambda row: (-row["perplexity"]["wikitext2"],),
        )
    ],
    "tuner_text": [
        Table(
            {
                "tuned on": lambda row: (
                    "nothing" if not row["tuner"] else "C4" if row["tuner"]["dataset"] else "WikiText-2"
                ),
                "WikiText-2": perplexity("perplexity", "wikitext2"),
                "C4": perplexity("perplexity", "c4"),
                "divergence": divergence_of,
            }
        )
    ],
    "scale": [
        Table(
            {
                "scheme": lambda row: f"`{row['recipe']}`",
                "processes": field("processes"),
                "calibrating, s": field("seconds", "calibrate", form=".1f"),
                "solving, s": field("seconds", "solve", form=".1f"),
                "waiting and sending, s": lambda row: f"{row['seconds'].get('exchange', 0.0):.1f}",
                "whole, s": field("whole_seconds", form=".1f"),
                "of the processor, s": lambda row: f"{max(row['cpu_seconds']):.1f}",
                "MB sent for a block": lambda row: f"{row['bytes_per_block'] / 1e6:.2f}",
            }
        )
    ],
    "embeddings": [
        Table(
            {
                "embeddings": lambda row: (
                    f"{row['embeddings']['bits']} bits in groups of {row['embeddings']['grouper']['size']}"
                    if row["embeddings"]
                    else "as they are"
                ),
                "by": lambda row: (
                    f"`{row['embeddings'].get('estimator', 'hybrid')}`, `{row['embeddings'].get('solver', 'feedback')}`"
                    if row["embeddings"]
                    else "–"
                ),
                "MB": lambda row: f"{row['bytes_on_disk'] / 1e6:.1f}",
                "bits per parameter": field("bits_per_parameter", form=".3f"),
                "WikiText-2": perplexity("perplexity", "wikitext2"),
                "C4": perplexity("perplexity", "c4"),
                "weighted error": field("error", form=".5f"),
                "of min-max rounding": field("minmax_error", form=".5f"),
            },
            order=lambda row: (row["measured"]["machine"], -row["bytes_on_disk"]),
        )
    ],
    "files": [
        Table(
            {
                "made by": lambda row: f"{row['by']} {row.get('version', '')}".strip(),
                "as": field("type"),
                "MB": lambda row: f"{row['bytes_on_disk'] / 1e6:.1f}",
                "windows": lambda row: f"{row['windows']} × {row['context']}",
                "WikiText-2": perplexity("perplexity", "wikitext2"),
            },
            order=lambda row: (row["by"], -row["bytes_on_disk"]),
        )
    ],
    "super_blocks": [
        Table(
            {
                "layers": lambda row: f"`{row['layers']}`",
                "solver": method_of,
                "settings": lambda row: (
                    ", ".join(f"`{text}`" for text in row["settings"] if "solver" in text) or MISSING
                ),
                "type": field("type"),
                "bits per weight": field("bits_per_weight", form=".5g"),
                "WikiText-2": perplexity("perplexity", "wikitext2"),
                "C4": perplexity("perplexity", "c4"),
            },
            order=lambda row: (row["layers"], row["bits"], row["type"]),
        )
    ],
    "levels": [
        Table(
            {
                "level": lambda row: {"usual": "neither"}.get(row["level"], f"`--{row['level']}`"),
                "bits per weight": field("bits_per_weight", form=".4g"),
                "CPU seconds": field("cpu_seconds", form=",.0f"),
                "times `--fast`": times_of_fast,
                "WikiText-2": perplexity("perplexity", "wikitext2"),
                "C4": perplexity("perplexity", "c4"),
            },
            order=lambda row: (row["cpu_seconds"],),
        )
    ],
    "road": [
        Table(
            {
                "leg": field("leg"),
                "CPU seconds": field("cpu_seconds", form=",.1f"),
                "seconds": field("seconds", form=",.0f"),
                "says": lambda row: row["says"] or MISSING,
            },
            lambda row: "leg" in row,
        ),
        Table(
            {
                "program": field("program"),
                "commands": lambda row: str(len(row["commands"])),
                "in turn": lambda row: ", ".join(f"`{' '.join(words_of(line))}`" for line in row["commands"]),
            },
            lambda row: "program" in row,
        ),
    ],
    "gallery": [
        Table(
            {
                "solver": field("solver"),
                "grouper": field("grouper"),
                "bits": field("bits"),
                "layers": field("layers"),
                "error": field("relative_error", form=".4f"),
            },
            lambda row: row["case"] == "weights",
        ),
        Table(
            {
                "case": field("case"),
                "instead of": field("method"),
                "bits": field("bits"),
                "bits per weight": field("bits_per_weight", form=".4g"),
                "WikiText-2": perplexity("perplexity", "wikitext2"),
            },
            lambda row: row["case"] != "weights",
        ),
    ],
    "robustness": [
        *(
            Pivot(
                f"judged on {name}",
                lambda row: METHODS[row["method"]],
                lambda row: str(row["samples"]),
                perplexity("perplexity", key),
                lambda row: row["context"] == 1024 and "samples" in row,
            )
            for name, key in (("WikiText-2", "wikitext2"), ("C4", "c4"))
        ),
        Table(
            {
                "method": method_of,
                "bits": field("bits"),
                "windows": lambda row: f"{row['windows']} × {row['context']}",
                "calibration": text_of,
                "WikiText-2": perplexity("perplexity", "wikitext2"),
                "C4": perplexity("perplexity", "c4"),
                "seconds": field("seconds", form=",.0f"),
                "γ": field("gamma", form=".2f"),
            },
            lambda row: row["context"] != 1024 or "samples" not in row,
            "Without text, and on twenty windows. γ is the shrinkage towards the diagonal, mean over the layers.",
        ),
    ],
    "allocation": [
        Table(
            {
                "model": field("name"),
                "bits per weight": field("bits_per_weight"),
                "expected loss": field("expected", form=".3f"),
                "divergence": field("divergence", form=".3f"),
                "perplexity": perplexity("perplexity"),
            }
        )
    ],
    "zero_shot": [
        Table(
            {"model": field("model"), "average": field("average", form=".1f")}
            | {
                task: field("tasks", task, metric, form=".0f")
                for task, metric in {
                    "arc_challenge": "acc_norm",
                    "arc_easy": "acc_norm",
                    "boolq": "acc",
                    "hellaswag": "acc_norm",
                    "openbookqa": "acc_norm",
                    "piqa": "acc_norm",
                    "social_iqa": "acc",
                    "winogrande": "acc",
                }.items()
            }
        )
    ],
    "optimality": [
        Table(
            {
                "bits": field("bits"),
                "group": field("group"),
                "zeros": zero_of,
                "solver": lambda row: (
                    f"`{row['solver'].replace(', paper settings', '`, paper settings')}".rstrip("`")
                    + ("" if "," in row["solver"] else "`")
                ),
                "above the optimum": percent("mean_gap"),
                "worst layer": percent("worst_gap"),
                "groups": field("groups"),
            }
        )
    ],
    "formats": [
        Table(
            {
                "format": lambda row: f"`{row['format']}`",
                "bits per weight": field("bits_per_weight", form=".3f"),
                "perplexity": perplexity("perplexity"),
                "weighted error": field("mean_error", form=".4f"),
                "MB on disk": megabytes("bytes_on_disk"),
                "compared with": lambda row: ", ".join(row.get("verified", {})) or MISSING,
            }
        )
    ],
    "llama": [
        Table(
            {
                "result": field("result"),
                "llama.cpp": perplexity("llama_cpp"),
                "dashq, inputs rounded": perplexity("dashq_with_rounded_inputs"),
                "dashq": perplexity("dashq"),
            }
        )
    ],
    "solvers": [
        Pivot(
            "processor, 4096 × 4096, groups of", grid_of, field("group"), field("seconds", form=".4f"), square_on_cpu
        ),
        Pivot(
            "graphics processor, 4096 × 4096, groups of", grid_of, field("group"), field("seconds", form=".4f"), on_gpu
        ),
        Pivot(
            "processor, 2 bit, groups of 128, million weights",
            solver_of,
            lambda row: f"{row['weights'] >> 20}",
            field("least", form=".4f"),
            lambda row: "solver" in row and not on_gpu(row) and not square_on_cpu(row),
        ),
    ],
    "rivals": [
        Table(
            {
                "routine": field("solver"),
                "million weights": lambda row: (
                    f"{1000 * row['seconds'] / row['nanoseconds_per_weight'] / 1.048576:.0f}"
                ),
                "seconds": field("seconds", form=".3f"),
                "× irls": field("ratio_to_irls"),
                "weighted error": field("weighted_error", form=".3f"),
                "seen inputs": field("output_error", form=".3f"),
                "fresh inputs": field("fresh_output_error", form=".3f"),
            },
            lambda row: "solver" in row and "seconds" in row,
        )
    ],
    "packing": [
        Pivot(
            f"{name}, by bits",
            lambda row: f"`{row['format']}`",
            field("bits"),
            field(f"{key}_mb_per_second", form=","),
        )
        for name, key in (("packed", "packed"), ("unpacked", "unpacked"))
    ],
    "seconds": [
        Table(
            {
                "method": lambda row: METHODS.get(row["recipe"], "`closed_form`") + ", tuned" * ("tuner" in row),
                "text": field("text"),
            }
            | {
                phase: field("seconds", phase, form=".1f")
                for phase in ("load", "calibrate", "solve", "certify", "tune", "judge", "write")
            }
            | {
                "CPU": field("cpu_seconds", form=".0f"),
                "planned": field("estimated_seconds", form=".0f"),
                "peak, MB": megabytes("bytes"),
                "planned, MB": megabytes("estimated_bytes"),
                "note": field("note"),
            }
        )
    ],
    "parts": [
        Table(
            {"text": field("text")}
            | {part: field("parts", part, form=".1f") for part in PARTS_OF_A_RUN}
            | {"calibrating, times its passes": times_its_passes, "note": field("note")}
        )
    ],
    "block": [
        Table(
            {
                "method": method_of,
                "shape": lambda row: f"{row['hidden']}, {row['intermediate']}",
                "text": field("text"),
            }
            | {
                f"{name}, s": field("seconds", phase, form=",.0f")
                for phase, name in (
                    ("calibrate", "calibrating"),
                    ("solve", "solving"),
                    ("certify", "certifying"),
                    ("write", "writing"),
                )
            }
            | {
                "hours of all blocks": lambda row: f"{row['hours']:.1f} ({row['blocks']} blocks)",
                "`q_proj`": times_its_products("q_proj"),
                "`down_proj`": times_its_products("down_proj"),
                "note": field("note"),
            }
        )
    ],
    "memory": [
        Table(
            {
                "model": field("shape"),
                "checkpoint, MB": megabytes("checkpoint_bytes"),
                "importing, MB": megabytes("baseline_bytes"),
                "peak, MB": megabytes("peak_bytes"),
                "beyond, MB": megabytes("beyond_baseline_bytes"),
                "planned, MB": megabytes("expected", "bytes"),
                "solving, s": field("seconds", "solve", form=".0f"),
            }
        )
    ],
    "loaded": [
        Table(
            {
                "model": field("model"),
                "packed, MB": megabytes("packed", "bytes"),
                "plain, MB": megabytes("plain", "bytes"),
                "packed, s": field("packed", "seconds per token", form=".3f"),
                "plain, s": field("plain", "seconds per token", form=".3f"),
                "note": field("note"),
            },
            keep=lambda row: "packed" in row,
            caption="Seconds per generated token, unpacked for each product:",
        ),
        Table(
            {
                "model": field("model"),
                "type": field("dtype"),
                "kernels": field("kernels"),
                "threads": field("threads"),
                "MB": megabytes("bytes"),
                "token, ms": milliseconds("token seconds"),
                "/ plain": field("token / plain", form=".2f"),
                "prompt, ms": milliseconds("prompt seconds"),
                "prompt / plain": field("prompt / plain", form=".2f"),
                "KL": field("divergence", form=".1e"),
                "KL unpacked": field("exact divergence", form=".1e"),
                "note": field("note"),
            },
            keep=lambda row: "kernels" in row,
            caption="With kernels: one token after 8, a prompt of 512, and the divergence from float32:",
        ),
    ],
    "mixture": [
        Table(
            {
                "parameters": field("parameters", form=","),
                "tokens": field("tokens", form=","),
                "seconds": field("training_seconds", form=".0f"),
                "perplexity": perplexity("perplexity"),
                "of a unigram model": perplexity("unigram_perplexity"),
            }
        )
    ],
    "experts": [
        Pivot(
            "router and pooling",
            router_of,
            lambda row: f"{row['bits']} bit, {row['samples']}",
            field("perplexity"),
            lambda row: "router" in row or row.get("solver") == "rtn",
        )
    ],
    "expert_memory": [
        Table(
            {
                "experts": field("experts"),
                "blocks": field("blocks"),
                "million weights in a block": lambda row: f"{row['block_weights'] / 1e6:.1f}",
                "peak, MB": megabytes("beyond_baseline_bytes"),
                "seconds": field("seconds"),
                "note": field("note"),
            }
        )
    ],
    "refusals": [
        Table(
            {
                "layers": lambda row: f"{row.get('layers', row.get('experts')):,}",
                "refused for": field("refused"),
                "accepted, s": field("accepted_seconds", form=".4f"),
                "refused, s": field("refused_seconds", form=".4f"),
                "ratio": field("ratio"),
                "note": field("note"),
            }
        )
    ],
    "growth": [
        Table(
            {
                "blocks": field("blocks"),
                "opening, s": field("open_seconds", form=".2f"),
                "planning, s": field("plan_seconds", form=".2f"),
                "reading, s": field("read_seconds", form=".2f"),
                "note": field("note"),
            },
            keep=lambda row: "axis" not in row,
        ),
        Table(
            {
                "grows": field("axis"),
                "blocks": field("blocks"),
                "width": field("width"),
                "experts": field("experts"),
                "tokens": field("tokens", form=","),
                "million weights": lambda row: f"{row['weights'] / 1e6:.1f}",
                "CPU seconds": field("cpu_seconds", form=".1f"),
                "peak, MB": megabytes("bytes"),
            },
            keep=lambda row: "axis" in row,
            caption="Whole runs, beyond what importing dashq takes:",
        ),
    ],
    "startup": [
        Table(
            {
                "command": field("command"),
                "CPU seconds": field("cpu_seconds", form=".2f"),
                "least": field("least_cpu_seconds", form=".2f"),
                "runs": field("runs"),
                "note": field("note"),
            }
        )
    ],
}


class Origins:
    """The versions, days and machines of a section's lines, each under a letter."""

    def __init__(self, bench: str) -> None:
        self._bench = bench
        self._letters: dict[str, str] = {}

    def letter(self, row: Row) -> str:
        """The letter of the line's origin, with † where the code has changed since."""
        measured = row["measured"]
        known = "found in the history" if measured.get("reconstructed") else "noted by the bench"
        changes = changes_since(self._bench, row)
        older = f" **† Older version**: since then {'; '.join(changes)}." if changes else ""
        where = f"version {measured['version']} at `{measured['commit']}`, {measured['machine']}"
        text = f"{measured['date']}, {where} ({known}).{older}"
        letter = self._letters.setdefault(text, string.ascii_letters[len(self._letters)])
        return letter + "†" * bool(changes)

    def lines(self) -> Iterator[str]:
        """One line for each origin."""
        for text, letter in self._letters.items():
            yield f"- {letter}: {text}"


def results_page(note: str) -> str:
    """The page: every file of results as a section."""
    files = sorted(RESULTS.glob("*.jsonl"), key=lambda path: order(path.stem))
    introduction, figures = SECTIONS["about"].text, "![Perplexity against bits per weight](figures/smollm2.svg)"
    sections = (section(path.stem, read(path.stem)) for path in files)
    return "\n\n".join(["# Results", note, introduction, figures, *sections]) + "\n"


def order(name: str) -> tuple[int, str]:
    """Sections in the order of the list above, then files that have none."""
    return (list(SECTIONS).index(name) if name in SECTIONS else len(SECTIONS)), name


def read(name: str) -> list[Row]:
    """The lines of a file of results."""
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text("utf-8").splitlines()]


def section(name: str, rows: Sequence[Row]) -> str:
    """One file with its tables and where its lines come from."""
    described = SECTIONS.get(name) or Section(name.replace("_", " ").capitalize(), "", f"python -m bench {name}")
    origins = Origins(name)
    commands = described.command.replace("; ", "\n")
    parts = [f"## {described.heading}", described.text, f"```text\n{commands}\n```"]
    for shown in TABLES.get(name) or [plain_table(rows)]:
        if not (kept := [row for row in rows if shown.keep(row)]):
            continue  # as long as nothing was measured that belongs there
        parts += [shown.caption] * bool(shown.caption)
        parts.append(flat(shown, kept, origins) if isinstance(shown, Table) else crossed(shown, kept, origins))
    return "\n\n".join([*filter(None, parts), "\n".join(origins.lines())])


def plain_table(rows: Sequence[Row]) -> Table:
    """All numbers and texts of a file's lines, as they are."""
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, dict | list))
    return Table({key.replace("_", " "): field(key) for key in keys})


def flat(shown: Table, rows: Iterable[Row], origins: Origins) -> str:
    """A table of one line in each row; columns that are empty everywhere are left out."""
    ordered = sorted(rows, key=shown.order)
    cells = [[value(row) for value in shown.columns.values()] + [origins.letter(row)] for row in ordered]
    heads = [*shown.columns, "measured"]
    kept = [index for index in range(len(heads)) if any(line[index] != MISSING for line in cells)]
    return table([heads[index] for index in kept], ([line[index] for index in kept] for line in cells))


def crossed(shown: Pivot, rows: Sequence[Row], origins: Origins) -> str:
    """A table of one line, or several, in each cell."""
    heads = sorted({shown.column(row) for row in rows}, key=numbers)
    names = dict.fromkeys(shown.row(row) for row in rows)
    lines = []
    for name in names:
        own_rows = [row for row in rows if shown.row(row) == name]
        cells = [cell([row for row in own_rows if shown.column(row) == head], shown) for head in heads]
        letters = dict.fromkeys(origins.letter(row) for row in own_rows)
        lines.append([name, *cells, " ".join(letters)])
    return table([shown.corner, *heads, "measured"], lines)


def numbers(text: str) -> list[int]:
    """The whole numbers in a text."""
    return [int(word) for word in text.replace(",", " ").split() if word.isdigit()]


def cell(rows: Sequence[Row], shown: Pivot) -> str:
    """The figures of one cell: one for each draw, or the geometric mean of lines that differ otherwise."""
    if rows and "draws" in rows[0]:
        return f"{geometric_mean(row['perplexity'] for row in rows):.3f}"
    return ", ".join(shown.cell(row) for row in rows) or MISSING


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; columns of figures are aligned to the right."""
    rows = list(rows)
    columns = zip(*rows, strict=True)
    marks = ["---:" if all(text == MISSING or text[0].isdigit() for text in column) else "---" for column in columns]
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, marks, *rows))


TUNED = "the same, tuned, which trains"


def headline() -> str:
    """The table of the README: of each method the best line at a number of bits and a kind of zero."""
    peers = read("peers")

    def best(methods: Sequence[str], bits: int, zero: str) -> str:
        rows = [row for row in peers if row["method"] in methods and (row["bits"], row["zero"]) == (bits, zero)]
        return shown_best("peers", [row for row in rows if "perplexity" in row])

    methods = {
        "GPTQ, the better of two programs": ["gptqmodel", "llm-compressor-gptq"],
        "AutoRound, which trains": ["auto-round"],
        "DASH-Q, `closed_form`": ["closed_form"],
        "`hybrid` and `feedback`": ["hybrid"],
    }
    original = shown_best("peers", [row for row in peers if row["method"] == "original"])
    with_real = {name: names for name, names in methods.items() if names in (["closed_form"], ["hybrid"])}
    rows = [["original, 16 bits", *[original] * 3], ["**whole zeros**, bits per weight", "2.28", "3.30", "4.31"]]
    rows += [[name, *(best(names, bits, "integer") for bits in (2, 3, 4))] for name, names in methods.items()]
    rows += [[TUNED, *(tuned(bits, "gptq") for bits in (2, 3, 4))]]
    rows += [["**real zeros**, bits per weight", "2.50", "3.50", "4.50"]]
    for name, [method] in with_real.items():
        cells = [best([method], bits, "real") for bits in (2, 3, 4)]
        rows.append([name, *(on_more_text(method) if text == "not measured" else text for text in cells)])
    rows += [[TUNED, *(tuned(bits, "dashq") for bits in (2, 3, 4))]]
    by_budget = {bits: [row for row in read("budgets") if row["budget"] == bits] for bits in (2.5, 3.5, 4.5)}
    shortest = [
        [row for row in lines if row["tokens"] == min(row["tokens"] for row in lines)] for lines in by_budget.values()
    ]
    rows += [["untuned, within a `budget`", *(shown_best("budgets", lines) for lines in shortest)]]
    rows += [["tuned, within a `budget`, which trains", *(tuned(bits, "dashq", budget=True) for bits in (2, 3, 4))]]
    return table(["", "2 bit", "3 bit", "4 bit"], rows)


def tuned(bits: int, serializer: str, budget: bool = False) -> str:
    """The best line of `tuner` at these bits in a format, which stands for its kind of zeros, or within a budget."""
    rows = [row for row in read("tuner") if (row["bits"], row["format"]) == (bits, serializer) and row["tuner"]]
    rows = [row for row in rows if within_budget(row) is budget]
    return shown_best("tuner", rows)


def on_more_text(method: str) -> str:
    """A method at 4 bits with real zeros, where it was measured on the longer text of another bench."""
    diagonal = [row | {"tokens": 2048} for row in map(dict, read("smollm2")) if row["name"] == f"{method}-4"]
    drawn = [row for row in read("robustness") if row["method"] == method and row.get("bits") == 4]
    return shown_best("smollm2", diagonal) if diagonal else shown_best("robustness", drawn)


def shown_best(bench: str, rows: Sequence[Row]) -> str:
    """The least perplexity of the lines, marked where it is of an older version or of more text."""
    if not rows:
        return "not measured"

    def measured(row: Row) -> float:
        found = row["perplexity"]
        return float(found["wikitext2"] if isinstance(found, Mapping) else found)

    row = min(rows, key=measured)
    text = f"{measured(row):.1f}" if bench == "budgets" else figure(measured(row))
    return text + "¹" * bool(row.get("tokens", 0) > 512) + "†" * bool(changes_since(bench, row))


def changes_since(bench: str, row: Row) -> list[str]:
    """The changes of the code after the line that may have moved its figures."""
    day: str = row["measured"]["date"]
    return [change.text for change in CHANGES if day < change.day and change.concerns(bench, row)]
