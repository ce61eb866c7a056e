"""One prompt as the original model and its result continue it, where the whole model is small enough for that."""

from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from transformers import PreTrainedModel

from dashq.data import StoredLayer
from dashq.errors import DashqError
from dashq.measuring.evaluate import Loaded, check_prompt, continue_text
from dashq.model.decoder import Model, block_matrices
from dashq.model.mixtures import Matrix
from dashq.model.transformers_internals import tied_weights
from dashq.processes.group import here
from dashq.results.judged import Continuation
from dashq.strategies import Serializer
from dashq.tuning.planned import norm_gains

PROMPT = "Once upon a time there was"
# Bytes of a whole model, as it computes, that a run opens: about what it needs beside one block of such a model anyway.
LARGEST = 2e9


def whole_bytes(model: Model) -> int:
    """Bytes of all weights in the type that the model computes in, and in that of the files where it is another."""
    tied = tied_weights(model.network)
    parameters = [parameter for name, parameter in model.network.named_parameters() if name not in tied]
    types = [{parameter.dtype, model.dtype} for parameter in parameters]
    return sum(
        parameter.numel() * sum(dtype.itemsize for dtype in own)
        for parameter, own in zip(parameters, types, strict=True)
    )


@torch.no_grad()
def continuation(
    model: Model, serializer: Serializer, layers: Mapping[str, StoredLayer], tensors: Mapping[str, Any]
) -> Continuation | None:
    """The most likely words of both models behind `PROMPT`; `tensors` are those of the result, read with `[...]`.

    The original's weights are read whole, then those of the result take their place. Among several processes the last
    one lets the original speak, while the first, which alone needs the result, does so with that; the others say
    nothing. None in all but the first, and where the model is larger than `LARGEST` bytes, or cannot generate text.
    """
    original_by, original, quantized = here().count - 1, None, None
    if whole_bytes(model) > LARGEST:
        return None
    if here().rank in (0, original_by):
        with suppress(DashqError):  # a judgement has its figures without a sentence
            check_prompt(model.network.config, model.tokenizer, PROMPT)
            with _whole(model) as network:
                loaded = Loaded(str(model.location), network, model.tokenizer, model.location)
                if here().rank == original_by:
                    original = continue_text(loaded, PROMPT).text
                if here().is_first:
                    _put(network, model, serializer, layers, tensors)
                    quantized = continue_text(loaded, PROMPT).text
    original = here().of(original_by, original)
    return None if original is None or quantized is None else Continuation(PROMPT, original, quantized)


@contextmanager
def _whole(model: Model) -> Generator[PreTrainedModel]:
    """The original network with all its weights in memory, for the duration of the `with` statement."""
    with model.outside(head=True), ExitStack() as blocks:
        for index in range(len(model.blocks)):
            blocks.enter_context(model.block(index))
        yield model.network


def _put(
    network: PreTrainedModel,
    model: Model,
    serializer: Serializer,
    layers: Mapping[str, StoredLayer],
    tensors: Mapping[str, Any],
) -> None:
    """Let the network compute with the result's weights, and with the gains of norms that a tuner may have changed."""
    matrices = dict(block_matrices(network))
    for name, stored in layers.items():
        if stored.layer.role != "linear":
            matrices[name] = Matrix(f"{name}.weight", transposed=False)
    for name, stored in layers.items():
        packed = {key: tensors[f"{name}.{key}"][...] for key in serializer.pack(stored.empty())}
        quantized = serializer.unpack(packed, stored.layer.columns, stored.size, stored.grid)
        matrix = matrices[name]
        matrix.of(network.get_parameter(matrix.parameter).data).copy_(quantized.dequantize())
    for name in norm_gains(model):
        if name in tensors:
            network.get_parameter(name).data.copy_(tensors[name][...])
