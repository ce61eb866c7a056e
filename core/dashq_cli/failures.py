"""Exceptions that end a command, as the user reads them: one line for all that can be mended."""

import importlib.metadata
import os
import re
import sys
import traceback

TRACEBACK = "DASHQ_TRACEBACK"  # the environment variable that shows tracebacks as well
OWN_PACKAGE = "dashq"
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # names in broken files may hold commands for a terminal


def explain(error: Exception) -> str | None:
    """The line for the user: what an error of ours or the system says, or whose plugin failed; None for a bug.

    The traceback is printed before it where the environment asks for it.
    """
    errors = sys.modules.get("dashq.errors")  # not imported: then the error cannot be one of ours
    ours = errors is not None and isinstance(error, errors.DashqError)
    message = str(error) if ours else _of_a_plugin(error) or _of_the_system(error)
    if message is not None and os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    return message and CONTROLS.sub(lambda letter: f"\\x{ord(letter[0]):02x}", message)


def is_interruption(error: BaseException) -> bool:
    """True where an exception stands for Ctrl-C: transformers calls a module missing whose import is interrupted."""
    while not isinstance(error, KeyboardInterrupt):
        cause = error.__cause__ or error.__context__
        if cause is None:
            return False
        error = cause
    return True


def _of_the_system(error: Exception) -> str | None:
    """The file and the words of an error that the operating system reports, such as a full disk or a lost folder."""
    if not isinstance(error, OSError):
        return None
    words = error.strerror or " ".join(str(error).split())
    return f"{error.filename}: {words}" if error.filename is not None else words


def _of_a_plugin(error: Exception) -> str | None:
    """The plugin of another package that an exception came through, and the last place in its code."""
    plugins = {
        entry.module.split(".")[0]: entry
        for entry in importlib.metadata.entry_points(group="dashq")
        if entry.dist and entry.dist.name != OWN_PACKAGE
    }
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        module = str(frame.f_globals.get("__name__"))
        if entry := plugins.get(module.split(".")[0]):
            package = entry.dist.name if entry.dist else "?"
            text = " ".join(f"{type(error).__name__}: {error}".split())
            place = f"{frame.f_code.co_name} ({module}, line {line})"
            return (
                f"plugin {entry.name!r} from {package} fails in {place}: {text}. "
                f"{TRACEBACK}=1 shows all of it; to go on without it, set DASHQ_DISABLE_PLUGINS={entry.name}"
            )
    return None
