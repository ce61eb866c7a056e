"""Text sources become batches of tokens, drawn at random to calibrate on and in order to evaluate on."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from jinja2 import TemplateError
from torch import Generator, Tensor
from transformers import PreTrainedTokenizerBase

from dashq.errors import TextError
from dashq.model.progress_bars import without_progress_bars
from dashq.recipe.recipe import Calibration, TextSource
from dashq.strict import guess

_C4_FILES = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
_FILE_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
_POOL = 4  # windows to choose from, for each one drawn
HELD_OUT_TOKENS = 1024  # that are drawn beside the samples, in whole pieces


@dataclass(frozen=True, eq=False)
class Drawn:
    """Pieces of text: the samples to calibrate on, and those that are held out for a judgement, as far as there are."""

    samples: Int64[Tensor, "samples tokens"]
    held_out: Int64[Tensor, "pieces tokens"]


def read_documents(source: TextSource) -> Sequence[object]:
    """All documents of a source, in its order: texts, or lists of chat messages with `role` and `content`.

    A hub dataset is read from disk as its documents are asked for, so that their kind is not known here. Raises
    TextError when the source cannot be found or read, lacks the field, or is empty.
    """
    path = Path(source.name).expanduser()
    documents: Sequence[object]
    if source.name == "pydoc":
        documents = _read_pydoc(source.split)
    elif path.suffix.lower() in _FILE_SUFFIXES:
        documents = _read_file(path, source.field)
    else:
        documents = _read_hub(source)
    if not any(documents):
        raise TextError(f"{source.name!r} holds no text")
    return documents


def calibration_tokens(calibration: Calibration, tokenizer: PreTrainedTokenizerBase) -> Int64[Tensor, "samples tokens"]:
    """The samples of `draw`."""
    return draw(calibration, tokenizer).samples


def draw(calibration: Calibration, tokenizer: PreTrainedTokenizerBase) -> Drawn:
    """Random pieces of text of `sequence_length` tokens, mixed from the sources by weight; the same for one seed.

    With packing, documents are joined end to end and cut into windows; without, each sample is the beginning of
    another document. No piece is drawn twice. The pieces that are held out are of the same kinds; a short text has
    fewer or none. Raises TextError when a source cannot be read or is too short for the samples.
    """
    generator = Generator().manual_seed(calibration.seed)
    draw_pieces = _draw_windows if calibration.packing else _draw_beginnings
    weights = [source.weight for source in calibration.dataset]
    shares = apportion(calibration.samples, weights)
    spares = apportion(max(1, HELD_OUT_TOKENS // calibration.sequence_length), weights)
    pieces = [
        draw_pieces(source, tokenizer, (share, spare), calibration.sequence_length, generator)
        for source, share, spare in zip(calibration.dataset, shares, spares, strict=True)
        if share
    ]
    samples = torch.cat([own[:share] for own, share in zip(pieces, filter(None, shares), strict=True)])
    held_out = torch.cat([own[share:] for own, share in zip(pieces, filter(None, shares), strict=True)])
    return Drawn(samples[torch.randperm(calibration.samples, generator=generator)], held_out)


def evaluation_windows(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, context: int, limit: int | None
) -> Int64[Tensor, "windows context"]:
    """The first `limit` windows (None: all) of a source's whole text, each `context` tokens long, in order.

    The incomplete rest is dropped. Raises TextError when the source cannot be read or is shorter than one window.
    """
    text = "\n\n".join(_as_text(document, source, tokenizer) for document in read_documents(source))
    stream = torch.tensor(_encode(text, tokenizer), dtype=torch.int64)
    windows = len(stream) // context
    if windows == 0:
        raise TextError(f"{source.name!r} has only {len(stream)} tokens: lower context from {context}, or add text")
    return stream[: windows * context].view(windows, context)[:limit]


def apportion(samples: int, weights: Sequence[float]) -> list[int]:
    """Whole shares of `samples` by weight: largest remainder first, the earlier one where remainders are equal."""
    # Fractions of the weights as written: shares always add up, and 0.7 and 0.2 tie where a person sees a tie.
    exact = [Fraction(str(weight)) for weight in weights]
    quotas = [samples * weight / sum(exact) for weight in exact]
    shares = [floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda index: shares[index] - quotas[index])
    for index in by_remainder[: samples - sum(shares)]:
        shares[index] += 1
    return shares


def _draw_windows(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, counts: tuple[int, int], tokens: int, generator: Generator
) -> Int64[Tensor, "pieces tokens"]:
    """The samples, and behind them as many of the further pieces as there are; `counts` of both."""
    samples, spare = counts
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    for text in _shuffled_texts(source, tokenizer, generator):
        piece = _encode(text, tokenizer)
        stream += [*separator, *piece] if stream and piece else piece
        # Of a huge source a random part is as good as the whole: documents come shuffled, and a pool a few times the
        # need keeps the windows drawn from it spread over many documents.
        if len(stream) >= _POOL * samples * tokens:
            break
    windows = len(stream) // tokens
    if windows < samples:
        has = f"{len(stream)} tokens, {windows} windows of {tokens}"
        raise _too_short(source, has, samples, fitting_samples=windows, fitting_tokens=len(stream) // samples)
    chosen = torch.randperm(windows, generator=generator)[: samples + spare]
    return torch.tensor(stream[: windows * tokens], dtype=torch.int64).view(windows, tokens)[chosen]


def _draw_beginnings(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, counts: tuple[int, int], tokens: int, generator: Generator
) -> Int64[Tensor, "pieces tokens"]:
    """As `_draw_windows`."""
    samples, spare = counts
    beginnings: list[list[int]] = []
    lengths: list[int] = []
    for text in _shuffled_texts(source, tokenizer, generator):
        piece = _encode(text, tokenizer)
        lengths.append(len(piece))
        if len(piece) >= tokens:
            beginnings.append(piece[:tokens])
        if len(beginnings) == samples + spare:
            break
    if len(beginnings) >= samples:
        return torch.tensor(beginnings, dtype=torch.int64)
    has = f"{len(lengths)} documents, {len(beginnings)} of them with {tokens} tokens"
    fitting_tokens = sorted(lengths, reverse=True)[samples - 1] if samples <= len(lengths) else 0
    raise _too_short(source, has, samples, fitting_samples=len(beginnings), fitting_tokens=fitting_tokens)


def _too_short(source: TextSource, has: str, samples: int, fitting_samples: int, fitting_tokens: int) -> TextError:
    fitting = {"samples": fitting_samples, "sequence_length": fitting_tokens}
    ways = ", or ".join([*(f"lower {name} to {count}" for name, count in fitting.items() if count), "add text"])
    return TextError(f"{source.name!r} has {has}, but its share is {samples} samples: {ways}")


def _shuffled_texts(source: TextSource, tokenizer: PreTrainedTokenizerBase, generator: Generator) -> Iterator[str]:
    documents = read_documents(source)
    for index in torch.randperm(len(documents), generator=generator).tolist():
        yield _as_text(documents[index], source, tokenizer)


def _as_text(document: object, source: TextSource, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that the model reads of a document; `TextError` where it is neither text nor messages, as asked for."""
    if not source.chat:
        if not isinstance(document, str):
            raise TextError(f"{source.name!r} holds no plain text in {source.field!r}; chat messages need chat: true")
        return document
    messages = [{"role": "user", "content": document}] if isinstance(document, str) else document
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise TextError(f"{source.name!r} holds no messages with role and content in {source.field!r}, nor plain text")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, ValueError) as error:
        raise TextError(f"{source.name!r} asks for the tokenizer's chat template, which failed: {error}") from error


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and {"role", "content"} <= message.keys()


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # A chat template writes its special tokens itself, and windows from the middle of a text have none. Verbose
    # would warn that the text is longer than the model's context, which is why it is cut into windows.
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def _read_pydoc(split: str) -> list[str]:
    """The topics of Python's `help()`, as of the Python that runs; every fifth is held out."""
    from pydoc_data.topics import topics

    _check("split", split, ["train", "test"], "'pydoc'")
    return [topics[name] for index, name in enumerate(sorted(topics)) if (index % 5 == 4) == (split == "test")]


