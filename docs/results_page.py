"""The page docs/results.md and the table of the README, from bench/results/*.jsonl."""

import json
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple

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
    """A file of results: a heading, the conditions and columns in plain words, and the command."""

    heading: str
    text: str
    command: str
    tables: Sequence[Table | Pivot]


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


def percent(key: str) -> Value:
    """A share as a percentage."""
    return lambda row: f"{100 * row[key]:.2f} %"


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
    "full": "`full`, `feedback`",
    "hybrid": "`hybrid`, `feedback`",
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


def router_of(row: Row) -> str:
    """The router and the pooling of a line of `experts`."""
    if row["solver"] == "rtn":
        return "`rtn`, without calibration"
    router = {"{name: gated, power: 2}": "`gated`, power 2"}.get(row["router"], f"`{row['router']}`")
    return f"{router}, pooling {row['pooling']}"


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
        lambda bench, row: bench == "solvers" and row["measured"]["machine"].startswith("NVIDIA"),
        "pieces on a graphics processor are smaller, for less memory",
    ),
)

WIKITEXT = "WikiText-2's training text"
FILES = "--calibration TRAIN.txt --test TEST.json"
PEER_FILES = "--calibration TRAIN.txt --test wikitext2=TEST.json"
BOTH = "--calibration TRAIN.txt --test wikitext2=TEST.json c4=C4.json"

