"""The matrices outside of a model's blocks: embeddings, the head, or one that is both."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from dashq.data import Layer, Role
from dashq.model.transformers_internals import tied_weights


def outside_layers(network: PreTrainedModel) -> tuple[Layer, ...]:
    """Embeddings and head as layers, one `tied` layer where they are one matrix, and embeddings of all blocks.

    Only plain matrices are among them, none that shares its values with anything but the other of the two.
    """
    names = {module: name for name, module in network.named_modules()}
    embeddings, head = network.get_input_embeddings(), network.get_output_embeddings()
    per_layer = _per_layer_embeddings(network)
    tied = tied_weights(network)
    layers = []
    if isinstance(embeddings, nn.Embedding) and (name := names[embeddings]) + ".weight" not in tied:
        sharing = [other for other, source in tied.items() if source == f"{name}.weight"]
        if not sharing:
            layers.append(_layer(name, embeddings, "embeddings"))
        elif isinstance(head, nn.Linear) and sharing == [f"{names[head]}.weight"]:
            layers.append(_layer(name, embeddings, "tied"))
    if isinstance(embeddings, nn.Embedding) and per_layer and per_layer.num_embeddings == embeddings.num_embeddings:
        layers.append(_layer(names[per_layer], per_layer, "per_layer"))
    if isinstance(head, nn.Linear) and not {f"{names[head]}.weight"} & {*tied, *tied.values()}:
        layers.append(_layer(names[head], head, "head"))
    return tuple(layers)


def parameter_count(network: PreTrainedModel) -> int:
    """The number of the network's parameters; those that are tied count once."""
    tied = tied_weights(network)
    return sum(parameter.numel() for name, parameter in network.named_parameters() if name not in tied)


def _per_layer_embeddings(network: PreTrainedModel) -> nn.Embedding | None:
    """The embeddings that every block is given a part of; None where a model has none."""
    get: Any = getattr(network, "get_per_layer_input_embeddings", None)
    try:
        module = get() if get else None
    except AttributeError:  # of a family that may have them, in a model that has not
        return None
    return module if isinstance(module, nn.Embedding) else None


def _layer(name: str, module: nn.Embedding | nn.Linear, role: Role) -> Layer:
    rows, columns = module.weight.shape
    return Layer(name=name, rows=rows, columns=columns, role=role)
