"""A conversation with a model: messages go in, and answers are printed while they are generated."""

from dataclasses import dataclass
from typing import Any

import torch
import typer
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TextStreamer

from dashq.errors import CheckpointError, TextError, cause
from dashq.measuring.evaluate import Loaded
from dashq.model.capacity import check_tokens, positions_of


@dataclass(frozen=True)
class Drawing:
    """The way to draw an answer: its most `tokens`, and the temperature; None is what the model's own settings say."""

    tokens: int
    temperature: float | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments for transformers' `generate`."""
        if self.temperature is None:
            return {}
        if self.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": True, "temperature": self.temperature}


class _Printed(TextStreamer):
    """Prints an answer word by word, and keeps it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print the next words at once."""
        self.text += text
        typer.echo(text, nl=stream_end)


class Conversation:
    """Messages to a model and its answers so far; a model without a chat template goes on with each message alone."""

    def __init__(self, loaded: Loaded, drawing: Drawing, system: str | None = None) -> None:
        """`system` is what the model is told before the first message; a `TextError` where it has no template."""
        self._loaded, self._drawing = loaded, drawing
        self.has_template = bool(loaded.tokenizer.chat_template)
        if system is not None and not self.has_template:
            raise TextError("--system needs a chat template, which this model does not have")
        self._system = [{"role": "system", "content": system}] if system is not None else []
        self._messages: list[dict[str, str]] = []

    @torch.inference_mode()
    def answer(self, message: str) -> None:
        """Print the model's answer; Ctrl-C stops it, and what is said until then counts.

        Raises `TextError` where the message is too long, or not what the template or the embeddings take;
        `CheckpointError` where transformers cannot let the model generate.
        """
        network, tokenizer = self._loaded.network, self._loaded.tokenizer
        ids = self._ids(message)
        check_tokens(ids, network.config, tokenizer)
        positions = positions_of(network.config)
        room = self._drawing.tokens if positions is None else min(self._drawing.tokens, positions - ids.shape[1])
        printed: Any = _Printed(tokenizer)  # methods of transformers' streamers are not annotated
        ids = ids.to(network.device)
        padding = network.generation_config.pad_token_id
        padding = tokenizer.eos_token_id if padding is None else padding
        try:
            network.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                streamer=printed,
                max_new_tokens=room,
                pad_token_id=padding,
                **self._drawing.settings,
            )
        except KeyboardInterrupt:
            printed.end()
        except ValueError as error:  # transformers' caches do not serve every model, quantized or not
            raise CheckpointError(f"{self._loaded.name} cannot generate: {cause(error)}") from error
        self._messages += [{"role": "user", "content": message}, {"role": "assistant", "content": printed.text}]

    def _ids(self, message: str) -> Int64[Tensor, "1 tokens"]:
        """The tokens to go on from; the oldest messages are forgotten where they leave no room for an answer."""
        positions = positions_of(self._loaded.network.config)
        while True:
            ids = self._encoded(message)
            if positions is None or ids.shape[1] < positions:
                return ids
            if not (self._messages and self.has_template):
                raise TextError(f"{ids.shape[1]} tokens leave no room for an answer in the model's {positions}")
            del self._messages[:2]

    def _encoded(self, message: str) -> Int64[Tensor, "1 tokens"]:
        tokenizer = self._loaded.tokenizer
        if not self.has_template:
            return torch.tensor([tokenizer.encode(message)], dtype=torch.int64)
        messages = [*self._system, *self._messages, {"role": "user", "content": message}]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # whatever a template can fail with: it is the model's own program
            raise TextError(f"the chat template fails: {cause(error)}") from error
        return torch.tensor([tokenizer.encode(str(text), add_special_tokens=False)], dtype=torch.int64)
