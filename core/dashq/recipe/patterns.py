"""Regular expressions of a recipe, tried within a limit of time before they are used."""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence

from dashq.errors import RecipeError

SECONDS = 5.0  # for one expression and all names of layers
_PROGRAM = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    print(flush=True)
    for name in names:
        re.fullmatch(pattern, name)
"""


def check_patterns(patterns: Sequence[str], names: Iterable[str]) -> None:
    """Raise a `RecipeError` where an expression takes longer than `SECONDS` for these names: it may take for ever.

    A process of its own tries them, since nothing can stop an expression inside this one.
    """
    if not patterns:
        return
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PROGRAM],
            input=json.dumps([patterns, list(names)]).encode(),
            stdout=subprocess.PIPE,
            timeout=SECONDS * len(patterns),
            check=True,
        )
    except subprocess.TimeoutExpired as error:
        slow = patterns[len((error.stdout or b"\n").splitlines()) - 1]
        raise RecipeError(
            f"the regular expression {slow!r} takes more than {SECONDS:g} seconds for the names of the layers: "
            "write it without repetitions in one another, or side by side, that can match the same letters"
        ) from error


def compiled(pattern: str) -> re.Pattern[str]:
    """The expression; a `ValueError` where it is none."""
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{pattern[:80]!r} is no regular expression: {error}") from error
