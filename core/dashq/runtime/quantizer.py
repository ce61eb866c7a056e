"""Let transformers open our checkpoints: `AutoModelForCausalLM.from_pretrained` after `import dashq`."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import PositiveInt, TypeAdapter, ValidationError
from torch import nn
from transformers import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from dashq.data import Layer, StoredLayer
from dashq.device import type_name
from dashq.errors import CheckpointError, PlanError
from dashq.model.mixtures import orientation
from dashq.model.source import Header, read_tensors
from dashq.registry import Registry, installed_registry
from dashq.runtime.embedding import DashqEmbedding, DashqTiedHead
from dashq.runtime.experts import DashqExperts
from dashq.runtime.kernel_choice import AUTO, check_kernels
from dashq.runtime.kernel_use import use_kernels
from dashq.runtime.linear import DashqLinear
from dashq.runtime.packed import PackedMatrix
from dashq.strategies import Serializer
from dashq.strict import Strict, first_mistake, guess

if TYPE_CHECKING:
    import transformers

QUANT_METHOD = "dashq"
FORMAT_VERSION = 1
PLACE = "quantization_config in config.json"
# The entry of config.json in which transformers looks for the name of the weights' file. In our results it holds a
# sentence for those who do not import dashq; see `format_settings`.
WEIGHTS_ENTRY = "transformers_weights"


class LayerEntry(Strict):
    """The entry of one layer in `quantization_config.layers`: bits and type of codes, size and order of groups."""

    bits: PositiveInt
    size: PositiveInt
    ordered: bool = False
    type: str | None = None


ENTRIES = TypeAdapter(dict[str, LayerEntry])


class DashqConfig(QuantizationConfigMixin):
    """The `quantization_config` in a result's config.json.

    `serializer` is the recipe's entry, or the serializer itself where it has been looked up before; `layers` gives bits
    and group size of each quantized layer by name. With `dequantize=True` the model is opened with plain weights, else
    `kernels` multiply: `auto`, `exact` or one by name. Raises `CheckpointError` for another `version` than this one's.
    """

    def __init__(
        self,
        serializer: Serializer | dict[str, Any] | None = None,
        layers: dict[str, dict[str, Any]] | None = None,
        version: int | None = None,
        dequantize: bool = False,
        kernels: str = AUTO,
        **kwargs: Any,
    ) -> None:
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{PLACE}: this checkpoint has format version {version}; this dashq reads version {FORMAT_VERSION}"
            )
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # transformers' own annotation is closed
        self.serializer, self.layers, self.version, self.dequantize = serializer, layers, version, dequantize
        self.kernels = kernels

    def to_dict(self) -> dict[str, Any]:
        """The fields as config.json holds them."""
        fields = super().to_dict()
        fields.pop("kernels")  # says how a model is opened, and nothing of its files
        if isinstance(self.serializer, Serializer):
            fields["serializer"] = self.serializer.model_dump(mode="json")
        return fields

    def entries(self) -> dict[str, LayerEntry]:
        """The quantized layers by name; a `CheckpointError` where an entry is not as dashq writes it."""
        try:
            return ENTRIES.validate_python(self.layers)
        except ValidationError as error:
            raise CheckpointError(f"{PLACE}: layers: {first_mistake(error)}") from error


def build_serializer(entry: object, registry: Registry | None = None, place: str = PLACE) -> Serializer:
    """The serializer that an entry, an object with its `name` and parameters, or a serializer already, stands for.

    Without a registry it is one of the installed plugins; `place` says where the entry stands. Raises
    `CheckpointError` for anything else, and where the registry has none of that name.
    """
    if isinstance(entry, Serializer):
        return entry
    installed = (registry or installed_registry()).serializers
    if not isinstance(entry, dict) or "name" not in entry:
        raise CheckpointError(f"{place}: `serializer` must be an object with a `name`, not {entry!r}")
    fields = {key: value for key, value in entry.items() if key != "name"}
    if entry["name"] not in installed:
        raise CheckpointError(
            f"{place}: this checkpoint was packed by the serializer {entry['name']!r}, which is not installed."
            f"{guess(str(entry['name']), list(installed))} Installed: {', '.join(installed)}"
        )
    try:
        return installed[entry["name"]].model_validate(fields)
    except ValidationError as error:
        raise CheckpointError(f"{place}: serializer: {first_mistake(error)}") from error


class DashqQuantizer(HfQuantizer):
    """Puts a `DashqLinear` in the place of every quantized layer before the weights are read.

    transformers builds it and hands it no registry, so that only serializers of installed plugins are known.
    """

    @property
    def config(self) -> DashqConfig:
        """The checkpoint's own `quantization_config`."""
        assert isinstance(self.quantization_config, DashqConfig)  # transformers picked us by its `quant_method`
        return self.quantization_config

    def update_attn_implementation(self, config: "transformers.PretrainedConfig") -> "transformers.PretrainedConfig":
        """The configuration with the weights' files under their usual names again.

        transformers calls this before it looks for weights.
        """
        setattr(config, WEIGHTS_ENTRY, None)
        return config

    def _process_model_before_weight_loading(
        self, model: "transformers.PreTrainedModel", checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        serializer = build_serializer(self.config.serializer)
        check_kernels(self.config.kernels)  # refused before weights are read
        # A model opened without its head, as by `AutoModel`, has names without the prefix that they have with it.
        prefix = f"{model.base_model_prefix}." if model.base_model is model else ""
        entries = self.config.entries()
        if any(name.startswith(prefix) for name in entries):  # then what has no prefix is the head
            entries = {name.removeprefix(prefix): entry for name, entry in entries.items() if name.startswith(prefix)}
        stacks: dict[str, set[str]] = defaultdict(set)
        stacked = {name for name, parameter in model.named_parameters() if parameter.dim() == 3}
        for name, entry in entries.items():
            owner, _, last = name.rpartition(".")
            if last.isdecimal() and owner in stacked:
                experts, _, stack = owner.rpartition(".")
                stacks[experts].add(stack)
            else:
                model.set_submodule(name, _packed_module(model, name, entry, serializer))
                _tie_head(model, name)
        for name, names in stacks.items():
            model.set_submodule(name, _packed_experts(name, model.get_submodule(name), names, entries, serializer))
        if checkpoint_files:
            headers = {
                key.removeprefix(prefix): tensor.header
                for file in checkpoint_files
                for key, tensor in read_tensors(Path(file)).items()
            }
            _check_files(model, headers)

    def _process_model_after_weight_loading(
        self, model: "transformers.PreTrainedModel", **kwargs: Any
    ) -> "transformers.PreTrainedModel":
        from dashq.model.transformers_internals import initialize  # as in `_packed_module`

        for module in model.modules():
            if isinstance(module, DashqEmbedding):
                module.set_constants(partial(initialize, model=model))
        if self.config.dequantize:
            return self._dequantize(model)
        use_kernels(model, self.config.kernels)
        return model

    def _dequantize(
        self, model: "transformers.PreTrainedModel", dtype: torch.dtype | str | None = None
    ) -> "transformers.PreTrainedModel":
        # A model's configuration holds the type's name once it has been saved.
        computed: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
        # Experts first: their layers go with them.
        for kind in (DashqExperts, DashqLinear, DashqEmbedding):
            for name, module in [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]:
                model.set_submodule(name, module.dequantized(computed))
        from dashq.model.transformers_internals import tie_again  # as in `_packed_module`

        tie_again(model)
        return model

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride] - untyped there
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore - untyped there
        return False


