"""Text sources for tests: files of a few documents."""

import json
from pathlib import Path
from typing import Any

from dashq.text_source import TextSource

CHAT = [{"role": "user", "content": "Why?"}, {"role": "pico", "content": "Because."}]


def source_of(folder: Path, *documents: object, **fields: Any) -> TextSource:
    """The documents as a .jsonl file."""
    path = folder / f"{len(list(folder.iterdir()))}.jsonl"
    path.write_text("\n".join(json.dumps({"text": document}) for document in documents), encoding="utf-8")
    return TextSource(name=str(path), **fields)
