"""Results beside each other: recipes where they differ, sizes, figures, times, and their worst layers."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dashq.errors import CheckpointError, refusing
from dashq.model.mappings import read_mapping
from dashq.results.folder import RECIPE
from dashq.results.judged import measured
from dashq.results.report import REPORT, LayerReport, Report, read_report
from dashq.strategies import Serializer

OTHER_TEXT = 0.02  # by which perplexities of one original on one text may differ, computed in other types
NOTHING = "–"
LONGEST = 40  # letters of one entry of a recipe


@dataclass(frozen=True, eq=False)
class Finished:
    """A finished result: a short name, its report, and its recipe as plain data."""

    name: str
    report: Report
    recipe: Mapping[str, Any]

    @property
    def seconds(self) -> float:
        """Those of the whole run."""
        return sum(self.report.seconds.values(), 0.0)


def read_finished(folders: Sequence[Path]) -> list[Finished]:
    """The results in these folders, called by the last parts of their paths, as many as tell them apart.

    Raises `CheckpointError` where one is no finished result.
    """
    return [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _read(folder: Path, name: str) -> Finished:
    if not (folder / REPORT).is_file():
        raise CheckpointError(f"{folder} is no finished result of dashq: it has no {REPORT}")
    with refusing(f"{folder / RECIPE} is not as dashq writes it"):
        recipe = read_mapping(folder / RECIPE, yaml.safe_load)
    return Finished(name, read_report(folder), recipe)


def _names(folders: Sequence[Path]) -> list[str]:
    """As many of the last parts of the paths as tell them apart."""
    paths = [folder.absolute().parts for folder in folders]
    longest = max(map(len, paths))
    tried = [["/".join(path[-length:]) for path in paths] for length in range(1, longest + 1)]
    return next((names for names in tried if len(set(names)) == len(names)), tried[-1])


Rows = Mapping[str, Sequence[str]]


def sections(
    results: Sequence[Finished], serializers: Mapping[str, type[Serializer]], worst: int = 5
) -> dict[str, Rows]:
    """Tables by title: rows by name, each with one text for every result. Empty tables are left out.

    Of the recipes only entries that differ have a row. The `serializers` that are installed name the types of layers.
    `worst` is the number of worst layers, of any of the results.
    """
    types = [types_of_result(result, serializers) for result in results]
    tables = {
        "recipe": _recipe_rows(results),
        "size": _rows([_sizes(result.report, own) for result, own in zip(results, types, strict=True)]),
        "predictions": _rows([_figures(result.report) for result in results]),
        "layers": _rows([_errors(result.report) for result in results]),
        "seconds": _rows([_seconds(result.report) for result in results]),
        "worst layers": _worst_rows(results, types, worst),
    }
    return {title: rows for title, rows in tables.items() if rows}


def judged_alike(results: Sequence[Finished]) -> bool:
    """False where results were judged on different texts, so that figures of their predictions do not compare."""
    judgements = [result.report.judgement for result in results if result.report.judgement]
    originals = [judgement.original_perplexity or 0.0 for judgement in judgements]
    if len({judgement.tokens for judgement in judgements}) > 1:
        return False
    return not originals or max(originals) - min(originals) <= OTHER_TEXT * max(originals)


def worst_layers(report: Report, count: int) -> list[LayerReport]:
    """The layers with the largest errors, the worst first."""
    return sorted(report.layers, key=lambda layer: layer.error, reverse=True)[:count]


def bits_of_layers(report: Report, types: Sequence[str | None] = ()) -> str:
    """The number of layers with each number of bits, and of each of the `types` that layers are of, in words."""
    own = types or [None] * len(report.layers)
    kinds = [(layer.bits, f" ({name})" if name else "") for layer, name in zip(report.layers, own, strict=True)]
    counts = Counter(kinds)
    if len(counts) == 1:
        return f"{kinds[0][0]} bits{kinds[0][1]} in all layers"
    return ", ".join(f"{bits} bits{name} in {count}" for (bits, name), count in sorted(counts.items()))


def types_of_layers(report: Report, serializer: Serializer | None) -> list[str | None]:
    """The name of the format's type that each layer is of; None where the format has no names, or is not installed."""
    names: dict[tuple[int, str | None], str | None] = {}
    for bits, own in {(layer.bits, layer.type) for layer in report.layers}:
        if serializer and (types := serializer.types(bits)):
            grid = serializer.grid_of(bits, own)
            names[bits, own] = next(name for name, other in types.items() if other == grid)
    return [names.get((layer.bits, layer.type)) for layer in report.layers]


