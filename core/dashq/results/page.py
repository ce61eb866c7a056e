"""The page beside a result, `report.html`: tables and drawings of one result or several, in one file."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path, PurePath
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader

from dashq.errors import OutputError
from dashq.results.card import published
from dashq.results.comparison import (
    Finished,
    bits_of_layers,
    judged_alike,
    sections,
    types_of_result,
    worst_layers,
)
from dashq.results.files import write_text
from dashq.results.judged import measured
from dashq.results.report import LayerReport, Report
from dashq.results.sizes import parts
from dashq.strategies import Serializer

TEMPLATES = Path(__file__).with_name("templates")
MARK = b'<meta name="generator" content="dashq">'  # in the head of every page
WORST = 10  # layers that are listed
CHOSEN = 12  # selections that are listed


def page(results: Sequence[Finished], serializers: Mapping[str, type[Serializer]]) -> str:
    """The page as HTML; nothing in it is fetched from elsewhere, and it names no folder of this machine.

    `serializers` are the formats by name, which know how programs open them.
    """
    results = [replace(result, recipe=published(result.recipe, result.report.base_model)) for result in results]
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            results=[_shown(result, serializers) for result in results],
            tables=sections(results, serializers, WORST),
            sentences=_sentences(results),
            alike=judged_alike(results),
            data={"results": [_drawn(result, types_of_result(result, serializers)) for result in results]},
        )
    )


def write_page(path: Path, text: str) -> Path:
    """Write a page, all or nothing; returns its file. An `OutputError` where another file, or no folder, is there."""
    if not path.absolute().parent.is_dir():
        raise OutputError(f"cannot write the page {path}: there is no folder {path.absolute().parent}")
    if path.exists() and not _is_page(path):
        raise OutputError(f"{path} is no page that dashq wrote: move it away, or name another file with --output")
    return write_text(path, text)


@functools.cache
def _environment() -> Environment:
    """The templates, which are compiled when a process uses them first."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "separators": (",", ":")}
    return environment


def _is_page(path: Path) -> bool:
    return path.is_file() and MARK in path.read_bytes()[:2048]


def _shown(result: Finished, serializers: Mapping[str, type[Serializer]]) -> dict[str, Any]:
    """All of a result that stands on its page as text."""
    report, recipe = result.report, result.recipe
    types = types_of_result(result, serializers)
    names = {layer.name: name for layer, name in zip(report.layers, types, strict=True)}
    return {
        "name": result.name,
        "model": recipe["model"].rstrip("/").rsplit("/", 1)[-1],
        "report": report,
        "headline": _headline(report),
        "judgement": report.judgement,
        "figures": report.judgement.figures() if report.judgement else {},
        "bits": bits_of_layers(report, types),
        "types": names if any(types) else {},
        "parts": _parts(report),
        "kinds": _kinds(report, names),
        "worst": worst_layers(report, WORST),
        "chosen": report.chosen[:CHOSEN],
        "phases": _shares(report.seconds),
        "notes": [f"{layer.name}: {note}" for layer in report.layers for note in layer.fallbacks],
        "commands": _openings(result, serializers),
        "recipe": yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True),
    }


def _sentences(results: Sequence[Finished]) -> list[dict[str, str]]:
    """Texts that each model made of a prompt, where one was continued; those of one original beside each other."""
    sentences = [
        {"name": result.name, **asdict(judgement.continuation)}
        for result in results
        if (judgement := result.report.judgement) and judgement.continuation
    ]
    return sorted(sentences, key=lambda sentence: (sentence["prompt"], sentence["original"]))


def _headline(report: Report) -> dict[str, tuple[str, str]]:
    """The figures that stand on top: each with a word on it."""
    totals, judgement = report.totals, report.judgement
    before, after = sum(report.original.values()), totals.bytes_on_disk
    figures = {"bits per weight": (f"{totals.bits_per_weight:.2f}", "scales and offsets included")}
    figures["on disk"] = (megabytes(after), f"{megabytes(before)} before" if before else "")
    if judgement:
        figures["perplexity"] = (measured(judgement.perplexity), f"original {measured(judgement.original_perplexity)}")
        figures["divergence"] = (measured(judgement.divergence), "nats per token")
        figures["same first choice"] = (f"{judgement.agreement:.1%}", "of the original's")
    figures["time"] = (duration(sum(report.seconds.values(), 0.0)), report.computed)
    return figures


def _parts(report: Report) -> dict[str, Any]:
    """The bytes before and after, as shares of the larger sum."""
    own = parts(report)
    before, after = sum(part.before or 0 for part in own), sum(part.after for part in own)
    largest = max(before, after, 1)
    rows = [
        {
            "name": part.name,
            "before": None if part.before is None else megabytes(part.before),
            "after": megabytes(part.after),
            "before_share": (part.before or 0) / largest,
            "after_share": part.after / largest,
            "style": f"part-{number}",
        }
        for number, part in enumerate(own)
    ]
    return {
        "rows": rows,
        "before": megabytes(before) if before else "",
        "after": megabytes(report.totals.bytes_on_disk),
    }


