"""The documents of a text source, each with the words for its place, and long texts in pieces."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dashq.errors import TextError
from dashq.strict import guess

WHOLE = 12 * 2**20  # bytes or letters of a text that is tokenized at once; a longer one is taken in pieces
PIECE = 2**18  # bytes or letters of such a piece


class Documents(Sequence[Any]):
    """The documents of a source in its order, read when they are asked for: texts, or lists of chat messages.

    `separator` stands between two of them where the source is read as one text.
    """

    separator = "\n\n"

    @abstractmethod
    def __getitem__(self, index: Any) -> Any:
        """Document `index`, an int, of any kind; a `TextError` that names it where it cannot be read."""

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    @abstractmethod
    def place(self, index: int) -> str:
        """The place of a document in words, for messages."""


@dataclass(frozen=True)
class Listed(Documents):
    """Documents at hand in a sequence; `unit` is the word for one of them, as in `record`, and none for a lone one."""

    contents: Sequence[object]
    source: str
    unit: str = ""

    def __len__(self) -> int:
        return len(self.contents)

    def __getitem__(self, index: Any) -> Any:
        return self.contents[index]

    def place(self, index: int) -> str:
        return f"{self.source}, {self.unit} {index + 1}" if self.unit else self.source


def check_choice(kind: str, name: str, possible: list[str], place: str) -> None:
    """Raise a `TextError` where a place has no field, split, or other `kind` of that name."""
    if name not in possible:
        has = ", ".join(possible) or "none"
        raise TextError(f"{place} has no {kind} {name!r}.{guess(name, possible)} It has: {has}")


def in_pieces(text: str) -> Iterator[str]:
    """A long text in pieces of about `PIECE` letters that end with a line, where lines are not longer."""
    start = 0
    while start < len(text):
        newline = text.find("\n", start + PIECE - 1, start + 2 * PIECE)
        stop = newline + 1 if newline >= 0 else start + PIECE
        yield text[start:stop]
        start = stop


def joined(texts: Iterable[str], separator: str) -> Iterator[str]:
    """The texts as one: at once where it is short, else in pieces."""
    parts: list[str] = []
    size, limit = 0, WHOLE
    for number, text in enumerate(texts):
        parts.append(f"{separator}{text}" if number else text)
        size += len(parts[-1])
        if size > limit:
            pieces = list(in_pieces("".join(parts)))
            yield from pieces[:-1]
            parts, limit = pieces[-1:], 2 * PIECE
            size = len(parts[0])
    yield "".join(parts)
