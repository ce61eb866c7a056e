"""The process that fills in chat templates: messages come in and texts go out as lines of JSON."""

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any


def serve(questions: Iterator[str], say: Callable[[str], None]) -> None:
    """Answer the first line, which brings the template and limits, and every document's messages after it."""
    settings = json.loads(next(questions))
    _limit_memory(settings["memory"])
    from transformers.utils.chat_template_utils import render_jinja_template

    template, special_tokens = settings["template"], settings["special_tokens"]
    _answer(say, text="")
    for line in questions:
        # As `apply_chat_template` does: templates are written for messages without empty entries.
        messages = [{key: value for key, value in message.items() if value is not None} for message in json.loads(line)]
        try:
            rendered: Any = render_jinja_template([messages], chat_template=template, **special_tokens)
            text = rendered[0][0]
        except MemoryError:
            _answer(say, error="it takes more memory than it may")
        except Exception as error:  # from a program of strangers
            _answer(say, error=f"{type(error).__name__}: {error}"[:1000])
        else:
            if len(text) > settings["letters"]:
                _answer(say, error=f"it makes more than {settings['letters']:,} letters")
            else:
                _answer(say, text=text)


def _limit_memory(size: int | None) -> None:
    """Let the process take no more than `size` bytes of address space, where the system can limit it."""
    if size is None:
        return
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    except (ImportError, OSError, ValueError):
        return


def _answer(say: Callable[[str], None], **content: str) -> None:
    say(json.dumps(content))


if __name__ == "__main__":
    stream, sys.stdout = sys.stdout, sys.stderr  # nothing else may print between the answers
    serve(sys.stdin, lambda line: print(line, file=stream, flush=True))