SECTIONS: Mapping[str, Section] = {
    "smollm2": Section(
        "Solvers on the diagonal",
        f"Every linear layer of every block in groups of 64, one-shot calibration on the first 16 × 2048 tokens of {WIKITEXT}; "
        "perplexity over the first twenty windows of 2048 tokens of its test text, in bfloat16. Bits per weight include scales "
        "and zeros. The weighted error is Σ h (w − ŵ)² / Σ h w², the mean over the layers. Solving is the sum over the layers.",
        f"python -m bench smollm2 --first {FILES}",
        [
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
    ),
    "peers": Section(
        "Other programs",
        f"All on the same 16 × 512 tokens of {WIKITEXT} (HQQ uses none) and judged by the same code on twenty windows of 2048 "
        "tokens of its test text. Groups of 64, every linear layer, other settings at each program's defaults save AutoRound's "
        "iterations where they are given as 50. Seconds and peak memory are those of the whole process.",
        f"python -m bench peers {PEER_FILES}",
        [
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
    ),
    "budgets": Section(
        "Within a budget of bits",
        f"The recipe `smollm2_2bit.yaml` with a `budget`, calibrated on {WIKITEXT}; perplexity as above. A layer may be given any "
        "of the bits and group sizes; the sum keeps the budget, scales and offsets included. The perplexities were noted with "
        "one decimal.",
        "dashq run recipes/smollm2_2bit.yaml --set calibration.dataset=TRAIN.txt --set calibration.samples=16 --set "
        "'budget={bits_per_weight: 2.5, bits: [2, 3], groupers: [{name: contiguous, size: 64}, {name: contiguous, size: 96}, "
        "{name: contiguous, size: 192}]}'",
        [
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
    ),
    "robustness": Section(
        "How much text",
        f"2 bits, groups of 64, samples of 512 tokens of {WIKITEXT}; perplexity over ten windows of 1024 tokens of its test text, and "
        "of C4, which no sample is from. `full` and `hybrid` go layer by layer with `error_correction: 0.5`, the others in one shot. "
        "A column is a number of samples; three draws of the text where there are three figures.",
        f"python -m bench robustness --samples 1 2 4 8 16 32 64 --windows 10 --context 1024 {BOTH}",
        [
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
                "Without text, and on twenty windows of 2048 tokens. γ is the shrinkage towards the diagonal, mean over the layers.",
            ),
        ],
    ),
    "allocation": Section(
        "Choices by measurement",
        f"`diagonal` and `closed_form` on 16 × 512 tokens of {WIKITEXT}, one shot; perplexity over eight windows of 2048 tokens. "
        "`uniform B/G` has B bits in groups of G everywhere, `budget` is allowed that many bits per weight, `critical` gives a tenth "
        "of the weights 4 bits and the others 2. The expected loss is the sum of the layers' sensitivities; the divergence from the "
        "original is measured, in nats per token.",
        f"python -m bench allocation {FILES}",
        [
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
    ),
    "zero_shot": Section(
        "Zero-shot tasks",
        "Accuracy in percent on 100 questions of each task, normalised where that is customary; guessing gives about 35 on average, and "
        "the standard error of an average is near 1.6. The models are those of *Other programs*, by method, bits and zeros.",
        "python -m bench zero_shot MODEL… --data FOLDER --limit 100",
        [
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
    ),
    "optimality": Section(
        "Distance from the optimum",
        "By how much the weighted error of each solver exceeds the global optimum, on random groups of 42 layers of the same model: "
        "over all of them, and in the worst layer.",
        "python -m bench optimality",
        [
            Table(
                {
                    "bits": field("bits"),
                    "group": field("group"),
                    "zeros": zero_of,
                    "solver": lambda row: f"`{row['solver'].replace(', paper settings', '`, paper settings')}".rstrip("`")
                    + ("" if "," in row["solver"] else "`"),
                    "above the optimum": percent("mean_gap"),
                    "worst layer": percent("worst_gap"),
                    "groups": field("groups"),
                }
            )
        ],
    ),
    "formats": Section(
        "Formats",
        f"`closed_form` with importances from 16 × 2048 tokens of {WIKITEXT}; perplexity over twenty windows spread over the test text, "
        "in bfloat16, so not to be compared with the first table. `down/` formats quantize `down_proj` alone; Q2_K needs 256 columns, "
        "which no other layer of this model has. *Compared with* names the programs whose weights were equal bit by bit.",
        f"python -m bench formats {FILES} --program NAME=PYTHON",
        [
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
    ),
    "llama": Section(
        "llama.cpp",
        "Perplexity over six windows of 512 tokens of WikiText-2's test text: llama.cpp with the GGUF file, and dashq with the same weights, as "
        "it computes them and with inputs rounded to 8 bits as llama.cpp's kernels round them.",
        "python -m bench llama RESULT… --test TEST.json",
        [
            Table(
                {
                    "result": field("result"),
                    "llama.cpp": perplexity("llama_cpp"),
                    "dashq, inputs rounded": perplexity("dashq_with_rounded_inputs"),
                    "dashq": perplexity("dashq"),
                }
            )
        ],
    ),
    "solvers": Section(
        "Seconds of the solvers",
        "One layer of random weights: the median of a few runs after the first, in which kernels are compiled or loaded. Two figures "
        "where it was measured twice; by size of the layer, the least of the runs. Zeros are real where nothing else is said.",
        "python -m bench solvers; python -m bench solvers --growth; python -m bench solvers --device cuda",
        [
            *(
                Pivot(
                    f"{where}, 4096 × 4096, groups of",
                    lambda row: f"{solver_of(row)}, {row['bits']} bit{zero_words(row)}",
                    field("group"),
                    field("seconds", form=".4f"),
                    lambda row, on_gpu=on_gpu: "solver" in row
                    and row["weights"] == 2**24
                    and row["measured"]["machine"].startswith("NVIDIA") == on_gpu,
                )
                for where, on_gpu in (("processor", False), ("graphics processor", True))
            ),
            Pivot(
                "processor, 2 bit, groups of 128, million weights",
                solver_of,
                lambda row: f"{row['weights'] >> 20}",
                field("least", form=".4f"),
                lambda row: "solver" in row
                and row["weights"] != 2**24
                and not row["measured"]["machine"].startswith("NVIDIA"),
            ),
        ],
    ),
    "rivals": Section(
        "Other programs' routines",
        "The same random weight at 2 bits in groups of 128. `× irls` is the time beside `irls` timed anew. Errors are shares: of the weighted "
        "squares of the weights, and of the outputs' power on the inputs that the solver has seen and on fresh ones.",
        "python -m bench rivals; python -m bench rivals --columns 11008",
        [
            Table(
                {
                    "routine": field("solver"),
                    "million weights": lambda row: f"{1000 * row['seconds'] / row['nanoseconds_per_weight'] / 1.048576:.0f}",
                    "seconds": field("seconds", form=".3f"),
                    "× irls": field("ratio_to_irls"),
                    "weighted error": field("weighted_error", form=".3f"),
                    "seen inputs": field("output_error", form=".3f"),
                    "fresh inputs": field("fresh_output_error", form=".3f"),
                },
                lambda row: "solver" in row and "seconds" in row,
            )
        ],
    ),
    "packing": Section(
        "Packing",
        "A random layer of 2048 × 4096, in megabytes of float32 weights a second.",
        "python -m bench packing",
        [
            Pivot(
                f"{name}, by bits",
                lambda row: f"`{row['format']}`",
                field("bits"),
                field(f"{key}_mb_per_second", form=","),
            )
            for name, key in (("packed", "packed"), ("unpacked", "unpacked"))
        ],
    ),
    "seconds": Section(
        "Seconds of a run",
        "`dashq run` of SmolLM2 at 2 bits, `diagonal` and `closed_form`, one shot.",
        "dashq run RECIPE; the seconds stand in report.json",
        [
            Table(
                {"text": field("text")}
                | {phase: field("seconds", phase, form=".1f") for phase in ("load", "calibrate", "solve", "certify", "write")}
            )
        ],
    ),
    "memory": Section(
        "Memory of a run",
        "A random Llama in shards of bfloat16, 4 × 256 calibration tokens: the peak of `dashq run` beyond what importing dashq takes.",
        "python -m bench memory",
        [
            Table(
                {
                    "checkpoint, MB": megabytes("checkpoint_bytes"),
                    "importing, MB": megabytes("baseline_bytes"),
                    "peak, MB": megabytes("peak_bytes"),
                    "beyond, MB": megabytes("beyond_baseline_bytes"),
                }
            )
        ],
    ),
    "loaded": Section(
        "Opened results",
        "Bytes of the weights in memory and seconds per generated token, packed and after `model.dequantize()`.",
        "python -m bench loaded --model RESULT",
        [
            Table(
                {
                    "model": field("model"),
                    "packed, MB": megabytes("packed", "bytes"),
                    "plain, MB": megabytes("plain", "bytes"),
                    "packed, s": field("packed", "seconds per token", form=".3f"),
                    "plain, s": field("plain", "seconds per token", form=".3f"),
                    "note": field("note"),
                }
            )
        ],
    ),
    "mixture": Section(
        "The trained mixture",
        "A small Mixtral, trained from scratch on English documentation; it lies in `tests/data/mixture`. Perplexity on Python's held-out help "
        "topics.",
        "python -m bench mixture",
        [
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
    ),
    "experts": Section(
        "Routers and pooling",
        "The trained mixture with its experts at 2 and 3 bits, the rest as it is; geometric means over three draws of the calibration text "
        "(samples of 128 tokens) and over groups of 32 and 64. A column is bits and samples. `rtn` does not look at the text.",
        "python -m bench experts",
        [
            Pivot(
                "router and pooling",
                router_of,
                lambda row: f"{row['bits']} bit, {row['samples']}",
                field("perplexity"),
                lambda row: "router" in row or row.get("solver") == "rtn",
            )
        ],
    ),
    "expert_memory": Section(
        "Memory and time of mixtures",
        "Random Mixtrals of width 512 in bfloat16, 16 × 256 tokens, solver `rtn`, without certificates: peak memory of `dashq run` beyond "
        "importing dashq.",
        "python -m bench expert_memory",
        [
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
    ),
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
        changes = [
            change.text for change in CHANGES if measured["date"] < change.day and change.concerns(self._bench, row)
        ]
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
    parts = [
        "# Results",
        note,
        "Every figure that was measured, from the files in `bench/results`. The model is SmolLM2-135M-Instruct where nothing else is said: a "
        "file of 4-bit weights (Q4_1), dequantized, so that 4 bits cost it less than they would cost a model trained in 16. Larger "
        "trained models are not measured yet. *Measured* gives version, day and machine of each line by a letter; † marks lines "
        "of an older version. TRAIN.txt, TEST.json and C4.json stand for the texts on your disk.",
        "![Perplexity against bits per weight](figures/smollm2.svg)",
        *(section(path.stem, read(path.stem)) for path in files),
    ]
    return "\n\n".join(parts) + "\n"


def order(name: str) -> tuple[int, str]:
    """Sections in the order of the list above, then files that have none."""
    return (list(SECTIONS).index(name) if name in SECTIONS else len(SECTIONS)), name


def read(name: str) -> list[Row]:
    """The lines of a file of results."""
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text("utf-8").splitlines()]


def section(name: str, rows: Sequence[Row]) -> str:
    """One file with its tables and where its lines come from."""
    described = SECTIONS.get(name) or plain_section(name, rows)
    origins = Origins(name)
    parts = [f"## {described.heading}", described.text, f"```text\n{described.command}\n```"]
    for shown in described.tables:
        kept = [row for row in rows if shown.keep(row)]
        parts += [shown.caption] * bool(shown.caption)
        parts.append(flat(shown, kept, origins) if isinstance(shown, Table) else crossed(shown, kept, origins))
    return "\n\n".join([*parts, "\n".join(origins.lines())])


def plain_section(name: str, rows: Sequence[Row]) -> Section:
    """A file that has no description: its numbers and texts as they are."""
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, dict | list))
    columns = {key.replace("_", " "): field(key) for key in keys}
    return Section(name.replace("_", " ").capitalize(), "", f"python -m bench {name}", [Table(columns)])


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


def headline() -> str:
    """The table of the README."""
    peers, robust, diagonal, budgets = read("peers"), read("robustness"), read("smollm2"), read("budgets")

    def best(methods: Sequence[str], bits: int, zero: str) -> str:
        measured = [
            row["perplexity"]["wikitext2"]
            for row in peers
            if row["method"] in methods and row["bits"] == bits and row["zero"] == zero and "perplexity" in row
        ]
        return figure(min(measured)) if measured else "not measured"

    def longer(method: str) -> str:
        """At 4 bits with real zeros, from the longer text of the other benches."""
        named = [row["perplexity"] for row in diagonal if row["name"] == f"{method}-4"]
        drawn = [
            row["perplexity"]["wikitext2"]
            for row in robust
            if row["method"] == method and row.get("bits") == 4 and row["context"] == 2048
        ]
        return f"{figure(min(named or drawn))} ¹"

    original = figure(next(row["perplexity"]["wikitext2"] for row in peers if row["method"] == "original"))
    whole = {
        "GPTQ, the better of two programs": ["gptqmodel", "llm-compressor-gptq"],
        "AutoRound, which trains": ["auto-round"],
        "DASH-Q, `closed_form`": ["closed_form"],
        "`hybrid` and `feedback`": ["hybrid"],
    }
    rows = [["original, 16 bits", *[original] * 3]]
    rows += [["**whole zeros**, bits per weight", "2.28", "3.30", "4.31"]]
    rows += [[name, *(best(methods, bits, "integer") for bits in (2, 3, 4))] for name, methods in whole.items()]
    rows += [["**real zeros**, bits per weight", "2.50", "3.50", "4.50"]]
    for name, methods in list(whole.items())[2:]:
        fourth = best(methods, 4, "real")
        rows.append(
            [name, best(methods, 2, "real"), best(methods, 3, "real"), longer(methods[0]) if "not" in fourth else fourth]
        )
    ordered = sorted(budgets, key=lambda row: (row["budget"], row["tokens"]))
    shortest = [next(lines) for _, lines in groupby(ordered, key=lambda row: row["budget"])]
    spent = [f"{row['perplexity']['wikitext2']:.1f}{' ¹' if row['tokens'] > 512 else ''}" for row in shortest]
    rows += [["the same within a `budget`", *spent]]
    return table(["", "2 bit", "3 bit", "4 bit"], rows)
