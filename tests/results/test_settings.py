"""What lies beside the tensors is enough to build the quantized layers, in the words of whoever opens them."""

import json
from collections.abc import Mapping

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from dashq.data import Grid, StoredLayer
from dashq.results.settings import format_settings, quantization_config, stored_layer
from dashq.runtime.quantizer import DashqConfig
from dashq_plugins.formats.native import NativeSerializer
from layer_reports import layer_report
from recipes import REGISTRY

NATIVE, METAL = REGISTRY.serializers["dashq"](), REGISTRY.serializers["metal"]()
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def network() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def layers() -> list[StoredLayer]:
    reports = [layer_report(UP, rows=64, columns=32, bits=4), layer_report(DOWN, rows=32, columns=64, bits=4)]
    return [stored_layer(report, NATIVE) for report in reports]


def test_a_layer_is_stored_as_its_report_says() -> None:
    report = layer_report(UP, bits=2, group_size=8, ordered=True, expert=None)
    stored = stored_layer(report, NATIVE)
    assert stored == StoredLayer(layer=report.layer, grid=NATIVE.grid(2), size=8, ordered=True)


def test_settings_that_only_dashq_reads_say_how_each_layer_is_stored(network: PreTrainedModel) -> None:
    ordered = stored_layer(layer_report("l", bits=2, group_size=8, ordered=True), NATIVE)
    settings = quantization_config(NATIVE, [*layers(), ordered])
    assert settings["quant_method"] == "dashq"
    assert settings["serializer"] == {"name": "dashq", "dtype": "float16"}
    plain = {"bits": 4, "size": 16}
    assert settings["layers"] == {UP: plain, DOWN: plain, "l": {"bits": 2, "size": 8, "ordered": True}}
    assert json.loads(json.dumps(settings)) == settings
    assert DashqConfig(**settings).layers == settings["layers"]


def test_they_are_added_to_the_models_configuration_where_the_format_says_nothing(network: PreTrainedModel) -> None:
    entries = format_settings(NATIVE, layers(), network)
    sentence = "this model is packed by dashq, `import dashq` before you open it"
    settings = {"quantization_config": quantization_config(NATIVE, layers()), "transformers_weights": sentence}
    assert entries == {"config.json": settings}


def test_a_format_of_others_is_told_all_linear_layers_that_are_not_quantized(network: PreTrainedModel) -> None:
    settings = format_settings(METAL, layers(), network)["config.json"]["quantization_config"]
    left = [f"model.layers.0.self_attn.{part}_proj" for part in "qkvo"] + ["model.layers.0.mlp.gate_proj", "lm_head"]
    assert sorted(settings.pop("modules_to_not_convert")) == sorted(left)
    assert settings == {"quant_method": "metal", "bits": 4, "group_size": 16}


class TwoTypes(NativeSerializer):
    name = "two-types"

    def types(self, bits: int) -> Mapping[str, Grid]:
        return {"usual": self.grid(bits), "wide": Grid(bits=bits, dtype=torch.float32)}


def test_the_type_of_a_layer_is_told_where_it_is_not_the_usual_one(network: PreTrainedModel) -> None:
    serializer = TwoTypes()
    reports = [
        layer_report(UP, rows=64, columns=32, bits=4, type="wide"),
        layer_report(DOWN, rows=32, columns=64, bits=4, type="usual"),
    ]
    stored = [stored_layer(report, serializer) for report in reports]
    entries = quantization_config(serializer, stored)["layers"]
    assert (entries[UP]["type"], "type" in entries[DOWN]) == ("wide", False)
    assert [serializer.grid_of(4, entries[name].get("type")) for name in (UP, DOWN)] == [own.grid for own in stored]
