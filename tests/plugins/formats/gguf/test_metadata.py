"""What a GGUF file says of a model is what its configuration says, and what llama.cpp computes otherwise is refused."""

from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
import transformers
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dashq import PlanError
from dashq.model.loading import read_config
from dashq.model.location import locate
from dashq_plugins.formats.gguf.metadata import add_metadata, check_config
from dashq_plugins.formats.gguf.names import layout_of
from gguf_results import FAMILIES, LONG, PHI, SIZES
from pico import FAMILIES as MODELS
from pico import IN_GGUF, SMALL

TURNED = {"stablelm": 4, "nemotron": 2}  # a part of each head
NORMS = {
    "starcoder2": ("", "norm_epsilon"),
    "stablelm": ("", "layer_norm_eps"),
    "nemotron": ("", "norm_eps"),
}


def config_of(family: str, **changes: Any) -> PretrainedConfig:
    name, own = (MODELS | IN_GGUF)[family]
    config: PretrainedConfig = getattr(transformers, name)(**(SMALL | own | SIZES | changes))
    return config


def read(folder: Path, config: PretrainedConfig) -> gguf.GGUFReader:
    """A file that holds the metadata alone."""
    layout = layout_of(config)
    writer = gguf.GGUFWriter(folder / "model.gguf", layout.architecture)
    add_metadata(writer, layout)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf.GGUFReader(folder / "model.gguf")


def said(folder: Path, config: PretrainedConfig) -> dict[str, Any]:
    """The entries of that file, without the architecture's name in front."""
    fields = {name: field.contents() for name, field in read(folder, config).fields.items()}
    architecture = fields["general.architecture"]
    return {name.removeprefix(f"{architecture}."): value for name, value in fields.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_says_what_the_configuration_says(family: str, tmp_path: Path) -> None:
    name, changes = FAMILIES[family]
    config = config_of(name, **changes)
    check_config(layout_of(config))
    entries = said(tmp_path, config)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    expected = {
        "vocab_size": config.vocab_size,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": size,
        "attention.value_length": size,
        "rope.dimension_count": size // TURNED.get(name, 1),
        "context_length": 64 if name == "mistral" else 256,  # as far as a window of attention reaches
    }
    assert {key: entries[key] for key in expected} == expected
    norm, epsilon = NORMS.get(name, ("rms_", "rms_norm_eps"))
    assert entries[f"attention.layer_norm_{norm}epsilon"] == pytest.approx(getattr(config, epsilon))
    mixtures = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
    experts = {"expert_count": 4, "expert_used_count": 2} if name in mixtures else {}
    assert {key: value for key, value in entries.items() if key in ("expert_count", "expert_used_count")} == experts


def test_the_factors_of_granite_are_told(tmp_path: Path) -> None:
    entries = said(tmp_path, config_of("granite"))
    names = ("embedding_scale", "residual_scale", "logit_scale", "attention.scale")
    assert [entries[name] for name in names] == pytest.approx([1.5, 0.5, 2.0, 0.2])


def test_windows_and_both_rotary_bases_of_gemma_are_told(tmp_path: Path) -> None:
    name, changes = FAMILIES["gemma3-linear"]
    entries = said(tmp_path, config_of(name, **changes))
    assert entries["attention.sliding_window"] == 16
    assert entries["attention.sliding_window_pattern"] == [True, False]
    assert (entries["rope.freq_base"], entries["rope.freq_base_swa"]) == (1e4, 1e3)
    assert (entries["rope.scaling.type"], entries["rope.scaling.factor"]) == ("linear", 8.0)


@pytest.mark.parametrize("context", [16, 64, 8192])
def test_rotary_frequencies_of_llama_3_are_slowed_down_as_transformers_does(context: int, tmp_path: Path) -> None:
    config = config_of("llama", rope_parameters=LONG | {"original_max_position_embeddings": context})
    (factors,) = read(tmp_path, config).tensors
    assert factors.name == "rope_freqs.weight"
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 1e4 ** (numpy.arange(0, 16, 2) / 16)
    numpy.testing.assert_allclose(plain / factors.data, expected.numpy(), rtol=1e-5)


@pytest.mark.parametrize("length", [40, 600])
@pytest.mark.parametrize("factor", [None, 1.25])
def test_factors_of_long_texts_are_told_as_they_are_read_back(
    length: int, factor: float | None, tmp_path: Path
) -> None:
    rope = PHI | ({} if factor is None else {"attention_factor": factor})
    config = config_of("phi3", max_position_embeddings=1024, original_max_position_embeddings=512, rope_parameters=rope)
    check_config(layout_of(config))
    reader = read(tmp_path, config)
    assert {tensor.name for tensor in reader.tensors} == {"rope_factors_long.weight", "rope_factors_short.weight"}
    again = read_config(locate(str(tmp_path / "model.gguf")))
    turned, expected = (
        ROPE_INIT_FUNCTIONS["longrope"](own, torch.device("cpu"), seq_len=length) for own in (again, config)
    )
    torch.testing.assert_close(turned[0], expected[0])
    assert turned[1] == pytest.approx(expected[1])


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("llama", {"hidden_act": "gelu"}, "llama.cpp computes silu in llama, and this model gelu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "cannot write rotary embeddings of type 'yarn'",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "cannot write rotary embeddings of a part of each head",
        ),
        (
            "llama",
            {"rope_parameters": PHI | {"original_max_position_embeddings": 128}},
            "cannot write rotary embeddings of type 'longrope' to a GGUF file of llama",
        ),
        ("qwen3_moe", {"norm_topk_prob": False}, "lets the weights .* add up to 1, and this model does not"),
        ("qwen2_moe", {"norm_topk_prob": True}, "does not let the weights .* add up to 1, and this model does"),
        ("olmoe", {}, "as many heads of keys as of queries in olmoe"),
        ("smollm3", {"no_rope_layer_interval": 2}, "all layers of smollm3 but every 4th, and this model others"),
        ("stablelm", {"qk_layernorm": True}, "cannot write norms of queries and keys of each head"),
        (
            "gemma3",
            {"query_pre_attn_scalar": 64},
            "divides queries by the root of 16, and this model by that of 64",
        ),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(family: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        check_config(layout_of(config_of(family, **changes)))


def test_queries_of_62_layers_are_divided_by_the_root_of_another_width_as_llama_cpp_does() -> None:
    sizes = {"head_dim": 32, "query_pre_attn_scalar": SIZES["hidden_size"] // 4}
    check_config(layout_of(config_of("gemma3", num_hidden_layers=62, **sizes)))
    with pytest.raises(PlanError, match="divides queries by the root of 32, and this model by that of 16"):
        check_config(layout_of(config_of("gemma3", **sizes)))
