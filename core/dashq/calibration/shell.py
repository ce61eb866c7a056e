"""The model without its blocks: it embeds tokens, says how each block is called, and predicts from the last output."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from dashq.errors import CheckpointError
from dashq.model.decoder import Model


@dataclass(frozen=True, eq=False)
class Call:
    """The inputs that the model hands to a block besides the hidden states: masks, rotary tables and the like."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Shell:
    """All that lies outside the blocks, in memory. Blocks are called as the model's own forward pass calls them.

    At the first use the first block is read, and runs once.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._blocks = [model.network.get_submodule(name) for name in model.blocks]
        self._recorder = _Recorder(self._blocks[0])
        # A mixture whose configuration asks for its routers' logits would want those of blocks that are left out.
        asks = hasattr(model.network.config, "output_router_logits")
        self._options: dict[str, Any] = {"output_router_logits": False} if asks else {}

    def embed(
        self, tokens: Int[Tensor, "samples tokens"], replaced: Mapping[str, Float[Tensor, "..."]] | None = None
    ) -> tuple[Float[Tensor, "*copies samples tokens width"], list[Call]]:
        """The first block's input, and the other inputs of every block, with parameters `replaced` as in `predict`.

        Raises `CheckpointError` where blocks hand each other more than hidden states.
        """
        base = self._model.network.base_model
        prefix = "" if base is self._model.network else f"{self._model.network.base_model_prefix}."
        own = {  # of the base model: none of the head
            name.removeprefix(prefix): tensor for name, tensor in (replaced or {}).items() if name.startswith(prefix)
        }
        inputs = {"input_ids": tokens.to(self._model.device), "use_cache": False}
        with self._standing_in():
            functional_call(base, own, (), inputs)
        return self._recorder.take()

    def predict(
        self,
        tokens: Int[Tensor, "samples tokens"],
        hidden: Float[Tensor, "*copies samples tokens width"],
        replaced: Mapping[str, Float[Tensor, "..."]] | None = None,
    ) -> Float[Tensor, "samples tokens words"]:
        """The logits after the last block's output for these tokens, with some of the shell's parameters `replaced`."""

        def put(module: nn.Module, inputs: Any, output: Any) -> Any:
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = self._blocks[-1].register_forward_hook(put)
        inputs = {"input_ids": tokens.to(self._model.device), "use_cache": False, **self._options}
        try:
            with self._standing_in():
                logits: Tensor = functional_call(self._model.network, dict(replaced or {}), (), inputs).logits
        finally:
            handle.remove()
            self._recorder.clear()
        return logits

    @contextmanager
    def _standing_in(self) -> Generator[None]:
        """Let the recorder take the place of every block's forward; the first time it needs the first block."""
        if not self._recorder.is_ready:
            with self._model.block(0), _in_place_of(self._blocks, self._recorder):
                yield
        else:
            with _in_place_of(self._blocks, self._recorder):
                yield


@contextmanager
def shell_of(model: Model, head: bool = False) -> Generator[Shell]:
    """The model's shell, for the duration of the `with` statement; with the `head` it can predict as well."""
    with model.outside(head):
        yield Shell(model)


class _Recorder:
    """Stands in for every block's forward: notes how the block is called and passes its input on.

    The first block really runs once, to show whether this model's blocks return a tensor or a tuple, and of what.
    """

    def __init__(self, first: nn.Module) -> None:
        self._first = first
        self._output: Any = None
        self._hidden: list[Tensor] = []
        self._calls: list[Call] = []

    @property
    def is_ready(self) -> bool:
        """True once the first block has run."""
        return self._output is not None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        if self._output is None:
            self._output = type(self._first).forward(self._first, x, *args, **kwargs)
        more = self._output[1:] if isinstance(self._output, tuple) else ()
        others = [value for value in more if isinstance(value, Tensor)]
        # Other blocks return what the first one did: where that comes back as an input, it would be the wrong one.
        if any(argument is value for argument in (*args, *kwargs.values()) for value in others):
            raise CheckpointError(
                f"{type(self._first).__name__}: blocks that hand each other more than hidden states are not supported"
            )
        self._hidden.append(x)
        self._calls.append(Call(args, kwargs))
        return (x, *more) if isinstance(self._output, tuple) else x

    def take(self) -> tuple[Tensor, list[Call]]:
        """The first block's input and all calls of one forward pass; ready for the next one."""
        hidden, calls = self._hidden[0], self._calls
        self.clear()
        return hidden, calls

    def clear(self) -> None:
        """Forget what was noted."""
        self._hidden, self._calls = [], []


@contextmanager
def _in_place_of(blocks: Sequence[nn.Module], recorder: _Recorder) -> Generator[None]:
    try:
        for block in blocks:
            vars(block)["forward"] = recorder
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)
