"""The process that fills in chat templates: messages come in and texts go out as lines of JSON."""

import json
import sys
from typing import Any, TextIO


def serve(questions: TextIO, answers: TextIO) -> None:
    """Answer the first line, which brings the template and limits, and every document's messages after it."""
    settings = json.loads(questions.readline())
    _limit_memory(settings["memory"])
    from transformers.utils.chat_template_utils import render_jinja_template

    template, special_tokens = settings["template"], settings["special_tokens"]
    _answer(answers, text="")
    for line in questions:
        # As `apply_chat_template` does: templates are written for messages without empty entries.
        messages = [{key: value for key, value in message.items() if value is not None} for message in json.loads(line)]
        try:
            texts, _ = render_jinja_template([messages], chat_template=template, **special_tokens)
        except MemoryError:
            _answer(answers, error="it takes more memory than it may")
        except Exception as error:  # from a program of strangers
            _answer(answers, error=f"{type(error).__name__}: {error}"[:1000])
        else:
            if len(texts[0]) > settings["letters"]:
                _answer(answers, error=f"it makes more than {settings['letters']:,} letters")
            else:
                _answer(answers, text=texts[0])


def _limit_memory(size: int | None) -> None:
    """Let the process take no more than `size` bytes of address space, where the system can limit it."""
    if size is None:
        return
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    except (ImportError, OSError, ValueError):
        return


def _answer(stream: TextIO, **content: Any) -> None:
    print(json.dumps(content), file=stream, flush=True)


if __name__ == "__main__":
    stream, sys.stdout = sys.stdout, sys.stderr  # nothing else may print between the answers
    serve(sys.stdin, stream)
