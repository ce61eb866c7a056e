"""Files beside the weights that a result takes over from its model, byte by byte."""

import re
import shutil
from pathlib import Path

from dashq.model.location import LICENCE_WORDS, own_files

# Generation settings say where a chat model stops; they are never parsed, so that none can be lost or refused.
CARRIED = re.compile(
    r"generation_config\.json|.*processor_config\.json|tokenizer\.model"
    rf"|(?i:[^.]*({'|'.join(LICENCE_WORDS)})[^.]*(\.(md|txt|rst|pdf|html))?)"
)


def carry(source: Path, target: Path) -> None:
    """Copy generation settings, processors' settings, a sentencepiece model and licences from one folder to another.

    Only files are copied, and no links that lead out of the model's own files.
    """
    for path in own_files(source, "*"):
        if CARRIED.fullmatch(path.name):
            shutil.copyfile(path, target / path.name)
