"""The model card: the result, its figures and its recipe, and how to open it, ready to be published."""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import yaml
from huggingface_hub import metadata_load
from transformers import PreTrainedModel

from dashq.errors import one_line
from dashq.model.location import CARD, Location
from dashq.model.transformers_internals import read_gguf_settings
from dashq.results.comparison import bits_of_layers, types_of_layers
from dashq.results.judged import Judgement
from dashq.results.report import Report
from dashq.strategies import Serializer

OPENINGS = "## How to open it"
# Entries about a model's licence and its languages, which its quantized form shares.
INHERITED = ("license", "license_name", "license_link", "language")
TEXT_FILE = re.compile(r".*\.(txt|md|jsonl?|parquet|csv)(\.\w+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Origin:
    """The entries of the base model's card that hold for its quantized form, and its task.

    The task is the hub's word for it, `text-generation` for one.
    """

    entries: Mapping[str, Any] = field(default_factory=dict)
    task: str = "text-generation"


def origin_of(source: Location, network: PreTrainedModel) -> Origin:
    """The licence, the languages and the task of a model by its files at `source` and the class of its `network`."""
    task = "text-generation" if network.can_generate() else "feature-extraction"
    if source.gguf:
        licence = read_gguf_settings(str(source.folder / source.gguf)).get("general.license")
        return Origin({"license": licence} if isinstance(licence, str) else {}, task)
    try:
        front = (metadata_load(source.folder / CARD) if (source.folder / CARD).is_file() else None) or {}
    except (OSError, ValueError, yaml.YAMLError):  # a card is for readers: one that is broken stops no run
        front = {}
    return Origin({key: front[key] for key in INHERITED if key in front}, task)


def model_card(recipe: Mapping[str, Any], report: Report, serializer: Serializer, origin: Origin) -> str:
    """Markdown with the front matter that the Hugging Face hub reads; `recipe` is a resolved recipe as plain data."""
    bits = {f"{layer.bits}-bit" for layer in report.layers}
    front: dict[str, Any] = {
        **origin.entries,
        "library_name": serializer.library,
        "pipeline_tag": origin.task,
        "tags": list(dict.fromkeys(["dashq", serializer.name, "quantized", *(bits if len(bits) == 1 else ())])),
    }
    if report.base_model:  # the hub would take the path of a folder for the name of somebody's model
        front |= {"base_model": report.base_model, "base_model_relation": "quantized"}
    recipe = published(recipe, report.base_model)
    opening = _openings(serializer, recipe["output"])
    figures = "".join(f"| {name} | {value} |\n" for name, value in _figures(report, serializer).items())
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n"
        f"# {recipe['model'].rstrip('/').rsplit('/', 1)[-1]}, quantized with dashq\n\n"
        f"{_warnings(report)}| measured | |\n| --- | --- |\n{figures}\n"
        "The weighted error is Σ h (w - ŵ)² / Σ h w² with the importances h that calibration found; "
        "`report.json` has it layer by layer.\n\n"
        f"{_sentence(report.judgement)}"
        f"{OPENINGS}\n\n{opening}"
        f"## Recipe\n\n```yaml\n{yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)}```\n"
    )


def for_repository(card: str, output: str, repository: str) -> str:
    """A card whose code opens the repository of the hub that it is sent to, where it named the result's folder."""
    before, heading, after = card.partition(f"{OPENINGS}\n")
    code, recipe_heading, rest = after.partition("\n## Recipe\n")
    code = re.sub(rf"(?<![\w./-]){re.escape(output)}(?![\w.-])", lambda _: repository, code)
    return f"{before}{heading}{code}{recipe_heading}{rest}"


def _openings(serializer: Serializer, output: str) -> str:
    """Code for each program that opens the format; `output` stands for the folder."""
    programs = {**serializer.openings, "dashq": "$ dashq chat {model}"}
    blocks = []
    for program, code in programs.items():
        language, text = ("sh", code.removeprefix("$ ")) if code.startswith("$ ") else ("python", code)
        blocks.append(f"{program}:\n\n```{language}\n{text.strip().replace('{model}', output)}\n```\n\n")
    first, *_ = inspect.cleandoc(type(serializer).__doc__ or "").split("\n\n")
    return f"Format `{serializer.name}`: {first}\n\n{''.join(blocks)}"


def published(recipe: Mapping[str, Any], base_model: str | None) -> dict[str, Any]:
    """The recipe for others to read: of paths on this machine only the last part."""
    calibration = recipe["calibration"]
    changes = {
        "model": base_model or PurePath(recipe["model"]).name,
        "output": PurePath(recipe["output"]).name,
        "calibration": {**calibration, "dataset": _published_texts(calibration["dataset"]), "keep": None},
    }
    tuner = recipe.get("tuner")
    if tuner and tuner["dataset"]:
        changes["tuner"] = {**tuner, "dataset": _published_texts(tuner["dataset"])}
    return {**recipe, **changes}


def _published_texts(sources: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{**source, "name": _last_part(source["name"])} for source in sources]


def _last_part(name: str) -> str:
    """A text's name; of a path that begins at a root, at home or here, or that ends as files do, its last part."""
    return PurePath(name).name if name.startswith(("/", "~", ".")) or TEXT_FILE.fullmatch(name) else name


def _warnings(report: Report) -> str:
    """A warning where the model is destroyed, and notes on what of the model is not in the result."""
    destroyed = report.judgement.warning if report.judgement else None
    warning = f"> **Warning:** {destroyed}.\n\n" if destroyed else ""
    return warning + "".join(f"> **Note:** {one_line(sentence)}.\n\n" for sentence in report.warnings)


def _sentence(judgement: Judgement | None) -> str:
    """One prompt as both models go on, in a block in which nothing of it is markup."""
    if judgement is None or judgement.continuation is None:
        return ""
    sentence = judgement.continuation
    lines = f"{sentence.prompt} …\noriginal:  {sentence.original}\nquantized: {sentence.quantized}"
    return f"## A sentence of each\n\n```text\n{lines}\n```\n\n"


def _figures(report: Report, serializer: Serializer) -> Mapping[str, str]:
    totals, types = report.totals, types_of_layers(report, serializer)
    figures = {
        "quantized layers": f"{totals.layers}, {totals.weights:,} weights",
        **({"types": bits_of_layers(report, types)} if any(types) else {}),
        "bits per weight": f"{totals.bits_per_weight:.3f}, scales and offsets included",
        "weights on disk": f"{totals.bytes_on_disk / 1e6:.1f} MB, {totals.bits_per_parameter:.3f} bits per parameter",
        f"mean weighted error{' before tuning' if report.tuned else ''}": (
            f"{totals.mean_error:.5f} (min-max rounding: {totals.mean_minmax_error:.5f})"
        ),
    }
    figures |= {"tuned": str(report.tuned)} if report.tuned else {}
    return figures | ({"beside the original": str(report.judgement)} if report.judgement else {})
