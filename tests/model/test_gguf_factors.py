"""Parameters of Falcon-H1 hold the factors for which llama.cpp has no entries, and come back without them."""

from typing import Any

import pytest
import torch
from transformers import FalconH1Config

from dashq.model.gguf_factors import embedding_factor, held, stream_unit
from tensors import noise

SIZES: dict[str, Any] = {
    "mamba_d_ssm": 8,
    "mamba_n_heads": 2,
    "mamba_d_head": 4,
    "mamba_d_state": 2,
    "mamba_n_groups": 1,
}
CONFIG = FalconH1Config(
    **SIZES,
    mlp_multipliers=[3.0, 2.0],
    embedding_multiplier=4.0,
    lm_head_multiplier=0.5,
    ssm_multipliers=[0.5, 1.0, 2.0, 3.0, 0.5],
    tie_word_embeddings=False,
)


@pytest.mark.parametrize(
    ("parameter", "factor"),
    [
        ("model.embed_tokens.weight", 6.0),
        ("model.layers.0.pre_ff_layernorm.weight", 3.0),
        ("model.layers.0.input_layernorm.weight", 1.0),
        ("model.final_layernorm.weight", 0.5),
        ("model.layers.0.mamba.in_proj.weight", 1.0),
    ],
)
def test_a_parameter_holds_its_factor(parameter: str, factor: float) -> None:
    tensor = noise(0, 6, 4)
    file = held(CONFIG, parameter, tensor, back=False)
    assert file.allclose(tensor * factor)
    assert held(CONFIG, parameter, file, back=True).allclose(tensor)


def test_filters_hold_the_factors_of_what_they_are_given_beside_that_of_gates() -> None:
    tensor = noise(0, 12, 1, 4)
    file = held(CONFIG, "model.layers.0.mamba.conv1d.weight", tensor, back=False)
    assert (file / tensor).flatten(1).mean(1).tolist() == pytest.approx([2.0] * 8 + [4.0] * 2 + [6.0] * 2)
    assert held(CONFIG, "model.layers.0.mamba.conv1d.weight", file, back=True).allclose(tensor)


def test_a_norm_before_a_head_that_is_the_embeddings_makes_up_for_their_factor() -> None:
    settings: dict[str, Any] = CONFIG.to_dict() | {"tie_word_embeddings": True}
    tied = FalconH1Config(**settings)
    file = held(tied, "model.final_layernorm.weight", torch.ones(4), back=False)
    assert file.allclose(torch.tensor(0.5 / 6.0))


def test_embeddings_take_no_more_room_than_in_bfloat16_and_lose_nothing() -> None:
    exact = noise(0, 6, 4).bfloat16()
    file = held(CONFIG, "model.embed_tokens.weight", exact, back=False)
    assert file.dtype == torch.float16
    assert held(CONFIG, "model.embed_tokens.weight", file, back=True).bfloat16().equal(exact)
    assert held(CONFIG, "model.embed_tokens.weight", exact.half(), back=False).dtype == torch.float32


def test_a_model_without_factors_keeps_its_embeddings_as_they_are() -> None:
    plain = FalconH1Config(**SIZES)
    tensor = noise(0, 6, 4).bfloat16()
    assert held(plain, "model.embed_tokens.weight", tensor, back=False) is tensor
    assert (stream_unit(plain), embedding_factor(plain)) == (1.0, 1.0)


def test_the_shape_of_filters_is_known_before_they_are_read() -> None:
    empty = torch.empty(12, 4, device="meta")
    assert held(CONFIG, "model.layers.0.mamba.conv1d.weight", empty, back=True).shape == (12, 4)
