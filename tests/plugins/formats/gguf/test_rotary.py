"""Rotary embeddings of a GGUF file turn what those of transformers turn, and others are refused."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dashq import PlanError
from dashq.model.loading import read_config
from dashq.model.location import locate
from dashq_plugins.formats.gguf.names import layout_of
from dashq_plugins.formats.gguf.rotary import check_rope
from gguf_results import FAMILIES, LONG, PHI, SCALED, YARN, config_of, read, said


@pytest.mark.parametrize("context", [16, 64, 8192])
def test_rotary_frequencies_of_llama_3_are_slowed_down_as_transformers_does(context: int, tmp_path: Path) -> None:
    config = config_of("llama", rope_parameters=LONG | {"original_max_position_embeddings": context})
    (factors,) = read(tmp_path, config).tensors
    assert factors.name == "rope_freqs.weight"
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 1e4 ** (numpy.arange(0, 16, 2) / 16)
    numpy.testing.assert_allclose(plain / factors.data, expected.numpy(), rtol=1e-5)


@pytest.mark.parametrize("turns", [0.9, 1.1])
def test_one_factor_for_low_and_high_frequencies_leaves_none_in_between(turns: float, tmp_path: Path) -> None:
    """Llama 4 has such; the context is chosen so that the fourth frequency turns a little more or less than once."""
    context = int(turns * 2 * numpy.pi * 1e4 ** (6 / 16))
    rope = LONG | {"high_freq_factor": 1.0, "original_max_position_embeddings": context}
    config = config_of("llama", rope_parameters=rope)
    (factors,) = read(tmp_path, config).tensors
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    numpy.testing.assert_allclose(1 / 1e4 ** (numpy.arange(0, 16, 2) / 16) / factors.data, expected, rtol=1e-5)
    assert factors.data.tolist().count(1) == (4 if turns > 1 else 3)


@pytest.mark.parametrize("family", ["llama", "internlm3", "hunyuan_v1_dense"])
def test_dynamic_embeddings_are_plain_ones_in_the_context_of_the_file(family: str, tmp_path: Path) -> None:
    """They grow with texts that are longer than the context alone."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    config = config_of(family, rope_parameters=rope)
    check_rope(layout_of(config))
    entries = said(tmp_path, config)
    assert (entries["rope.freq_base"], entries["context_length"]) == (1e4, config.max_position_embeddings)
    assert "rope.scaling.type" not in entries
    turned, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, torch.device("cpu"), seq_len=entries["context_length"])
    torch.testing.assert_close(turned, 1e4 ** (-torch.arange(0, 16, 2) / 16))


@pytest.mark.parametrize("length", [40, 600])
@pytest.mark.parametrize("factor", [None, 1.25])
def test_factors_of_long_texts_are_told_as_they_are_read_back(
    length: int, factor: float | None, tmp_path: Path
) -> None:
    rope = PHI | ({} if factor is None else {"attention_factor": factor})
    config = config_of("phi3", max_position_embeddings=1024, original_max_position_embeddings=512, rope_parameters=rope)
    check_rope(layout_of(config))
    reader = read(tmp_path, config)
    assert {tensor.name for tensor in reader.tensors} == {"rope_factors_long.weight", "rope_factors_short.weight"}
    again = read_config(locate(str(tmp_path / "model.gguf")))
    turned, expected = (
        ROPE_INIT_FUNCTIONS["longrope"](own, torch.device("cpu"), seq_len=length) for own in (again, config)
    )
    torch.testing.assert_close(turned[0], expected[0])
    assert turned[1] == pytest.approx(expected[1])


def test_frequencies_of_gemma_4_that_turn_nothing_stand_still(tmp_path: Path) -> None:
    """A quarter of the 8 frequencies of a head of 16 turn."""
    (factors,) = read(tmp_path, config_of("gemma4")).tensors
    assert factors.name == "rope_freqs.weight"
    assert factors.data.tolist() == [1, 1, *[pytest.approx(1e30)] * 6]
    entries = said(tmp_path / "again", config_of("gemma4"))
    assert (entries["rope.dimension_count"], entries["rope.dimension_count_swa"]) == (16, 8)


