"""Text sources become batches of tokens, drawn at random to calibrate on and in order to evaluate on."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dashq.calibration.chat import Render, chat_template, rendered
from dashq.calibration.documents import WHOLE, in_pieces, joined
from dashq.calibration.sources import read_documents
from dashq.errors import TextError
from dashq.model.capacity import check_length, check_tokens
from dashq.model.decoder import Model
from dashq.model.tokenizing import beginning_tokens
from dashq.recipe.recipe import Beginning, Calibration, Recipe
from dashq.strategies import Tuner
from dashq.strict import shown
from dashq.text_source import TextSource

_POOL = 4  # windows to choose from, for each one drawn
HELD_OUT_TOKENS = 1024  # that are drawn beside the samples, in whole pieces
TUNER_HELD_OUT_TOKENS = 2048  # the same beside a tuner's samples
RUN = 32  # tokens: as many in a row are hardly ever the same by chance


@dataclass(frozen=True, eq=False)
class Drawn:
    """Pieces of text: the samples to calibrate on, and those that are held out for a judgement, as far as there are.

    Each has `beginning` tokens that are no text, and begin every one.
    """

    samples: Int64[Tensor, "samples tokens"]
    held_out: Int64[Tensor, "pieces tokens"]
    beginning: int = 0


def draw_for(model: Model, calibration: Calibration) -> Drawn:
    """The pieces of `draw` for a model; a TextError also where it cannot take their tokens."""
    tokenizer = model.tokenizer
    drawn = draw(calibration, tokenizer)
    check_tokens(torch.cat([drawn.samples, drawn.held_out]), model.network.config, tokenizer)
    return drawn


def draw_to_tune(model: Model, recipe: Recipe, tuner: Tuner, avoided: Drawn) -> Drawn:
    """The pieces of text that a tuner learns from and is checked on: none has what calibration or judgement saw.

    They are drawn as those of the calibration are. Raises TextError where the text is too short, as `draw` does.
    """
    own = {"samples": tuner.samples, "sequence_length": tuner.sequence_length, "seed": tuner.seed}
    dataset = tuner.dataset or recipe.calibration.dataset
    text = recipe.calibration.model_copy(update={**own, "dataset": dataset})
    tokenizer = model.tokenizer
    check_length(tuner.sequence_length, model.network.config, "tuner.sequence_length")
    try:
        drawn = draw(text, tokenizer, TUNER_HELD_OUT_TOKENS, Avoided(avoided, tuner.sequence_length))
    except TextError as error:
        raise TextError(f"the tuner's text: {error}") from error
    if not len(drawn.held_out):
        raise TextError(
            f"the tuner's text has no piece of {tuner.sequence_length} tokens left to check on, besides the samples of "
            "calibration and tuner: lower tuner.samples or tuner.sequence_length, or add text"
        )
    check_tokens(torch.cat([drawn.samples, drawn.held_out]), model.network.config, tokenizer)
    return drawn


class Avoided:
    """Pieces of text that others may share no long run of tokens with."""

    def __init__(self, drawn: Drawn, tokens: int) -> None:
        """Those of a draw, for other pieces of so many tokens that begin alike."""
        rows = [row[drawn.beginning :] for row in (*drawn.samples.tolist(), *drawn.held_out.tolist())]
        self.tokens = sum(map(len, rows))
        self._run = min(RUN, tokens - drawn.beginning, *map(len, rows))
        # Their runs at every place: of another piece those at multiples of the length are looked up.
        self._runs = {hash(run) for row in rows for run in self._cut(row, step=1)}

    def has(self, piece: Sequence[int]) -> bool:
        """True where the piece shares a run of twice `RUN` tokens with one of them, or a shorter one at some places."""
        return any(hash(run) in self._runs for run in self._cut(piece, step=self._run))

    def _cut(self, row: Sequence[int], step: int) -> Iterator[tuple[int, ...]]:
        return (tuple(row[start : start + self._run]) for start in range(0, len(row) - self._run + 1, step))


def draw(
    calibration: Calibration,
    tokenizer: PreTrainedTokenizerBase,
    held_out_tokens: int | None = None,
    avoided: Avoided | None = None,
) -> Drawn:
    """Random pieces of text of `sequence_length` tokens, mixed from the sources by weight; the same for one seed.

    With packing, documents are joined end to end and cut into windows; without, each sample is the beginning of
    another document. No piece is drawn twice, and none that is `avoided`. Each begins with the tokens that `beginning`
    asks for, which count. The pieces that are held out are of the same kinds; a short text has fewer or none. Raises
    TextError when a source cannot be read or is too short for the samples.
    """
    generator = torch.Generator().manual_seed(calibration.seed)
    draw_pieces = _draw_windows if calibration.packing else _draw_beginnings
    beginning = beginning_tokens(tokenizer, calibration.beginning)
    length = _length_without(beginning, calibration.sequence_length)
    weights = [source.weight for source in calibration.dataset]
    shares = apportion(calibration.samples, weights)
    spares = apportion(max(1, (held_out_tokens or HELD_OUT_TOKENS) // calibration.sequence_length), weights)
    spares = [max(1, spare) for spare in spares] if avoided else spares
    pieces = [
        draw_pieces(_Text(source, tokenizer, beginning, avoided), share, spare, length, generator)
        for source, share, spare in zip(calibration.dataset, shares, spares, strict=True)
        if share
    ]
    samples = torch.cat([own[:share] for own, share in zip(pieces, filter(None, shares), strict=True)])
    held_out = torch.cat([own[share:] for own, share in zip(pieces, filter(None, shares), strict=True)])
    samples = samples[torch.randperm(calibration.samples, generator=generator)]
    return Drawn(_begun(samples, beginning), _begun(held_out, beginning), len(beginning))


def evaluation_windows(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    limit: int | None,
    beginning: Beginning = "auto",
) -> Int64[Tensor, "windows context"]:
    """The first `limit` windows (None: all) of a source's whole text, each `context` tokens long, in order.

    Each begins with the tokens that `beginning` asks for, which count. The incomplete rest is dropped. Raises TextError
    when the source cannot be read or is shorter than one window.
    """
    tokens = beginning_tokens(tokenizer, beginning)
    length = _length_without(tokens, context)
    stream: list[int] = []
    with closing(_Text(source, tokenizer, tokens).in_order()) as pieces:
        for piece in pieces:
            stream += piece
            if limit and len(stream) >= limit * length:
                break
    windows = len(stream) // length
    if windows == 0:
        raise TextError(f"{source.name!r} has only {len(stream)} tokens: lower context from {context}, or add text")
    rows = torch.tensor(stream[: windows * length], dtype=torch.int64).view(windows, length)[:limit]
    return _begun(rows, tokens)


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


def _length_without(beginning: Sequence[int], length: int) -> int:
    """The tokens of text in a sample that is `length` tokens long with those that it begins with."""
    if length <= len(beginning):
        raise TextError(f"no text fits into {length} tokens, the first {len(beginning)} of which begin every text")
    return length - len(beginning)


def _begun(rows: Int64[Tensor, "rows tokens"], beginning: Sequence[int]) -> Int64[Tensor, "rows longer"]:
    if not beginning:
        return rows
    return torch.cat([torch.tensor(beginning).expand(len(rows), -1), rows], 1)


class _Text:
    """The tokens of a source, document by document, each without the tokens that a sample begins with anyway."""

    def __init__(
        self,
        source: TextSource,
        tokenizer: PreTrainedTokenizerBase,
        beginning: Sequence[int],
        avoided: Avoided | None = None,
    ) -> None:
        self.source, self.tokenizer, self.beginning, self._avoided = source, tokenizer, list(beginning), avoided
        self.avoided_tokens = avoided.tokens if avoided else 0
        self._documents = read_documents(source)

    def may_have(self, piece: Sequence[int]) -> bool:
        """True for pieces that are not to be avoided."""
        return self._avoided is None or not self._avoided.has(piece)

    def shuffled(self, generator: torch.Generator) -> Generator[list[int]]:
        """Each document in random order; of a long one its pieces, which stand for documents, in random order."""
        with self._rendering() as render:
            for index in torch.randperm(len(self._documents), generator=generator).tolist():
                text = self._text(index, render)
                pieces = [text] if len(text) <= WHOLE else list(in_pieces(text))
                order = range(1) if len(pieces) == 1 else torch.randperm(len(pieces), generator=generator).tolist()
                for number in order:
                    yield self._encode(pieces[number])

    def in_order(self) -> Generator[list[int]]:
        """The whole source as one text: at once where it is short, else in pieces."""
        with self._rendering() as render:
            texts = (self._text(index, render) for index in range(len(self._documents)))
            for text in joined(texts, self._documents.separator):
                yield self._encode(text)

    def _rendering(self) -> Any:
        """The chat template at work, for a source that asks for it."""
        return chat_template(self.tokenizer) if self.source.chat else nullcontext()

    def _text(self, index: int, render: Render | None) -> str:
        """The text that the model reads of a document; `TextError` where it is neither text nor messages, as asked."""
        document, place = self._documents[index], self._documents.place(index)
        if render:
            text = rendered(document, render, place)
        elif isinstance(document, str):
            text = document
        else:
            hint = "; chat messages need chat: true" if isinstance(document, list) else ""
            raise TextError(f"{place} holds no text in {self.source.field!r} but {shown(document)}{hint}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TextError(f"{place} holds half of a surrogate pair, at letter {error.start + 1}") from error
        return text

    def _encode(self, text: str) -> list[int]:
        # A chat template writes its special tokens itself, and windows from the middle of a text have none. Verbose
        # would warn that the text is longer than the model's context, which is why it is cut into windows.
        tokens = list(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))
        size = len(self.beginning)
        return tokens[size:] if size and tokens[:size] == self.beginning else tokens


def _draw_windows(
    text: _Text, samples: int, spare: int, tokens: int, generator: torch.Generator
) -> Int64[Tensor, "pieces tokens"]:
    """The samples, and behind them as many of the `spare` further pieces as there are."""
    separator = [] if text.tokenizer.eos_token_id is None else [text.tokenizer.eos_token_id]
    stream: list[int] = []
    with closing(text.shuffled(generator)) as documents:
        for piece in documents:
            stream += [*separator, *piece] if stream and piece else piece
            # Of a huge source a random part is as good as the whole: documents come shuffled, and a pool a few times
            # the need keeps the windows drawn from it spread over many documents.
            # What is to be avoided may lie in front, where its own pool was.
            if len(stream) >= _POOL * (samples * tokens + text.avoided_tokens):
                break
    starts = range(0, len(stream) - tokens + 1, tokens)
    windows = [stream[start : start + tokens] for start in starts if text.may_have(stream[start : start + tokens])]
    if len(windows) < samples:
        has = f"{len(stream)} tokens, {len(windows)} windows of {tokens}"
        if len(windows) < len(starts):
            has += f" that calibration does not see, of {len(starts)}"
        fitting_tokens = len(stream) * len(windows) // len(starts) // samples if starts else 0
        raise _too_short(text, has, samples, fitting_samples=len(windows), fitting_tokens=fitting_tokens)
    chosen = torch.randperm(len(windows), generator=generator)[: samples + spare]
    return torch.tensor(windows, dtype=torch.int64)[chosen]


def _draw_beginnings(
    text: _Text, samples: int, spare: int, tokens: int, generator: torch.Generator
) -> Int64[Tensor, "pieces tokens"]:
    """As `_draw_windows`."""
    beginnings: list[list[int]] = []
    lengths: list[int] = []
    with closing(text.shuffled(generator)) as documents:
        for piece in documents:
            lengths.append(len(piece))
            if len(piece) >= tokens and text.may_have(piece[:tokens]):
                beginnings.append(piece[:tokens])
            if len(beginnings) == samples + spare:
                break
    if len(beginnings) >= samples:
        return torch.tensor(beginnings, dtype=torch.int64)
    has = f"{len(lengths)} documents, {len(beginnings)} of them with {tokens} tokens"
    fitting_tokens = sorted(lengths, reverse=True)[samples - 1] if samples <= len(lengths) else 0
    raise _too_short(text, has, samples, fitting_samples=len(beginnings), fitting_tokens=fitting_tokens)


def _too_short(text: _Text, has: str, samples: int, fitting_samples: int, fitting_tokens: int) -> TextError:
    fitting = {"samples": fitting_samples, "sequence_length": fitting_tokens and fitting_tokens + len(text.beginning)}
    ways = ", or ".join([*(f"lower {name} to {count}" for name, count in fitting.items() if count), "add text"])
    return TextError(f"{text.source.name!r} has {has}, but its share is {samples} samples: {ways}")
