"""Files beside the weights that a result takes over from its model, byte by byte."""

import re
import shutil
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dashq.errors import OutputError
from dashq.model.code import code_files
from dashq.model.location import LICENCE_WORDS, Location, own_files

# Generation settings say where a chat model stops. None of these files is parsed, so that nothing can be lost.
SIDE_FILES = re.compile(
    r"generation_config\.json|[^/]*processor_config\.json"
    r"|modules\.json|config_sentence_transformers\.json|sentence_\w+_config\.json"
    r"|\d+_\w+/(config\.json|model\.safetensors|pytorch_model\.bin)"  # layers behind the decoder, as a pooling
    rf"|(?i:(?![^/]+\.(py|json|safetensors|bin|pth?|gguf)$)[^/]*({'|'.join(LICENCE_WORDS)})[^/]*)"
    r"|(?i:licen[cs]es/[^/]+)"
)
TOKENIZER_FILES = re.compile(
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|tekken|chat_template)\.json"
    r"|[^/]*\.(tiktoken|spm|model(\.v\d+)?)|merges\.txt|vocab\.(txt|bpe)|chat_template\.jinja"
    r"|additional_chat_templates/[^/]+\.jinja"
)


def carry(source: Location, tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    """Copy what lies beside a model's weights to another folder: tokenizer, settings, licences and its own code.

    Only a `tokenizer` that was read from a GGUF file is written anew. Only files are copied, two folders deep, and no
    links that lead out of the model's own files. Raises an `OutputError` where the tokenizer cannot be written.
    """
    names = SIDE_FILES if source.gguf else re.compile(f"{SIDE_FILES.pattern}|{TOKENIZER_FILES.pattern}")
    own_names = () if source.gguf else type(tokenizer).vocab_files_names.values()
    if source.gguf:
        try:
            tokenizer.save_pretrained(target)
        except Exception as error:  # the library of tokenizers raises nothing more precise
            raise OutputError(f"cannot write the tokenizer to {target}: {error}") from error
    for path in (*own_files(source.folder, "*"), *own_files(source.folder, "*/*")):
        name = path.relative_to(source.folder).as_posix()
        if names.fullmatch(name) or name in own_names:
            _copy(path, target / name)
    for path in code_files(source):
        _copy(path, target / path.relative_to(source.folder))


def _copy(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)
