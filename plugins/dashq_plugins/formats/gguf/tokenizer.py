"""A tokenizer as a GGUF file holds it."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dashq import PlanError
from dashq.model.tokenizing import added_tokens

ENDS = ("bos", "eos")

if TYPE_CHECKING:
    import gguf
    import transformers


class Vocabulary:
    """A byte-pair encoding, of bytes or of characters with bytes to fall back on, as `tokenizer.json` describes it.

    `pre_tokenizer` is llama.cpp's name for how text is cut before it is merged; None: found from the tokenizer. `adds`
    has the tokens that the tokenizer puts before (`bos`) and behind (`eos`) every text, if it does.
    Raises a `PlanError` for a tokenizer that a GGUF file cannot hold.
    """

    def __init__(self, tokenizer: "transformers.PreTrainedTokenizerBase", pre_tokenizer: str | None) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise PlanError(f"a GGUF file needs a tokenizer with a tokenizer.json, not a {type(tokenizer).__name__}")
        self._content = json.loads(backend.to_str())
        self._model = self._content["model"]
        if self._model["type"] != "BPE":
            raise PlanError(f"cannot write a tokenizer of type {self._model['type']} to a GGUF file")
        self.adds = _added(tokenizer)
        self.by_character = bool(self._model.get("byte_fallback"))
        self.pre = "default" if self.by_character else pre_tokenizer or _pre_tokenizer(self._content)

    def add_to(self, writer: "gguf.GGUFWriter", folder: Path, size: int) -> None:
        """Write `size` tokens, with the special ones and the chat template that lie in the folder."""
        import gguf

        added = {token["id"]: token for token in self._content["added_tokens"]}
        texts = {number: text for text, number in self._model["vocab"].items()}
        texts |= {number: token["content"] for number, token in added.items()}
        names = [texts.get(number, f"[PAD{number}]") for number in range(size)]
        writer.add_tokenizer_model("llama" if self.by_character else "gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(names)
        writer.add_token_types([self._type(name, added.get(n), n in texts) for n, name in enumerate(names)])
        if self.by_character:
            writer.add_token_scores(self._scores(names))
            writer.add_add_space_prefix(_adds_space(self._content))
        logging.getLogger("gguf.vocab").addFilter(_matters)
        special = gguf.SpecialVocab(folder, load_merges=not self.by_character, n_vocab=size)
        special.special_token_ids |= self.adds
        special.add_special_token |= {kind: kind in self.adds for kind in ENDS}
        special.add_to_gguf(writer, quiet=True)

    def _type(self, text: str, added: Mapping[str, Any] | None, used: bool) -> "gguf.TokenType":
        import gguf

        if not used:
            return gguf.TokenType.UNUSED
        if self.by_character and len(text) == 6 and text.startswith("<0x"):
            return gguf.TokenType.BYTE
        if added:
            return gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        return gguf.TokenType.NORMAL

    def _scores(self, names: list[str]) -> list[float]:
        """llama.cpp merges what has the best score first: a token scores by the first merge that makes it."""
        ranks: dict[str, int] = {}
        for rank, merge in enumerate(self._model["merges"]):
            ranks.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), rank)
        return [-float(ranks[name]) if name in ranks else -1e9 for name in names]


def _matters(record: logging.LogRecord) -> bool:
    """False for what the package says of the tokens around texts and pairs, which it is told by `add_to`."""
    return "TemplateProcessing" not in record.getMessage()


def _added(tokenizer: "transformers.PreTrainedTokenizerBase") -> Mapping[str, int]:
    """The tokens around every text; a `PlanError` where they are others than llama.cpp can add."""
    before, behind = added_tokens(tokenizer)
    adds = {}
    for kind, tokens, possible in (("bos", before, tokenizer.bos_token_id), ("eos", behind, tokenizer.eos_token_id)):
        if tokens and tokens != [possible]:
            names = tokenizer.convert_ids_to_tokens(tokens)
            raise PlanError(f"llama.cpp adds no token but {kind} at this end of a text, and this tokenizer {names}")
        if tokens:
            adds[kind] = tokens[0]
    return adds


def _adds_space(content: Mapping[str, Any]) -> bool:
    """True where a text is tokenized as if it began with a space."""
    steps = _steps(content.get("normalizer"), "normalizers") + _steps(content.get("pre_tokenizer"), "pretokenizers")
    return any(
        step.get("type") == "Prepend" or (step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )


def _steps(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    return [] if part is None else list(part.get(key, [part]))


def _pre_tokenizer(content: Mapping[str, Any]) -> str:
    steps = _steps(content.get("pre_tokenizer"), "pretokenizers")
    kinds = [step.get("type") for step in steps]
    pattern = next((step["pattern"].get("Regex", "") for step in steps if step.get("type") == "Split"), "")
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"]:
        return "smollm"
    if "\\p{Lu}" in pattern:  # words end where a capital follows a small letter
        return "gpt-4o" if "(?i:" in pattern else "tekken"
    if "\\p{N}{1,3}" in pattern and "(?i:" in pattern:
        return "llama-bpe"
    if "|\\p{N}|" in pattern and "(?i:" in pattern:
        return "qwen35" if "[\\p{L}\\p{M}]+" in pattern else "qwen2"  # accents belong to the letters before them
    raise PlanError("llama.cpp's name for the tokenizer's pre-tokenizer is not known; give it as `pre_tokenizer`")