def _read_file(path: Path, field: str) -> list[object]:
    from pyarrow import parquet

    if not path.is_file():
        raise TextError(f"there is no file {path.absolute()}")
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            _check("field", field, parquet.read_schema(path).names, str(path.absolute()))
            return list(parquet.read_table(path, columns=[field])[field].to_pylist())
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # not readable, not parquet, or not UTF-8
        raise TextError(f"cannot read {path.absolute()}: {error}") from error
    if suffix == ".txt":
        return [text]
    if suffix == ".json":
        records = _only_list(_parse(text, path, 1), path)
    else:
        # Not splitlines, which would also cut at separators that JSON allows inside a string.
        records = [_parse(line, path, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    for number, record in enumerate(records, 1):
        if isinstance(record, dict):
            _check("field", field, list(record), f"{path.absolute()}, record {number}")
    return [record[field] if isinstance(record, dict) else record for record in records]


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise TextError(f"{path.absolute()}, line {line}: not JSON: {error.msg} at column {error.colno}") from error


def _only_list(content: Any, path: Path) -> list[Any]:
    """The records of a .json file: its list, or the only list in its object."""
    values = content.values() if isinstance(content, dict) else [content]
    lists = [value for value in values if isinstance(value, list)]
    if len(lists) != 1:
        raise TextError(f"{path.absolute()} must hold a list, or an object with one list; it has {len(lists)} lists")
    return lists[0]


def _check(kind: str, name: str, possible: list[str], place: str) -> None:
    if name not in possible:
        raise TextError(f"{place} has no {kind} {name!r}.{guess(name, possible)} It has: {', '.join(possible)}")


def _read_hub(source: TextSource) -> Sequence[object]:
    if source.name == "wikitext2":
        dataset = _load("Salesforce/wikitext", "wikitext-2-raw-v1", source.split)
    elif source.name == "c4":
        _check("split", source.split, list(_C4_FILES), "'c4'")
        # One file of many, whose size is not the one that the dataset's card promises.
        options = {"data_files": {source.split: _C4_FILES[source.split]}, "verification_mode": "no_checks"}
        dataset = _load("allenai/c4", None, source.split, **options)
    else:
        dataset = _load(source.name, source.subset, source.split)
    _check("field", source.field, dataset.column_names, f"the dataset {source.name!r}")
    column: Sequence[Any] = dataset[source.field]
    # The rows of wikitext are the lines of one text, and by custom its perplexity is that of the whole.
    return ["\n\n".join(column)] if source.name == "wikitext2" else column


@without_progress_bars()
def _load(name: str, subset: str | None, split: str, **options: Any) -> Any:
    """A hub dataset; without a connection from the local cache, where `datasets` alone would retry for long."""
    from datasets import config, load_dataset
    from datasets.exceptions import DatasetsError

    obstacle = _why_offline()
    was_offline = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = obstacle is not None
    try:
        return load_dataset(name, subset, split=split, **options)
    except ConnectionError as error:
        raise TextError(
            f"the dataset {name!r} is not in the local cache and the hub cannot be reached: {obstacle or error}. "
            "Use a local .txt, .jsonl, .json or .parquet file, or 'pydoc', which is always there"
        ) from error
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise TextError(f"the dataset {name!r} cannot be loaded: {error}") from error
    finally:
        config.HF_HUB_OFFLINE = was_offline


def _why_offline() -> str | None:
    """The obstacle between us and the hub, found in seconds; None when it answers.

    `datasets` has no such check of its own: it retries for minutes, and reads no `local_files_only`.
    """
    from datasets import config
    from huggingface_hub import constants, get_session

    if config.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:  # from any HTTP library that the hub client may use
        return f"{constants.ENDPOINT}: {error}"
    return None
