"""Experts are counted under the names that each model type has for them."""

from typing import Any

import pytest

from dashq_plugins.formats.gguf.experts import expert_count, leading_layers, shared_expert_count
from dashq_plugins.formats.gguf.names import layout_of
from gguf_results import FAMILIES, config_of


@pytest.mark.parametrize(
    ("label", "changes", "count", "shared"),
    [
        ("llama", {}, None, 0),
        ("mixtral", {}, 4, 0),
        ("ernie4_5_moe", {}, 4, 2),
        ("afmoe", {}, 4, 2),
        ("deepseek_v3", {}, 8, 1),
        ("jamba", {"num_experts": 1}, None, 0),
        ("nemotron_h", {}, 4, 1),
        ("nemotron_h-dense", {}, None, 1),
        ("youtu", {}, None, 0),
    ],
)
def test_what_no_layer_has_is_not_counted(label: str, changes: dict[str, Any], count: int | None, shared: int) -> None:
    name, own = FAMILIES[label]
    config = config_of(name, **(own | changes))
    assert (expert_count(layout_of(config)), shared_expert_count(config)) == (count, shared)


@pytest.mark.parametrize(
    ("family", "changes", "count"),
    [
        ("llama", {}, None),
        ("deepseek_v3", {"first_k_dense_replace": 3}, 3),
        ("afmoe", {"num_dense_layers": 2}, 2),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense", "sparse"]}, 1),
        ("exaone_moe", {"mlp_layer_types": ["sparse"] * 2, "first_k_dense_replace": 1}, 0),
        ("exaone_moe", {"mlp_layer_types": ["dense"] * 2, "first_k_dense_replace": 1}, 2),
    ],
)
def test_a_list_of_layers_says_how_many_have_no_experts_at_first_and_else_a_number(
    family: str, changes: dict[str, Any], count: int | None
) -> None:
    assert leading_layers(config_of(family, **changes)) == count