def _packed_module(
    model: "transformers.PreTrainedModel", name: str, entry: LayerEntry, serializer: Serializer
) -> PackedMatrix:
    """The layer that takes the place of the model's own of that name, as yet without values."""
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        near = guess(name, [known for known, _ in model.named_modules()])
        raise CheckpointError(f"{PLACE}: the model has no layer {name!r}.{near}") from error
    if isinstance(module, nn.Embedding):
        return DashqEmbedding(module, serializer, _stored(name, module.weight.shape, entry, serializer))
    if not isinstance(module, nn.Linear | Conv1D):
        raise CheckpointError(f"{PLACE}: {name} is a {type(module).__name__}, not a linear layer that can be unpacked")
    from dashq.model.decoder import linear_weight  # needs models, which may be half imported when this module is

    shape = linear_weight(module, module.weight).shape
    return DashqLinear(serializer, _stored(name, shape, entry, serializer), bias=module.bias is not None)


def _tie_head(model: "transformers.PreTrainedModel", name: str) -> None:
    """Let the modules whose weights are tied to those of the packed embeddings of that name compute with them."""
    from dashq.model.transformers_internals import tied_weights, untie  # as in `_packed_module`

    embedding = model.get_submodule(name)
    if isinstance(embedding, DashqEmbedding):
        for tied in [tied for tied, other in tied_weights(model).items() if other == f"{name}.weight"]:
            head = tied.removesuffix(".weight")
            bias = getattr(model.get_submodule(head), "bias", None) is not None
            model.set_submodule(head, DashqTiedHead(embedding, bias))
            untie(model, tied)


