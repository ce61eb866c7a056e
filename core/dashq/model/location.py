"""The location of a model: a local folder, a GGUF file, or a name on the Hugging Face hub."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dashq.data import Contents
from dashq.errors import CheckpointError, cause
from dashq.model.progress_bars import without_progress_bars
from dashq.model.source import WEIGHTS, WEIGHTS_INDEX, indexed_names

# In the names of licence files, large or small.
LICENCE_WORDS = ("license", "licence", "copying", "copyright", "notice", "use_policy")
LICENCES = ["".join(["*", *(f"[{letter}{letter.upper()}]" for letter in word), "*"]) for word in LICENCE_WORDS]
TOKENIZERS = ["*.model", "*.model.v*", "*.tiktoken", "*.spm", "*.bpe", "*.jinja", "*.txt"]
CARD = "README.md"  # says under which licence
SIDE_FILES = ["*.json", "*.py", CARD, *TOKENIZERS, *LICENCES]


@dataclass(frozen=True)
class Location:
    """A folder of weights, and the GGUF file in it if the weights are there.

    `repository` is the model's name on the hub where it was found there.
    """

    folder: Path
    gguf: str | None = None
    trust_remote_code: bool = False
    repository: str | None = None

    @classmethod
    def of(cls, contents: Contents) -> "Location":
        """The folder of a finished model."""
        return cls(contents.folder, trust_remote_code=contents.trust_remote_code)

    def __str__(self) -> str:
        return str(self.file or self.folder)

    @property
    def file(self) -> Path | None:
        """The one file that all is in; None for a folder."""
        return self.folder / self.gguf if self.gguf else None

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for the `from_pretrained` of a configuration, tokenizer or model; nothing is downloaded."""
        gguf = {"gguf_file": self.gguf} if self.gguf else {}
        return {
            "pretrained_model_name_or_path": str(self.folder),
            "trust_remote_code": self.trust_remote_code,
            "local_files_only": True,
            **gguf,
        }


def own_files(folder: Path, pattern: str) -> list[Path]:
    """The files of a model's folder whose names match; a link counts only where it leads to another of its files.

    A snapshot in the hub's cache holds links to files beside it, which are its own.
    """
    whole = folder.resolve()
    if whole.parent.name == "snapshots" and (whole.parents[1] / "blobs").is_dir():
        whole = whole.parents[1]
    return [path for path in sorted(folder.glob(pattern)) if path.is_file() and path.resolve().is_relative_to(whole)]


@without_progress_bars()
def locate(model: str, trust_remote_code: bool = False, download: bool = True) -> Location:
    """Find the model's files, downloading them from the hub where `model` is no local path.

    Without `download`, a name on the hub is looked for in its cache alone. Raises `CheckpointError` where there are no
    files.
    """
    try:
        path = Path(model).expanduser()
    except RuntimeError as error:  # there is no such user
        raise CheckpointError(f"no such model folder: {model}: {error}") from error
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CheckpointError(f"no such model file: {path.absolute()}")
        return Location(path.absolute().parent, path.name, trust_remote_code)
    if path.is_dir():
        return Location(path, None, trust_remote_code)
    if path.exists():
        raise CheckpointError(f"{path.absolute()} is a file: a model is a folder, a .gguf file, or a name on the hub")
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise CheckpointError(f"no such model folder: {path.absolute()}")
    from huggingface_hub import snapshot_download

    try:
        fetch = partial(snapshot_download, model, local_files_only=not download)
        folder = Path(fetch(allow_patterns=[WEIGHTS, *SIDE_FILES]))
        # Of several sets of weights in a repository, those that transformers would open.
        if not (folder / WEIGHTS).exists() and (folder / WEIGHTS_INDEX).exists():
            fetch(revision=folder.name, allow_patterns=indexed_names(folder / WEIGHTS_INDEX))
    except Exception as error:  # of the hub's package, or of the network under it
        raise CheckpointError(
            f"model {model!r} is neither a local folder ({path.absolute()}) nor to be had from the "
            f"Hugging Face hub: {cause(error)}"
        ) from error
    return Location(folder, None, trust_remote_code, model)