def types_of_result(result: Finished, serializers: Mapping[str, type[Serializer]]) -> list[str | None]:
    """The types of a result's layers, in the words of its format where that is among the `serializers`."""
    entry = dict(result.recipe["serializer"])
    form = serializers.get(entry.pop("name"))
    return types_of_layers(result.report, form.model_validate(entry) if form else None)


def flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The entries of a recipe by their keys with dots; lists of more than one entry are one value."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict) and value:
        for name, deeper in value.items():
            if name == "name":  # of a strategy or a text: it is the strategy, and what follows are its parameters
                yield key, deeper
            else:
                yield from flat(deeper, f"{key}.{name}" if key else name)
    else:
        yield key, value


def _recipe_rows(results: Sequence[Finished]) -> Rows:
    recipes = [dict(flat({**result.recipe, "output": None})) for result in results]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    columns = {key: [None if recipe.get(key) == [] else recipe.get(key) for recipe in recipes] for key in keys}
    return {
        key: [_value(value) for value in values]
        for key, values in columns.items()
        if any(value != values[0] for value in values)
    }


def _value(value: Any) -> str:
    """An entry of a recipe in a few words; of overrides what each of them sets."""
    if value is None:
        return NOTHING
    if isinstance(value, list):
        return "; ".join(map(_value, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(entry)}" for key, entry in flat(value) if entry is not None)
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 2]} …"


def _rows(columns: Sequence[Mapping[str, str]]) -> Rows:
    """Rows of the names that any of the columns has."""
    names = dict.fromkeys(name for column in columns for name in column)
    return {name: [column.get(name, NOTHING) for column in columns] for name in names}


def _sizes(report: Report, types: Sequence[str | None]) -> dict[str, str]:
    totals = report.totals
    sizes = {
        "bits per weight": f"{totals.bits_per_weight:.3f}",
        "bits per parameter": f"{totals.bits_per_parameter:.3f}",
        "bits of layers": bits_of_layers(report, types),
        "weights on disk, MB": f"{totals.bytes_on_disk / 1e6:,.1f}",
    }
    if report.original:
        sizes["original's weights, MB"] = f"{sum(report.original.values()) / 1e6:,.1f}"
    return sizes


def _figures(report: Report) -> dict[str, str]:
    return report.judgement.figures() if report.judgement else {}


def _errors(report: Report) -> dict[str, str]:
    totals = report.totals
    errors = {
        "mean weighted error": f"{totals.mean_error:.4g}",
        "the same of min-max rounding": f"{totals.mean_minmax_error:.4g}",
    }
    if totals.certificate:
        errors["mean distance from the optimum"] = f"{totals.certificate.mean_gap:.2%}"
    if report.tuned and report.tuned.checks:
        errors["divergence before tuning"] = measured(report.tuned.before)
        errors["divergence after tuning"] = measured(report.tuned.best.divergence)
    return errors


def _seconds(report: Report) -> dict[str, str]:
    seconds = {"in all": f"{sum(report.seconds.values(), 0.0):,.0f}"}
    return seconds | {phase: f"{value:,.1f}" for phase, value in report.seconds.items()}


def _worst_rows(results: Sequence[Finished], types: Sequence[Sequence[str | None]], count: int) -> Rows:
    """Error, bits and type in each result of the layers that are worst in any."""
    errors: dict[str, float] = {}
    for result in results:
        for layer in worst_layers(result.report, count):
            errors[layer.name] = max(layer.error, errors.get(layer.name, 0.0))
    worst = sorted(errors, key=errors.__getitem__, reverse=True)[:count]
    columns = [
        {
            layer.name: f"{layer.error:.4g} at {layer.bits} bits{f' ({name})' if name else ''}"
            for layer, name in zip(result.report.layers, own, strict=True)
            if layer.name in errors
        }
        for result, own in zip(results, types, strict=True)
    ]
    return {name: [column.get(name, NOTHING) for column in columns] for name in worst}
