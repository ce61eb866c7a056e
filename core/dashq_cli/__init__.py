"""The command line: `dashq init | run | plan | sweep | analyze | eval | chat | compare | report | tune | …`.

A package of its own, so that `dashq --help` answers at once: commands import torch and the rest when they are called.
The commands themselves are imported only when `main` is ready for an interruption.
"""

import sys

INTERRUPTED = 130  # the exit code of a command that Ctrl-C stops, as shells have it


def main() -> None:
    """Exit with 0 on success, 2 where the user can mend it, 1 on a failure of ours, 130 when it is stopped."""
    try:
        import atexit
        import gc
        import signal

        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
        from dashq_cli.imports import starting

        with starting():
            from dashq_cli.app import app

        atexit.register(gc.freeze)  # Python would look through every object of torch once more before it ends
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        from dashq_cli.failures import explain, is_interruption

        if is_interruption(error):
            sys.exit(INTERRUPTED)
        message = explain(error)
        if message is None:
            raise
        print(f"dashq: {message}", file=sys.stderr)
        sys.exit(2)