def _kinds(report: Report, types: Mapping[str, str | None]) -> list[dict[str, Any]]:
    """The layers by kind, with their sizes, types and errors."""
    kinds: dict[str, list[LayerReport]] = {}
    for layer in report.layers:
        kinds.setdefault(_place(layer)[1], []).append(layer)
    rows = []
    for kind, layers in kinds.items():
        weights = sum(layer.layer.weights for layer in layers)
        packed = sum(layer.bytes for layer in layers)
        rows.append(
            {
                "name": kind,
                "layers": len(layers),
                "weights": f"{weights / 1e6:,.1f}",
                "bits": f"{8 * packed / weights:.2f}",
                "types": ", ".join(sorted({name for layer in layers if (name := types[layer.name])})),
                "size": f"{packed / 1e6:,.1f}",
                "error": f"{sum(layer.error for layer in layers) / len(layers):.4f}",
                "worst": f"{max(layer.error for layer in layers):.4f}",
            }
        )
    return rows


def _shares(seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    total = sum(seconds.values()) or 1.0
    return [
        {"name": phase, "share": value / total, "time": duration(value)}
        for phase, value in sorted(seconds.items(), key=lambda item: item[1], reverse=True)
    ]


def _openings(result: Finished, serializers: Mapping[str, type[Serializer]]) -> dict[str, str]:
    """Code or a command that opens a result, by program; dashq opens every format."""
    form, folder = result.recipe["serializer"]["name"], PurePath(result.recipe["output"]).name
    openings = {**(serializers[form].openings if form in serializers else {}), "dashq": "$ dashq chat {model}"}
    return {name: code.removeprefix("$ ").strip().replace("{model}", folder) for name, code in openings.items()}


def _drawn(result: Finished, types: Sequence[str | None]) -> dict[str, Any]:
    """All of a result that is drawn, as columns of numbers."""
    report = result.report
    places = [_place(layer) for layer in report.layers]
    blocks = sorted({block for block, _ in places}, key=lambda block: (not block, _number_of(block)))
    kinds = list(dict.fromkeys(kind for _, kind in places))
    block_index, kind_index = {block: n for n, block in enumerate(blocks)}, {kind: n for n, kind in enumerate(kinds)}
    return {
        "name": result.name,
        "blocks": [block.rpartition(".")[2] or "outside" for block in blocks],
        "kinds": kinds,
        "names": [layer.name for layer in report.layers],
        "types": list(types) if any(types) else [],
        "block": [block_index[block] for block, _ in places],
        "kind": [kind_index[kind] for _, kind in places],
        "weights": [layer.layer.weights for layer in report.layers],
        "figures": _layer_figures(report),
        "budget": None if report.budget is None else report.budget.__dict__,
        "bits": _rounded(report.totals.bits_per_weight),
        "bytes": report.totals.bytes_on_disk,
        "judgement": None if report.judgement is None else _numbers(report.judgement.__dict__),
        "tuning": [_numbers(check.__dict__) for check in report.tuned.checks] if report.tuned else [],
        "experts": {mixture.mixture: mixture.tokens for mixture in report.totals.mixtures},  # whose layers share them
    }


def _layer_figures(report: Report) -> dict[str, list[float | None]]:
    """The figures of layers that are drawn, by name: one for each layer, None where it has none."""
    layers = report.layers
    figures: dict[str, list[float | None]] = {
        "error": [_rounded(layer.error) for layer in layers],
        "of min–max": [_rounded(layer.error / layer.minmax_error) if layer.minmax_error else None for layer in layers],
        "bits": [float(layer.bits) for layer in layers],
        "group size": [float(layer.group_size) for layer in layers],
        "seconds": [_rounded(layer.seconds) for layer in layers],
    }
    for name in dict.fromkeys(name for layer in layers for name in layer.statistics):
        figures[name] = [_rounded(layer.statistics.get(name, math.nan)) for layer in layers]
    if any(layer.certificate for layer in layers):
        figures["from optimum"] = [_rounded(layer.certificate.gap) if layer.certificate else None for layer in layers]
    if any(layer.expert is not None for layer in layers):
        figures["tokens"] = [float(layer.tokens) for layer in layers]
        figures["shrinkage"] = [_rounded(layer.shrinkage) for layer in layers]
    return {name: values for name, values in figures.items() if any(value is not None for value in values)}


def _place(layer: LayerReport) -> tuple[str, str]:
    """The name of a layer's block, and its own inside it; that of an expert with a star in the number's place."""
    name, block = layer.layer.stack or layer.name, layer.layer.block
    return block, name.removeprefix(f"{block}.") if block else name


def _number_of(block: str) -> int:
    number = block.rpartition(".")[2]
    return int(number) if number.isdecimal() else 0


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers among some values, rounded."""
    return {key: _rounded(float(value)) for key, value in values.items() if isinstance(value, int | float)}


def _rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def megabytes(count: int) -> str:
    """A number of bytes in words."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    """A time in words."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.1f} s"
