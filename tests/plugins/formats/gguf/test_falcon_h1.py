"""Factors of Falcon-H1 are scales of matrices in the file, and what llama.cpp computes otherwise is refused."""

from pathlib import Path
from typing import Any

import pytest

from dashq import PlanError, run
from dashq_plugins.formats.gguf.checks import check_config
from dashq_plugins.formats.gguf.names import layout_of
from gguf_results import MULTIPLIED, NORMED, SIZES, config_of, read, recipe, said
from pico import pico_model


def test_factors_are_scales_of_matrices(tmp_path: Path) -> None:
    tensors = read(tmp_path, config_of("falcon_h1", **MULTIPLIED)).tensors
    unit = 0.88 / 0.58
    assert {tensor.name: float(tensor.data[0]) for tensor in tensors if ".1." in tensor.name} == pytest.approx(
        {
            "blk.1.attn_q.scale": 1.3,
            "blk.1.attn_k.scale": 1.3 * 0.39,
            "blk.1.attn_v.scale": 1.3,
            "blk.1.attn_output.scale": 0.93 * unit,
            "blk.1.ssm_in.scale": 1.25 * 0.35,
            "blk.1.ssm_out.scale": 0.23 * unit,
        }
    )


def test_factors_that_are_one_are_not_told(tmp_path: Path) -> None:
    assert not read(tmp_path, config_of("falcon_h1")).tensors


@pytest.mark.parametrize(("changes", "factor"), [({}, (0.88 / 0.58) ** 2), (NORMED, 1.0)])
def test_norms_add_as_much_as_the_hidden_states_have_grown_unless_states_are_normed(
    changes: dict[str, Any], factor: float, tmp_path: Path
) -> None:
    config = config_of("falcon_h1", **(MULTIPLIED | changes))
    added = said(tmp_path, config)["attention.layer_norm_rms_epsilon"]
    assert added == pytest.approx(config.rms_norm_eps * factor)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ssm_multipliers": [0.5, 1.0, 1.0, 1.0, 0.25]}, "ssm_multipliers begins with 0.5 and ends with 0.25"),
        ({"mamba_rms_norm": True}, "norms states of falcon-h1 behind their gates, and this model before them"),
        ({"attention_bias": True}, "computes falcon-h1 with attention_bias = False, and here it is True"),
        ({"projectors_bias": True}, "computes falcon-h1 with projectors_bias = False, and here it is True"),
        ({"mamba_proj_bias": True}, "computes falcon-h1 with mamba_proj_bias = False, and here it is True"),
        ({"mamba_conv_bias": False}, "computes falcon-h1 with mamba_conv_bias = True, and here it is False"),
        ({"mlp_bias": True}, "computes falcon-h1 with mlp_bias = False, and here it is True"),
        ({"time_step_limit": [0.0, 0.1]}, r"computes falcon-h1 with time_step_limit = \(0.0, inf\), and here it is"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        check_config(layout_of(config_of("falcon_h1", **changes)))


@pytest.mark.parametrize("factors", [MULTIPLIED, {}])
def test_quantized_embeddings_hold_no_factor(factors: dict[str, Any], tmp_path: Path) -> None:
    model = pico_model("falcon_h1", tmp_path / "model", **(SIZES | factors))
    packed = recipe(model, tmp_path / "out", embeddings={"bits": 8})
    if not factors:
        run(packed)
        return
    with pytest.raises(PlanError, match=r"embeddings of falcon-h1 hold the factor 8.57241 in a GGUF file"):
        run(packed)
