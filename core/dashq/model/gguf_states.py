"""Layers with states in GGUF files: the order of their heads, and values that llama.cpp has in another form."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

if TYPE_CHECKING:
    import transformers

# Those whose value heads of linear attention lie in turn: one of each key head, then the next of each. In those of
# transformers all that share a key head lie side by side.
TILED = {"qwen35", "qwen35moe"}
# Those in which all of a head decays alike: what is of heads has a second axis there, and norms are cut into groups.
WHOLE_HEADS = {
    "granitehybrid": "mamba_n_groups",
    "falcon-h1": "mamba_n_groups",
    "nemotron_h": "n_groups",
    "nemotron_h_moe": "n_groups",
    "mamba2": "n_groups",
}
BARE = (".ssm_a", ".ssm_d", ".ffn_norm")  # tensors in the file whose names have no ending
# Parts whose rows are of value heads; before them there may be those of queries and keys.
OF_VALUES = ("in_proj_z", "in_proj_a", "in_proj_b", "A_log", "dt_bias")
BEHIND_KEYS = ("in_proj_qkv", "conv1d")
# One feed-forward network for all tokens, which stands alone where there are no experts.
ALONE = {"shared_mlp.output_linear": "mlp.down_proj", "shared_mlp.input_linear": "alone.input_linear"}
FILTERS = "self_attn.conv1d.weight"  # of queries, keys and values, which keep the axis of inputs in the file
INPUTS = "linear_attn.in_proj_qkvz.weight"  # of queries, keys, values and their gates, key head by key head


def state_name(config: "transformers.PretrainedConfig", parameter: str) -> str:
    """A parameter's name, or that of the same in other models where it stands for something else."""
    if config.model_type == "granitemoehybrid" and config.num_local_experts == 0:
        for shared, name in ALONE.items():
            parameter = parameter.replace(shared, name)
    return parameter


def state_rows(
    architecture: str, config: "transformers.PretrainedConfig", parameter: str, count: int
) -> Int[Tensor, " rows"] | None:
    """The order in the file of a parameter's rows of heads; None where it is that of transformers."""
    rows = torch.arange(count)
    if architecture == "qwen3next" and parameter.endswith(INPUTS):
        values = config.linear_num_value_heads // config.linear_num_key_heads * config.linear_value_head_dim
        sizes = [config.linear_key_head_dim, config.linear_key_head_dim, values, values]
        return torch.cat([part.flatten() for part in rows.view(config.linear_num_key_heads, -1).split(sizes, dim=1)])
    parts = parameter.split(".")
    if architecture not in TILED or "linear_attn" not in parts:
        return None
    if any(part in parts for part in OF_VALUES):
        return _tiled(config, rows, back=False)
    if any(part in parts for part in BEHIND_KEYS):
        keys = 2 * config.linear_num_key_heads * config.linear_key_head_dim
        return torch.cat([rows[:keys], _tiled(config, rows[keys:], back=False)])
    return None


def state_sizes(config: "transformers.PretrainedConfig", parameter: str, rows: int) -> Sequence[int]:
    """The rows of each of the tensors in the file that hold a fused one of transformers, in the file's order."""
    if parameter.endswith(FILTERS):
        return (rows // 3,) * 3
    if parameter.endswith(INPUTS):
        gates = config.linear_num_value_heads * config.linear_value_head_dim
        return (rows - gates, gates)
    return (rows // 2, rows - rows // 2)


def state_values(
    architecture: str,
    config: "transformers.PretrainedConfig",
    parameter: str,
    tensor: Shaped[Tensor, "..."],
    back: bool,
) -> Shaped[Tensor, "..."]:
    """Values of a parameter as the file has them, or `back`; columns of heads move with all that belongs to them."""
    if architecture in WHOLE_HEADS and parameter.endswith((".A_log", ".D")):
        tensor = tensor.flatten() if back else tensor.unsqueeze(-1)
    if architecture in WHOLE_HEADS and parameter.endswith(("mamba.norm.weight", "mixer.norm.weight")):
        return tensor.flatten() if back else tensor.unflatten(0, (getattr(config, WHOLE_HEADS[architecture]), -1))
    if architecture == "kimi-linear" and parameter.endswith(".A_log"):
        tensor = tensor.view(1, 1, -1, 1) if back else tensor.view(-1, 1)
    if parameter.endswith(".A_log"):
        return (-tensor).log() if back else -tensor.float().exp()
    if parameter.endswith(("conv.conv.weight", ".conv1d.weight")) and not parameter.endswith(
        FILTERS
    ):  # one filter for each channel
        return tensor.unsqueeze(1) if back else tensor.squeeze(1)
    if architecture in TILED and parameter.endswith("linear_attn.out_proj.weight"):
        return _tiled(config, tensor, back)
    return tensor


def _tiled(
    config: "transformers.PretrainedConfig", heads: Shaped[Tensor, "... columns"], back: bool
) -> Shaped[Tensor, "... columns"]:
    """Value heads along the last axis, with all that belongs to each, in the order of the file, or `back`."""
    keys, shared = config.linear_num_key_heads, config.linear_num_value_heads // config.linear_num_key_heads
    sizes = (shared, keys, -1) if back else (keys, shared, -1)
    moved: Tensor = heads.unflatten(-1, sizes).transpose(-3, -2).flatten(-3)
    return moved