def test_the_settings_of_yarn_are_told(tmp_path: Path) -> None:
    config = config_of("qwen3", rope_parameters=YARN)
    check_rope(layout_of(config))
    entries = said(tmp_path, config)
    names = ("type", "factor", "original_context_length")
    assert [entries[f"rope.scaling.{name}"] for name in names] == ["yarn", 4.0, 64]


def test_how_queries_of_long_texts_grow_is_told(tmp_path: Path) -> None:
    config = config_of("ministral3")
    check_rope(layout_of(config))
    entries = said(tmp_path, config)
    assert (entries["rope.scaling.yarn_log_multiplier"], entries["attention.temperature_scale"]) == (1.0, 0.5)
    assert entries["rope.scaling.original_context_length"] == 8


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mscale_all_dim": 0.5}, None),
        ({"mscale_all_dim": None, "mscale": None}, None),
        ({"mscale": 0.5}, r"grow by 1\.0000 at this factor, and here it is 0\.939"),
        ({"rope_type": "default"}, "cannot write rotary embeddings of type 'default' to a GGUF file of mistral3"),
    ],
)
def test_what_yarn_multiplies_may_be_divided_out_again(changes: dict[str, Any], reason: str | None) -> None:
    rope = config_of("ministral3").rope_parameters | changes
    layout = layout_of(config_of("ministral3", rope_parameters=rope))
    with nullcontext() if reason is None else pytest.raises(PlanError, match=reason):
        check_rope(layout)


def test_yarn_that_scales_all_of_latent_attention_is_told(tmp_path: Path) -> None:
    config = config_of("deepseek_v3", rope_parameters=SCALED)
    check_rope(layout_of(config))
    assert said(tmp_path, config)["rope.scaling.yarn_log_multiplier"] == pytest.approx(0.07)


@pytest.mark.parametrize(
    ("rope", "reason"),
    [
        (SCALED | {"mscale": 1.0}, "mscale_all_dim are the same, and here they are 1.0 and 0.7"),
        (YARN, "mscale_all_dim are the same, and here they are None and None"),
        (YARN | {"attention_factor": 1.0}, "mscale_all_dim are the same, and here they are None and None"),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, "type 'linear' to a GGUF file of deepseek2"),
    ],
)
def test_latent_attention_of_which_a_part_alone_is_scaled_is_refused(rope: dict[str, Any], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        check_rope(layout_of(config_of("deepseek_v3", rope_parameters=rope)))


@pytest.mark.parametrize("family", ["qwen2", "mimo_v2_flash", "qwen3_5", "minimax_m2"])
def test_frequencies_of_llama_3_are_refused_where_llama_cpp_reads_no_table_of_them(family: str) -> None:
    rope = dict.fromkeys(("full_attention", "sliding_attention"), LONG) if family == "mimo_v2_flash" else LONG
    with pytest.raises(PlanError, match="cannot write rotary embeddings of type 'llama3' to a GGUF file of"):
        check_rope(layout_of(config_of(family, rope_parameters=rope)))


def test_a_part_of_each_head_is_refused_where_transformers_turns_all_of_it() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    bamba, granite = (
        layout_of(config_of(name, **changes, rope_parameters=rope))
        for name, changes in (FAMILIES["bamba"], FAMILIES["granite4-turned"])
    )
    assert bamba.architecture == granite.architecture
    check_rope(bamba)
    with pytest.raises(PlanError, match="cannot write rotary embeddings of a part of each head"):
        check_rope(granite)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            "cannot write rotary embeddings of a part of each head",
        ),
        (
            PHI | {"original_max_position_embeddings": 128},
            "cannot write rotary embeddings of type 'longrope' to a GGUF file of llama",
        ),
        (YARN | {"beta_fast": 16}, "computes YaRN with beta_fast = 32, and here it is 16"),
        (YARN | {"truncate": False}, "ramp of YaRN begin and end at whole frequencies, and this model does not"),
        (YARN | {"attention_factor": 1.3}, "grow by 1.1386 at this factor, and here it is 1.3"),
    ],
)
def test_what_llama_cpp_would_turn_otherwise_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        check_rope(layout_of(config_of("llama", rope_parameters=changes)))


def test_the_ramp_of_gpt_oss_may_begin_between_two_frequencies() -> None:
    check_rope(layout_of(config_of("gpt_oss", rope_parameters=YARN | {"truncate": False})))
