"""The process that fills in chat templates: messages come in and texts go out as lines of JSON."""

import json
import sys
from collections.abc import Iterator


def serve(questions: Iterator[str]) -> Iterator[dict[str, str]]:
    """Answer the first line, which brings the template and limits, and every document's messages after it."""
    settings = json.loads(next(questions))
    _limit_memory(settings["memory"])
    from transformers.utils.chat_template_utils import render_jinja_template

    template, options = settings["template"], settings["options"]
    yield {"text": ""}
    for line in questions:
        # As `apply_chat_template` does: templates are written for messages without empty entries.
        messages = [{key: value for key, value in message.items() if value is not None} for message in json.loads(line)]
        try:
            text = render_jinja_template([messages], chat_template=template, **options)[0][0]
        except MemoryError:
            yield {"error": "it takes more memory than it may"}
        except Exception as error:  # from a program of strangers
            yield {"error": f"{type(error).__name__}: {error}"[:1000]}
        else:
            if len(text) > settings["letters"]:
                yield {"error": f"it makes more than {settings['letters']:,} letters"}
            else:
                yield {"text": text}


def _limit_memory(size: int | None) -> None:
    """Let the process take no more than `size` bytes of address space, where the system can limit it."""
    if size is None:
        return
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    except (ImportError, OSError, ValueError):
        return


if __name__ == "__main__":
    stream, sys.stdout = sys.stdout, sys.stderr  # nothing else may print between the answers
    for answer in serve(sys.stdin):
        print(json.dumps(answer), file=stream, flush=True)
