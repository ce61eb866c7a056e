"""Laws that hold or are broken, and the AssertionError that says by whom."""

from collections.abc import Generator
from contextlib import contextmanager

from dashq.curvature import Curvature
from dashq.strategies import KINDS, Strategy
from dashq.testing.comparison import shape_of


class BrokenLaw(Exception):
    """A law that does not hold, worded so that it follows "must"."""


def require(holds: bool, law: str) -> None:
    """Raise the law as a `BrokenLaw` where it does not hold."""
    if not holds:
        raise BrokenLaw(law)


@contextmanager
def naming(subject: type[Strategy] | Strategy | Curvature, example: object = None) -> Generator[None]:
    """Turn whatever goes wrong into an AssertionError that names the subject and the example."""
    try:
        yield
    except Exception as error:
        law = str(error) if isinstance(error, BrokenLaw) else f"run without {type(error).__name__}: {error}"
        place = "" if example is None else f". Example: {shape_of(example)}"
        raise AssertionError(f"{_title(subject)} must {law}{place}") from error


def _title(subject: type[Strategy] | Strategy | Curvature) -> str:
    if isinstance(subject, Curvature):
        return f"curvature {type(subject).__name__!r}"
    cls = subject if isinstance(subject, type) else type(subject)
    kind = next(kind for kind in KINDS.values() if issubclass(cls, kind)).__name__.lower()
    return f"{kind} {cls.name!r}"