def _stored(name: str, shape: Sequence[int], entry: LayerEntry, serializer: Serializer) -> StoredLayer:
    """The form of a layer of this shape in the files; a `CheckpointError` where the format holds no such layer."""
    rows, columns = shape
    try:
        layer = Layer(name=name, rows=rows, columns=columns)
        grid = serializer.grid_of(entry.bits, entry.type)
        stored = StoredLayer(layer=layer, grid=grid, size=entry.size, ordered=entry.ordered)
        serializer.pack(stored.empty())
    except PlanError as error:
        raise CheckpointError(f"{PLACE}: {name}: {error}") from error
    return stored


def _packed_experts(
    name: str, experts: nn.Module, stacks: set[str], entries: Mapping[str, LayerEntry], serializer: Serializer
) -> DashqExperts:
    """The module in the place of a mixture's experts; in `stacks`, experts without an entry become plain layers."""
    transposed = orientation(experts)
    if transposed is None:
        raise CheckpointError(f"{PLACE}: {name} is a {type(experts).__name__}, whose stacks are not understood")
    layers: dict[str, list[nn.Module]] = defaultdict(list)
    for stack in sorted(stacks):
        weights = experts.get_parameter(stack)
        rows, columns = (weights.mT if transposed else weights).shape[1:]
        for expert in range(len(weights)):
            layer = f"{name}.{stack}.{expert}"
            if layer in entries:
                stored = _stored(layer, (rows, columns), entries[layer], serializer)
                module: nn.Module = DashqLinear(serializer, stored, bias=False)
            else:
                module = nn.Linear(columns, rows, bias=False, dtype=weights.dtype, device=weights.device)
            layers[stack].append(module)
    return DashqExperts(experts, transposed, layers)


def _check_files(model: "transformers.PreTrainedModel", headers: Mapping[str, Header]) -> None:
    """Refuse files that the configuration does not fit: transformers would go on, with weights made up at random."""
    packed = [(name, module) for name, module in model.named_modules() if isinstance(module, PackedMatrix)]
    for name, layer in packed:
        if isinstance(layer, DashqTiedHead):
            continue
        for key, tensor in ((f"{name}.{key}", tensor) for key, tensor in layer.packed().items()):
            header = headers.get(key)
            if header is None:
                raise CheckpointError(f"{PLACE} says that {name} is quantized, but the files hold no {key}")
            if header.shape != tuple(tensor.shape) or header.dtype not in (None, tensor.dtype):
                kind = type_name(header.dtype) if header.dtype else "numbers"
                raise CheckpointError(
                    f"{PLACE} does not fit {key}: by its bits and group size it would be {type_name(tensor.dtype)} "
                    f"{list(tensor.shape)}, and the files hold {kind} {list(header.shape)}"
                )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding | Conv1D):
            tensors = {key.removeprefix(f"{name}.") for key in headers if key.startswith(f"{name}.")} - {"bias"}
            if tensors and "weight" not in tensors:
                raise CheckpointError(
                    f"{PLACE} does not list {name}, but the files hold its {', '.join(sorted(tensors))}"
                )


# Not as decorators, which would hide the classes' own attributes from type checkers.
register_quantization_config(QUANT_METHOD)(DashqConfig)
register_quantizer(QUANT_METHOD)(DashqQuantizer)
