"""Configurations of which llama.cpp would compute something else than they say are refused."""

from typing import Any

import pytest

from dashq import PlanError
from dashq_plugins.formats.gguf.checks import check_config
from dashq_plugins.formats.gguf.names import layout_of
from gguf_results import SIZES, YARN, config_of
from pico import PLAIN_ROPE


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("llama", {"hidden_act": "gelu"}, "llama.cpp computes silu in llama, and this model gelu"),
        ("qwen3_moe", {"norm_topk_prob": False}, "lets the weights .* add up to 1, and this model does not"),
        ("qwen2_moe", {"norm_topk_prob": True}, "does not let the weights .* add up to 1, and this model does"),
        (
            "olmoe",
            {"num_key_value_heads": 4, "clip_qkv": 0.5},
            "computes olmoe with clip_qkv = None, and here it is 0.5",
        ),
        ("olmoe", {}, "as many heads of keys as of queries in olmoe"),
        ("smollm3", {"no_rope_layer_interval": 2}, "all layers of smollm3 but every 4th, and this model others"),
        ("stablelm", {"qk_layernorm": True}, "cannot write norms of queries and keys of each head"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "llama.cpp computes gpt-oss with swiglu_limit = 7.0, and here it is 5.0"),
        ("cohere", {"use_qk_norm": True}, "cannot write norms of queries and keys of each head"),
        ("cohere", {"attention_bias": True}, "no place for the biases of command-r, which attention_bias gives it"),
        ("qwen3", {"attention_bias": True}, "no place for the biases of qwen3, which attention_bias gives it"),
        ("olmo3", {"attention_bias": True}, "no place for the biases of olmo2, which attention_bias gives it"),
        ("seed_oss", {"attention_out_bias": True}, "no place for the biases of seed_oss, which attention_out_bias"),
        ("smollm3", {"mlp_bias": True}, "no place for the biases of smollm3, which mlp_bias gives it"),
        ("ernie4_5", {"use_bias": True}, "no place for the biases of ernie4_5, which use_bias gives it"),
        ("glm4_moe", {"n_group": 2}, "among all experts in glm4moe, and this model in 2 groups"),
        ("dots1", {"n_group": 2}, "among all experts in dots1, and this model in 2 groups"),
        (
            "hunyuan_v1_moe",
            {"moe_topk": [1, 2]},
            r"same num_experts_per_tok in all layers, and .* \[1, 2\]",
        ),
        ("ernie4_5_moe", {"moe_layer_end_index": 0}, "in all layers behind the first of ernie4_5-moe that has them"),
        ("exaone_moe", {"mlp_layer_types": ["sparse", "dense"]}, "in all layers behind the first of exaone-moe that"),
        ("falcon", {"alibi": True}, "llama.cpp computes falcon with alibi = False, and here it is True"),
        ("dots1", {"n_shared_experts": 0}, "wants experts that all tokens have in dots1, and this model has none"),
        ("deepseek_v3", {"n_shared_experts": 0}, "experts that all tokens have in deepseek2, and this model has none"),
        ("afmoe", {"num_shared_experts": 0}, "wants experts that all tokens have in afmoe, and this model has none"),
        ("gpt_neox", {"attention_bias": False}, "computes gptneox with attention_bias = True, and here it is False"),
        ("gpt2", {"activation_function": "relu"}, "llama.cpp computes gelu_new in gpt2, and this model relu"),
        ("gpt_neox", {"tie_word_embeddings": True}, "a head of its own in gptneox, and this model's embeddings serve"),
        ("olmo", {"attention_bias": True}, "no place for the biases of olmo, which attention_bias gives it"),
        (
            "olmo3",
            {"rope_parameters": {"full_attention": PLAIN_ROPE, "sliding_attention": YARN}},
            "embeddings of type 'yarn' in layers with a window",
        ),
        (
            "olmo3",
            {"rope_parameters": {"full_attention": PLAIN_ROPE, "sliding_attention": PLAIN_ROPE | {"rope_theta": 1e3}}},
            "turns all layers of olmo2 by one base, and this model those with a window by 1000.0 and others by 10000.0",
        ),
        ("gemma2", {"final_logit_softcapping": None}, "caps the logits, and those of attention, in gemma2"),
        ("gemma4", {"use_bidirectional_attention": "all"}, "see those before them alone in gemma4, and this model all"),
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
