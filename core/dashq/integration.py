"""Let transformers open our checkpoints: `AutoModelForCausalLM.from_pretrained` after `import dashq`."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from dashq.errors import CheckpointError
from dashq.linear import DashqLinear
from dashq.model import linear_weight
from dashq.output import FORMAT_VERSION, QUANT_METHOD
from dashq.registry import load_registry
from dashq.strategies import Serializer


class DashqConfig(QuantizationConfigMixin):
    """The `quantization_config` in a result's config.json.

    `serializer` is the recipe's entry; `layers` gives bits and group size of each quantized layer by name.
    With `dequantize=True` the model is opened with plain weights.
    """

    def __init__(
        self,
        serializer: dict[str, Any],
        layers: dict[str, dict[str, Any]],
        version: int = FORMAT_VERSION,
        dequantize: bool = False,
        **kwargs: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # transformers' own annotation is closed
        self.serializer, self.layers, self.version, self.dequantize = serializer, layers, version, dequantize

    def build_serializer(self) -> Serializer:
        """The plugin that packed the layers."""
        if self.version != FORMAT_VERSION:
            raise CheckpointError(
                f"this checkpoint has format version {self.version}; this dashq reads version {FORMAT_VERSION}"
            )
        fields = dict(self.serializer)
        installed = load_registry().serializers
        name = fields.pop("name")
        if name not in installed:
            raise CheckpointError(
                f"this checkpoint was packed by the serializer {name!r}, which is not installed. "
                f"Installed: {', '.join(installed)}"
            )
        return installed[name].model_validate(fields)


class DashqQuantizer(HfQuantizer):
    """Puts a `DashqLinear` in the place of every quantized layer before the weights are read."""

    @property
    def config(self) -> DashqConfig:
        """What the checkpoint says of itself."""
        assert isinstance(self.quantization_config, DashqConfig)  # transformers picked us by its `quant_method`
        return self.quantization_config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        serializer = self.config.build_serializer()
        for name, entry in self.config.layers.items():
            module = model.get_submodule(name)
            if not isinstance(module, nn.Linear | Conv1D):
                raise CheckpointError(f"{name} is a {type(module).__name__}, not a linear layer that can be unpacked")
            rows, columns = linear_weight(module, module.weight).shape
            grid = serializer.grid(entry["bits"])
            ordered, bias = entry.get("ordered", False), module.bias is not None
            model.set_submodule(name, DashqLinear(serializer, rows, columns, entry["size"], grid, ordered, bias))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        return self._dequantize(model) if self.config.dequantize else model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name in self.config.layers:
            layer = model.get_submodule(name)
            if isinstance(layer, DashqLinear):
                model.set_submodule(name, layer.dequantized(dtype or model.dtype))
        return model

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride] - untyped there
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore - untyped there
        return False


# Not as decorators, which would hide the classes' own attributes from type checkers.
register_quantization_config(QUANT_METHOD)(DashqConfig)
register_quantizer(QUANT_METHOD)(DashqQuantizer)
