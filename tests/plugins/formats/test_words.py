"""Codes lie in 32-bit words as one stream of bits, and what other programs do not read is refused by name."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, PreTrainedModel

from dashq import Grid, Grouping, Layer, PlanError, StoredLayer
from dashq.solving.arithmetic import round_to_nearest
from dashq.testing.comparison import equal
from dashq_plugins.formats.words import (
    flat_codes,
    from_whole_zeros,
    pack_words,
    refuse_bits,
    refuse_foreign,
    refuse_order,
    refuse_other_scales,
    refuse_short_groups,
    refuse_stacks,
    refuse_uneven_stacks,
    unpack_words,
    whole_zeros,
)
from tensors import groupings, noise

ALL_BITS = st.integers(1, 8)
GRID = Grid(bits=4, dtype=torch.float16)
TINY: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def network(kind: str) -> PreTrainedModel:
    configs = {
        "llama": LlamaConfig(**TINY),
        "gpt2": GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2),
        "mixtral": MixtralConfig(**TINY, num_local_experts=3),
    }
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(configs[kind], dtype=torch.bfloat16)
    return model


def stored(name: str, expert: int | None = None, bits: int = 4, size: int = 16) -> StoredLayer:
    layer = Layer(name=name, rows=16, columns=16, expert=expert)
    return StoredLayer(layer=layer, grid=Grid(bits=bits, dtype=torch.float16), size=size, ordered=False)


@given(ALL_BITS, st.integers(1, 3), st.integers(1, 70), st.integers(0, 999))
def test_the_words_of_a_row_are_one_stream_of_its_codes_filled_up_with_zeros(
    bits: int, rows: int, columns: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    words = pack_words(codes, bits)
    assert words.shape == (rows, -(-columns * bits // 32))
    for row, numbers in zip(words.tolist(), codes.tolist(), strict=True):
        stream = sum(code << (bits * j) for j, code in enumerate(numbers))
        assert sum((word & 0xFFFFFFFF) << (32 * j) for j, word in enumerate(row)) == stream
    assert unpack_words(words, bits, columns).equal(codes)


def test_words_may_lie_in_memory_in_any_order() -> None:
    codes = torch.arange(96, dtype=torch.uint8).remainder(8).view(3, 32)
    words = pack_words(codes, 3)
    assert unpack_words(words.T.contiguous().T, 3, 32).equal(codes)
    assert pack_words(codes.T.contiguous().T, 3).equal(words)


@given(groupings(), st.integers(0, 999))
def test_flat_codes_are_those_of_the_columns_without_what_fills_up_a_group(grouping: Grouping, seed: int) -> None:
    quantized = round_to_nearest(grouping.split(noise(seed, 3, grouping.columns)), GRID, grouping)
    in_order = Grouping(columns=grouping.columns, size=grouping.size)
    assert flat_codes(quantized).equal(in_order.join(quantized.codes))


@given(st.integers(0, 999), ALL_BITS)
def test_whole_zeros_are_the_codes_that_stand_for_0(seed: int, bits: int) -> None:
    grid, grouping = Grid(bits=bits, dtype=torch.float16, zero="integer"), Grouping(columns=16, size=8)
    quantized = round_to_nearest(grouping.split(noise(seed, 3, 16)), grid, grouping)
    zeros = whole_zeros(quantized)
    assert zeros.dtype == torch.uint8
    assert (-quantized.scale.float() * zeros.float()).equal(quantized.offset)
    assert equal(from_whole_zeros(flat_codes(quantized), quantized.scale, zeros, 8, grid), quantized)


def test_bits_that_a_format_does_not_hold_are_refused_with_those_that_it_does() -> None:
    refuse_bits(4, (2, 4, 8), "f")
    with pytest.raises(PlanError, match=r"^format f holds 2, 4, 8 bits, not 3$"):
        refuse_bits(3, (2, 4, 8), "f")


def test_columns_in_another_order_and_short_groups_are_refused() -> None:
    weight, order = noise(0, 2, 6), torch.arange(6).flip(0)
    plain, turned = Grouping(columns=6, size=3), Grouping(columns=6, size=3, order=order)
    refuse_order(round_to_nearest(plain.split(weight), GRID, plain), "f")
    refuse_short_groups(plain, "f")
    with pytest.raises(PlanError, match=r"^format f cannot hold columns in another order$"):
        refuse_order(round_to_nearest(turned.split(weight), GRID, turned), "f")
    with pytest.raises(PlanError, match=r"^format f needs groups that fill a row: 4 does not divide 6$"):
        refuse_short_groups(Grouping(columns=6, size=4), "f")


def test_a_layer_whose_weight_is_transposed_is_refused_by_name() -> None:
    refuse_foreign(network("llama"), [stored("model.layers.0.mlp.up_proj")], "f")
    message = r"^transformer\.h\.0\.mlp\.c_fc: format f holds plain linear layers, not a Conv1D, whose weight is transp"
    with pytest.raises(PlanError, match=message):
        refuse_foreign(network("gpt2"), [stored("transformer.h.0.mlp.c_fc")], "f")


def test_a_model_with_stacks_of_experts_is_refused_whether_they_are_quantized_or_not() -> None:
    refuse_stacks(network("llama"), "f")
    with pytest.raises(PlanError, match=r"^model\.layers\.0\.mlp\.experts\.\w+: the programs of format f do not find"):
        refuse_stacks(network("mixtral"), "f")


def test_experts_of_a_stack_are_quantized_alike_or_not_at_all() -> None:
    model, stack = network("mixtral"), "model.layers.0.mlp.experts.down_proj"
    alike = [stored(f"{stack}.{number}", number) for number in range(3)]
    refuse_uneven_stacks(model, alike, "f")
    refuse_uneven_stacks(model, [stored("model.layers.0.self_attn.q_proj")], "f")
    message = (
        rf"^{stack}: format f has one type for all 3 experts of a stack, and of these 2 are quantized, to 4 bits in"
    )
    with pytest.raises(PlanError, match=message):
        refuse_uneven_stacks(model, alike[:2], "f")
    for other in (stored(f"{stack}.2", 2, bits=3), stored(f"{stack}.2", 2, size=8)):
        with pytest.raises(PlanError, match=r"of these 3 are quantized, to .* bits in groups of 16 and|groups of 8"):
            refuse_uneven_stacks(model, [*alike[:2], other], "f")


def test_scales_of_another_type_than_the_models_are_refused_with_what_to_write() -> None:
    refuse_other_scales(network("llama"), "bfloat16", "f")
    with pytest.raises(
        PlanError, match=r"of type bfloat16, .* scales of type float16: .*\{name: f, dtype: bfloat16\}`"
    ):
        refuse_other_scales(network("llama"), "float16", "f")
