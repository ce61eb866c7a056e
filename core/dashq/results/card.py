"""The model card: the result, its figures and its recipe, and how to open it."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import yaml

from dashq.results.report import Judgement, Report
from dashq.strategies import Serializer


def model_card(recipe: Mapping[str, Any], report: Report, serializer: Serializer) -> str:
    """Markdown with the front matter that the Hugging Face hub reads; `recipe` is a resolved recipe as plain data."""
    tags = list(dict.fromkeys(["dashq", serializer.name, "quantized"]))
    # The hub would take the path of a folder for the name of somebody's model.
    front: dict[str, Any] = {"base_model": report.base_model, "tags": tags} if report.base_model else {"tags": tags}
    recipe = published(recipe, report.base_model)
    opening = inspect.cleandoc(type(serializer).__doc__ or "")
    figures = "".join(f"| {name} | {value} |\n" for name, value in _figures(report).items())
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n"
        f"# {recipe['model'].rstrip('/').rsplit('/', 1)[-1]}, quantized with dashq\n\n"
        f"{_warning(report.judgement)}| measured | |\n| --- | --- |\n{figures}\n"
        "The weighted error is Σ h (w - ŵ)² / Σ h w² with the importances h that calibration found; "
        "`report.json` has it layer by layer.\n\n"
        f"## How to open it\n\n{opening}\n\n"
        f"## Recipe\n\n```yaml\n{yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)}```\n"
    )


def published(recipe: Mapping[str, Any], base_model: str | None) -> dict[str, Any]:
    """The recipe for others to read: of paths on this machine only the last part."""
    calibration = recipe["calibration"]
    changes = {
        "model": base_model or PurePath(recipe["model"]).name,
        "output": PurePath(recipe["output"]).name,
        "calibration": {**calibration, "dataset": _published_texts(calibration["dataset"])},
    }
    tuner = recipe.get("tuner")
    if tuner and tuner["dataset"]:
        changes["tuner"] = {**tuner, "dataset": _published_texts(tuner["dataset"])}
    return {**recipe, **changes}


def _published_texts(sources: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{**source, "name": _last_part(source["name"])} for source in sources]


def _last_part(name: str) -> str:
    """A text's name; of a path that begins at a root, at home or here, its last part."""
    return PurePath(name).name if name.startswith(("/", "~", ".")) else name


def _warning(judgement: Judgement | None) -> str:
    return f"> **Warning:** {judgement.warning}.\n\n" if judgement and judgement.warning else ""


def _figures(report: Report) -> Mapping[str, str]:
    totals = report.totals
    figures = {
        "quantized layers": f"{totals.layers}, {totals.weights:,} weights",
        "bits per weight": f"{totals.bits_per_weight:.3f}, scales and offsets included",
        "weights on disk": f"{totals.bytes_on_disk / 1e6:.1f} MB",
        f"mean weighted error{' before tuning' if report.tuned else ''}": (
            f"{totals.mean_error:.5f} (min-max rounding: {totals.mean_minmax_error:.5f})"
        ),
    }
    figures |= {"tuned": str(report.tuned)} if report.tuned else {}
    return figures | ({"beside the original": str(report.judgement)} if report.judgement else {})
