"""Small tables of measured figures for pages that show a scheme at work, from bench/results/*.jsonl."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean

from results_page import Row, figure, read, shown_best, table, times_of_fast, within_budget

CASES = {
    "rtn": "`rtn`, 4 bits",
    "stochastic": "`stochastic`, 4 bits",
    "contiguous": "`closed_form` in groups of neighbours, 2 bits",
    "by_magnitude": "`closed_form` in groups `by_magnitude`, 2 bits",
    "full": "`full` and `feedback`, 2 bits",
    "hybrid": "`hybrid` and `feedback`, 2 bits",
    "spatial_sign": "`spatial_sign` and `feedback`, 2 bits",
    "more bits": "`hybrid` and `feedback`, 3 bits in `down_proj`, 4 in the first and the last block",
}
HEADS = ("scheme", "bits per weight", "perplexity")


def budgets() -> str:
    """Uniform schemes beside budgets of the same size, with a diagonal and with the whole curvature."""
    rows = {row["name"]: row for row in read("allocation")}
    sizes = (("2/64", 2.5), ("2/32", 3.0), ("3/64", 3.5))
    diagonal = [
        [f"{bits}", figure(rows[f"uniform {name}"]["perplexity"]), figure(rows[f"budget {bits}"]["perplexity"])]
        for name, bits in sizes
    ]
    return table(["bits per weight", "uniform", "within a budget"], diagonal)


def hybrid_budgets() -> str:
    """The whole curvature, uniform and within a budget, both on the same text."""
    peers = [row for row in read("peers") if row["method"] == "hybrid" and row["zero"] == "real"]
    lines = []
    for bits, size in ((2, 2.5), (3, 3.5)):
        uniform = shown_best("peers", [row for row in peers if row["bits"] == bits])
        within = [row for row in read("budgets") if row["budget"] == size and row["tokens"] == 512]
        lines.append([f"{size}", uniform, shown_best("budgets", within)])
    return table(["bits per weight", "uniform", "within a budget"], lines)


def critical() -> str:
    """Four bits in a tenth of the weights, chosen in several ways."""
    rows = {row["name"]: row for row in read("allocation")}
    random = [row["perplexity"] for name, row in rows.items() if name.startswith("critical random")]
    lines = [["two bits throughout", "2.5", figure(rows["uniform 2/64"]["perplexity"])]]
    lines += [["four in a tenth at random, mean of three", "2.7", figure(mean(random))]]
    for key in ("error", "snr", "sensitivity"):
        lines.append([f"four in a tenth, `by: {key}`", "2.7", figure(rows[f"critical {key}"]["perplexity"])])
    return table(HEADS, lines)


def tuned() -> str:
    """The same schemes with the tuner at the end and without."""
    rows = [row for row in read("tuner") if row["format"] == "dashq" and not within_budget(row)]
    lines = []
    for bits in (2, 3):
        plain, tuned = (
            _best(row for row in rows if row["bits"] == bits and bool(row["tuner"]) is by) for by in (False, True)
        )
        lines.append(
            [
                f"{bits} bits",
                f"{plain['bits_per_weight']}",
                _perplexity(plain),
                _perplexity(tuned),
                f"{plain['seconds']:.0f}",
                f"{tuned['seconds']:.0f}",
            ]
        )
    heads = ["scheme", "bits per weight", "perplexity", "tuned", "seconds", "seconds, tuned"]
    return table(heads, lines)


def super_blocks() -> str:
    """Layers in llama.cpp's super-blocks under a diagonal and under the whole curvature."""
    names = {
        "llama.cpp": "llama.cpp's own, from the same importances",
        "k_quant": "`diagonal`, `k_quant`",
        "hybrid": "`hybrid`, `feedback`",
    }
    own = (row for row in read("super_blocks") if row["layers"] == "down_proj")
    usual = (row for row in own if not any("solver" in text for text in row["settings"]))
    rows = sorted(usual, key=lambda row: (row["bits"], row["type"], list(names).index(row["method"])))
    lines = [[f"{row['type']}, {names[row['method']]}", f"{row['bits_per_weight']}", _perplexity(row)] for row in rows]
    return table(HEADS, lines)


def gallery() -> str:
    """The error of the weights by solver and grouper, in percent of their squares."""
    names = {
        ("rtn", "contiguous"): "`rtn`, groups of neighbours",
        ("rtn", "by_magnitude"): "`rtn`, groups `by_magnitude`",
        ("stochastic", "contiguous"): "`stochastic`, groups of neighbours",
    }
    errors = {(row["solver"], row["grouper"], row["bits"]): row["relative_error"] for row in _weights()}
    lines = [[name, *(f"{100 * errors[*key, bits]:.2f}" for bits in (2, 3, 4))] for key, name in names.items()]
    return table(["error of the weights, %", "2 bits", "3 bits", "4 bits"], lines)


def gallery_runs() -> str:
    """Whole models by strategies of the gallery beside those that come with dashq."""
    measured = {row["case"] for row in read("gallery")}
    pairs = (("rtn", "stochastic"), ("contiguous", "by_magnitude"), ("hybrid", "spatial_sign"))
    return _cases([case for pair in pairs if pair[1] in measured for case in pair])


def levels() -> str:
    """The three levels of a run: the time that each takes, as a multiple of the fast one's, and what it reaches."""
    rows = sorted(read("levels"), key=lambda row: float(row["cpu_seconds"]))
    names = {"usual": "neither"}
    lines = [
        [
            names.get(row["level"], f"`--{row['level']}`"),
            times_of_fast(row),
            *(figure(row["perplexity"][text]) for text in ("wikitext2", "c4")),
        ]
        for row in rows
    ]
    return table(["level", "time", "perplexity on WikiText-2", "on C4"], lines)


def more_bits() -> str:
    """A scheme with more bits in layers chosen by hand, beside the same bits everywhere."""
    return _cases(("hybrid", "more bits"))


def _cases(names: Sequence[str]) -> str:
    """The cases that were measured, from the bench itself or else from one that measures the same."""
    rows = {**_measured_elsewhere(), **{row["case"]: row for row in read("gallery")}}
    return table(
        HEADS,
        [
            [CASES[name], f"{rows[name]['bits_per_weight']:.2f}", _perplexity(rows[name])]
            for name in names
            if name in rows
        ],
    )


def _measured_elsewhere() -> Mapping[str, Row]:
    """The usual choices on the same text and windows, as other benches measured them."""
    rounded = next(row for row in read("smollm2") if row["name"] == "rtn-4")
    peers = [row for row in read("peers") if row.get("zero") == "real" and row.get("bits") == 2]
    usual = {row["method"]: row for row in peers if row["method"] in ("closed_form", "hybrid")}
    return {"rtn": rounded, "contiguous": usual["closed_form"], "hybrid": usual["hybrid"]}


def _weights() -> Sequence[Row]:
    return [row for row in read("gallery") if row["case"] == "weights"]


def _best(rows: Iterable[Row]) -> Row:
    return min(rows, key=lambda row: float(row["perplexity"]["wikitext2"]))


def _perplexity(row: Row) -> str:
    measured = row["perplexity"]
    return figure(measured["wikitext2"] if isinstance(measured, Mapping) else measured)
