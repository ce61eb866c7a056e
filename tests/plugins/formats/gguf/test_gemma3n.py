"""What llama.cpp computes otherwise of Gemma 3n is refused, and layers without keys take those that it takes."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dashq import PlanError, run
from dashq.results.verify import verify
from dashq_plugins.formats.gguf.checks import check_config
from dashq_plugins.formats.gguf.names import layout_of
from gguf_results import SHARING_KEYS, SIZES, config_of, recipe
from pico import pico_model

# Norms behind what a layer adds, and coefficients of hidden states: those of random numbers make a table of GELU in
# float16, as llama.cpp has it, count for more and more.
ADDED = ("post_feedforward_layernorm.weight", "post_per_layer_input_norm.weight", "post_laurel_norm.weight")
COEFFICIENTS = ("correction_coefs.weight", "prediction_coefs.weight")


def test_layers_without_keys_take_those_that_llama_cpp_takes(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    model = pico_model("gemma3n", tmp_path / "model", **(SIZES | SHARING_KEYS))
    path = model / "model.safetensors"
    tensors = load_file(path)
    small = {name: tensor / 100 for name, tensor in tensors.items() if name.endswith((*ADDED, *COEFFICIENTS))}
    save_file(tensors | small, path, {"format": "pt"})
    *_, logits = verify(run(recipe(model, tmp_path / "out")), "llama.cpp-float32")
    assert logits.passed, logits


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_kv_shared_layers": 0}, "gives the first 20 layers of gemma3n keys of their own, and this model 30"),
        (
            {"layer_types": [*["sliding_attention"] * 5, "full_attention"] * 5},
            "a window and then one without, and in this model these are .'sliding_attention', 'sliding_attention'",
        ),
        ({"activation_sparsity_pattern": [0.0] * 30}, "sets 95% of the activations to 0 in the first 10 layers"),
        ({"intermediate_size": [992] * 29 + [1984]}, "wants the same intermediate_size in all layers of gemma3n"),
        ({"intermediate_size": 736}, "less than 768 columns, and this model has intermediate_size = 736"),
        ({"altup_num_inputs": 2}, "computes gemma3n with altup_num_inputs = 4, and here it is 2"),
        ({"laurel_rank": 32}, "computes gemma3n with laurel_rank = 64, and here it is 32"),
        ({"hidden_size_per_layer_input": 64}, "gemma3n with hidden_size_per_layer_input = 256, and here it is 64"),
        ({"attention_bias": True}, "no place for the biases of gemma3n, which attention_bias gives it"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        check_config(layout_of(config_of("gemma3n", **(SHARING_KEYS | changes))))


def test_a_model_of_few_layers_shares_no_keys() -> None:
    few = {"intermediate_size": 992}
    check_config(layout_of(config_of("gemma3n", **few)))
    with pytest.raises(PlanError, match="keys of their own, and this model 1"):
        check_config(
            layout_of(config_of("gemma3n", num_kv_shared_layers=1, layer_types=["sliding_attention"] * 2, **few))
        )
