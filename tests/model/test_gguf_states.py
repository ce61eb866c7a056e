"""What belongs to heads with states lies in a GGUF file as llama.cpp multiplies it, whole heads at a time."""

from typing import Any

import torch
from transformers import BambaConfig, PretrainedConfig, Qwen3_5TextConfig, Qwen3NextConfig

from dashq.model.gguf_layout import GgufLayout
from tensors import noise

SIZES: dict[str, Any] = {"num_hidden_layers": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
HEADS: dict[str, Any] = {"linear_key_head_dim": 3, "linear_value_head_dim": 3}
QWEN_3_NEXT = Qwen3NextConfig(**SIZES, **HEADS)
QWEN_3_5 = Qwen3_5TextConfig(**SIZES, **HEADS)
LAYER = "model.layers.0.linear_attn"


def lettered(heads: str) -> torch.Tensor:
    """Three rows of each head, which stand for its letter and its number."""
    return torch.tensor([3 * index + row for index in range(len(heads.split())) for row in range(3)])


def order(rows: torch.Tensor, heads: str) -> str:
    """The heads of rows, of which all three lie together."""
    assert rows[1::3].equal(rows[::3] + 1)
    assert rows[2::3].equal(rows[::3] + 2)
    return " ".join(heads.split()[row // 3] for row in rows[::3].tolist())


def in_file(architecture: str, config: PretrainedConfig, name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
    """The file's tensors of a parameter, from which it comes back."""
    layout = GgufLayout(architecture, config)
    parts = list(layout.to_file(name, tensor).values())
    assert layout.from_file(name, parts).allclose(tensor)
    return parts


def test_qwen3_next_has_all_queries_keys_and_values_in_one_matrix_and_gates_in_another() -> None:
    heads = "q0 k0 v0 v1 z0 z1 q1 k1 v2 v3 z2 z3"
    both, gates = in_file("qwen3next", QWEN_3_NEXT, f"{LAYER}.in_proj_qkvz.weight", lettered(heads)[:, None])
    assert order(both[:, 0], heads) == "q0 q1 k0 k1 v0 v1 v2 v3"
    assert order(gates[:, 0], heads) == "z0 z1 z2 z3"


def test_value_heads_of_qwen3_5_lie_in_turn_wherever_rows_are_theirs() -> None:
    heads = "q0 q1 k0 k1 v0 v1 v2 v3"
    for name, tensor in (("in_proj_qkv", lettered(heads)[:, None]), ("conv1d", lettered(heads)[:, None, None])):
        (rows,) = in_file("qwen35", QWEN_3_5, f"{LAYER}.{name}.weight", tensor)
        assert order(rows[:, 0], heads) == "q0 q1 k0 k1 v0 v2 v1 v3"
    (gates,) = in_file("qwen35", QWEN_3_5, f"{LAYER}.in_proj_z.weight", lettered("z0 z1 z2 z3")[:, None])
    assert order(gates[:, 0], "z0 z1 z2 z3") == "z0 z2 z1 z3"
    for name in ("in_proj_a", "in_proj_b"):
        assert in_file("qwen35", QWEN_3_5, f"{LAYER}.{name}.weight", torch.arange(4)[:, None])[0].tolist() == [
            [0],
            [2],
            [1],
            [3],
        ]
    assert in_file("qwen35", QWEN_3_5, f"{LAYER}.dt_bias", torch.arange(4))[0].tolist() == [0, 2, 1, 3]


def test_columns_of_value_heads_move_with_all_that_belongs_to_them() -> None:
    name = f"{LAYER}.out_proj.weight"
    (columns,) = in_file("qwen35", QWEN_3_5, name, lettered("v0 v1 v2 v3")[None].expand(2, -1))
    assert order(columns[1], "v0 v1 v2 v3") == "v0 v2 v1 v3"
    (same,) = in_file("qwen3next", QWEN_3_NEXT, name, noise(0, 2, 12))
    assert same.equal(noise(0, 2, 12))


def test_how_fast_states_decay_is_no_logarithm_in_the_file() -> None:
    logarithms = noise(0, 4).half()
    for architecture, config in (("qwen3next", QWEN_3_NEXT), ("qwen35", QWEN_3_5)):
        (rates,) = in_file(architecture, config, f"{LAYER}.A_log", logarithms.float())
        assert rates.sort()[0].allclose(-logarithms.float().exp().sort(descending=True)[0])
        assert GgufLayout(architecture, config).names(f"{LAYER}.A_log") == ("blk.0.ssm_a",)


def test_norms_of_heads_hold_the_factor_in_both_and_others_the_factor_less_one() -> None:
    factor = noise(0, 3)
    assert in_file("qwen35", QWEN_3_5, f"{LAYER}.norm.weight", factor)[0].equal(factor)
    assert in_file("qwen35", QWEN_3_5, "model.layers.0.input_layernorm.weight", factor)[0].equal(factor + 1)


def test_what_granite_has_for_each_head_has_a_second_axis_in_the_file_and_norms_are_cut_into_groups() -> None:
    config = BambaConfig(num_hidden_layers=2, mamba_n_groups=2)
    for name, shape in (("A_log", (4, 1)), ("D", (4, 1)), ("norm.weight", (2, 2))):
        (part,) = in_file("granitehybrid", config, f"model.layers.0.mamba.{name}", noise(0, 4))
        assert part.shape == shape
