"""Text sources: documents from local files, the Hugging Face hub, or the documentation inside Python."""

import os
import re
from pathlib import Path
from typing import Any

from dashq.calibration.documents import Documents, Listed, check_choice
from dashq.calibration.text_files import PACKED, READERS, read_file
from dashq.errors import TextError, cause
from dashq.model.progress_bars import without_progress_bars
from dashq.text_source import TextSource

_C4_FILES = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
_KNOWN = ("wikitext2", "c4")  # on the hub, under longer names
_HUB_NAME = re.compile(r"(\w[\w.-]{,95}/)?\w[\w.-]{,95}", re.ASCII)


def read_documents(source: TextSource) -> Documents:
    """All documents of a source, in its order: texts, or lists of chat messages with `role` and `content`.

    Documents of the hub and of large files are read from disk as they are asked for, so that their kind is not known
    here. Raises `TextError` when the source cannot be found or read, lacks the field, or is empty.
    """
    if source.name == "pydoc":
        documents = _read_pydoc(source.split)
    elif is_local(source):
        documents = _read_local(source)
    else:
        documents = _read_hub(source)
    if not any(documents):
        raise TextError(f"{source.name!r} holds no text")
    return documents


def is_local(source: TextSource) -> bool:
    """True where nothing is asked of the hub: for what exists on this machine, and for what looks like a file."""
    if source.name in _KNOWN:
        return False
    path = _path(source)
    if source.name == "pydoc" or path.suffix.lower() in {*READERS, *PACKED} or not _HUB_NAME.fullmatch(source.name):
        return True
    return os.path.exists(path)


def _path(source: TextSource) -> Path:
    try:
        return Path(source.name).expanduser()
    except RuntimeError as error:  # there is no such user
        raise TextError(f"{source.name!r}: {error}") from error


def _read_pydoc(split: str) -> Documents:
    """The topics of Python's `help()`, as of the Python that runs; every fifth is held out."""
    from pydoc_data.topics import topics

    check_choice("split", split, ["train", "test"], "'pydoc'")
    texts = [topics[name] for index, name in enumerate(sorted(topics)) if (index % 5 == 4) == (split == "test")]
    return Listed(texts, "'pydoc'", "topic")


def _read_local(source: TextSource) -> Documents:
    """A file, or a folder that `datasets` reads as a dataset."""
    path = _path(source)
    if not os.path.isdir(path):  # not the path's own, which raises where a name is too long
        return read_file(path, source.field)
    return _column(_load(str(path), source.subset, source.split, offline="it is a folder"), source)


def _read_hub(source: TextSource) -> Documents:
    if source.name == "wikitext2":
        dataset = _load("Salesforce/wikitext", "wikitext-2-raw-v1", source.split)
        # The rows of wikitext are the lines of one text, and by custom its perplexity is that of the whole.
        return Listed(["\n\n".join(_column(dataset, source))], "'wikitext2'")
    if source.name == "c4":
        check_choice("split", source.split, list(_C4_FILES), "'c4'")
        # One file of many, whose size is not the one that the dataset's card promises.
        options: dict[str, Any] = {
            "data_files": {source.split: _C4_FILES[source.split]},
            "verification_mode": "no_checks",
        }
        return _column(_load("allenai/c4", None, source.split, **options), source)
    return _column(_load(source.name, source.subset, source.split), source)


def _column(dataset: Any, source: TextSource) -> Documents:
    check_choice("field", source.field, dataset.column_names, f"the dataset {source.name!r}")
    return Listed(dataset[source.field], f"the dataset {source.name!r}", "row")


@without_progress_bars()
def _load(name: str, subset: str | None, split: str, offline: str | None = None, **options: Any) -> Any:
    """A dataset; without a connection from the local cache, where `datasets` alone would retry for long.

    `offline` is a reason to ask nothing of the hub.
    """
    from datasets import config, load_dataset
    from datasets.exceptions import DatasetsError

    obstacle = offline or _why_offline()
    was_offline = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = obstacle is not None
    try:
        return load_dataset(name, subset, split=split, **options)
    except ConnectionError as error:
        raise TextError(
            f"the dataset {name!r} is not in the local cache and the hub cannot be reached: {obstacle or error}. "
            f"Use a local file ({', '.join(READERS)}), or 'pydoc', which is always there"
        ) from error
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise TextError(f"the dataset {name!r} cannot be loaded: {cause(error)}") from error
    finally:
        config.HF_HUB_OFFLINE = was_offline


def _why_offline() -> str | None:
    """The obstacle between us and the hub, found in seconds; None when it answers.

    `datasets` has no such check of its own: it retries for minutes, and reads no `local_files_only`.
    """
    from datasets import config
    from huggingface_hub import constants, get_session

    if config.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:  # from any HTTP library that the hub client may use
        return f"{constants.ENDPOINT}: {cause(error)}"
    return None
