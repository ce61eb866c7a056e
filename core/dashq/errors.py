"""The errors that a user can mend: each says what was asked, where, and what was possible."""

from collections.abc import Generator
from contextlib import contextmanager

LONGEST_CAUSE = 400  # letters of another program's message


class DashqError(Exception):
    """An error that the user can mend; the command line prints it without a traceback and exits with 2."""


class RecipeError(DashqError):
    """The recipe cannot be read, or asks for something that does not exist."""


class PlanError(DashqError):
    """The recipe does not fit the model."""


class CheckpointError(DashqError):
    """A checkpoint is missing, broken, or of a kind that cannot be read."""


class TextError(DashqError):
    """A text source cannot be reached, or does not hold enough text."""


class OutputError(DashqError):
    """The output folder cannot be used."""


class PluginError(DashqError):
    """A plugin is broken, or two plugins disagree."""


class MissingPackageError(DashqError):
    """A package that the command or the recipe needs is not installed."""


class UsageError(DashqError):
    """The command line, or the call, asks for something that does not exist or is not possible."""


class ProcessesError(DashqError):
    """The processes of a run do not find each other, do not do the same, or one of them is gone."""


@contextmanager
def refusing(refusal: str) -> Generator[None]:
    """Turn whatever is raised inside into a `CheckpointError`: the refusal, and the cause in one line.

    For calls of other packages, and of code that models bring, which fail in any way where their input is broken.
    Errors of dashq pass unchanged.
    """
    try:
        yield
    except DashqError:
        raise
    except Exception as error:
        raise CheckpointError(f"{refusal}: {cause(error)}") from error


def one_line(text: object) -> str:
    """A text, or the words of an exception, without line breaks."""
    return " ".join(str(text).split())


def cause(error: Exception) -> str:
    """An exception in one line, whatever it says; its kind is named where the words alone would not tell it."""
    words = one_line(error)
    if "trust_remote_code=True" in words:  # transformers' advice, which is none to users of recipes and commands
        return (
            "it brings code of its own, which runs only where you trust it: read that code, then say "
            "`trust_remote_code: true` in the recipe, or --trust-remote-code where a command takes no recipe"
        )
    words = words if len(words) <= LONGEST_CAUSE else f"{words[:LONGEST_CAUSE]} ..."
    if isinstance(error, OSError | ValueError | ImportError | DashqError) and words:
        return words
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
