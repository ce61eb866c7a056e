"""Sizes are one number where all layers have the same, and one for each layer where they have not."""

import pytest

from dashq_plugins.formats.gguf.layers import head_size, heads_of_keys, inner_size, key_size, shares_latents, value_size
from gguf_results import ALIKE, FAMILIES, SHARED, config_of


@pytest.mark.parametrize(
    ("family", "size"), [("llama", 16), ("llama-untied-biased", 16), ("qwen3", 16), ("gemma4", 16)]
)
def test_heads_are_as_large_as_in_the_last_layer(family: str, size: int) -> None:
    """Those of Gemma 4 with a window have 8 columns."""
    assert head_size(config_of(family)) == size


def test_layers_without_attention_have_no_heads_of_keys() -> None:
    assert heads_of_keys(config_of("lfm2", layer_types=["conv", "full_attention"])) == [0, 2]


def test_layers_with_a_window_may_have_other_heads_of_keys() -> None:
    assert heads_of_keys(config_of("gemma4", **ALIKE)) == [2, 1]
    assert heads_of_keys(config_of("gemma4")) == 2


def test_layers_that_share_keys_may_be_twice_as_wide_inside() -> None:
    assert inner_size(config_of("gemma4", **SHARED)) == [96, 96, 192, 192]
    assert inner_size(config_of("gemma4")) == 96


@pytest.mark.parametrize(("multiple", "factor", "size"), [(32, 1.0, 64), (48, 1.0, 96), (32, 1.2, 96)])
def test_lfm2_may_have_two_thirds_inside_and_as_much_as_makes_a_multiple(
    multiple: int, factor: float, size: int
) -> None:
    changes = {"block_multiple_of": multiple, "block_ffn_dim_multiplier": factor, "block_auto_adjust_ff_dim": True}
    assert inner_size(config_of("lfm2", layer_types=["conv", "full_attention"], **changes)) == size


@pytest.mark.parametrize(
    ("label", "heads", "key", "value"), [("deepseek_v3", 1, 48, 32), ("minicpm3", 4, 32, 16), ("llama", 2, 16, 16)]
)
def test_latents_are_kept_once_and_heads_each(label: str, heads: int, key: int, value: int) -> None:
    name, changes = FAMILIES[label]
    config = config_of(name, **changes)
    assert shares_latents(config) == (heads == 1)
    assert (heads_of_keys(config), key_size(config), value_size(config)) == (heads, key, value)
