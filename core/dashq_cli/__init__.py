"""The command line: `dashq run | plan | analyze | eval | convert | verify | formats | plugins`.

A package of its own, so that `dashq --help` answers at once: commands import torch and the rest when they are called.
The commands themselves are imported only when `main` is ready for an interruption.
"""

import sys


def main() -> None:
    """Exit with 0 on success, 2 where the user can mend it, 1 on a failure of ours, 130 when it is stopped."""
    try:
        import atexit
        import gc
        import signal

        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
        from dashq_cli.app import app

        atexit.register(gc.freeze)  # Python would look through every object of torch once more before it ends
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        sentence = _for_the_user(error)
        if sentence is None:
            raise
        print(f"dashq: {sentence}", file=sys.stderr)
        sys.exit(2)


def _for_the_user(error: Exception) -> str | None:
    """The message of an error that the user can mend; None where it is a failure of ours."""
    errors = sys.modules.get("dashq.errors")  # not imported: then the error cannot be one of ours
    if errors is not None and isinstance(error, errors.DashqError):
        return str(error)
    if isinstance(error, OSError):  # a full disk, a folder that is gone, a missing permission
        words = error.strerror or " ".join(str(error).split())
        return f"{error.filename}: {words}" if error.filename is not None else words
    return None
