"""The smallest real tokenizer and models, for tests to share: no download and no network."""

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}</s>{% endfor %}"


def pico_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens, learned from a few topics of Python's help; it loses no text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([topics[name] for name in ("assert", "if", "while")], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", chat_template=CHAT_TEMPLATE)


def beginning_tokenizer(*beginning: str) -> PreTrainedTokenizerFast:
    """The tokenizer of `pico_tokenizer`, with `<s>` for the beginning; it begins each text with these tokens."""
    tokenizer = pico_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": [*{*beginning} - {"<s>"}]})
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in beginning]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=[*beginning, "$A"], pair=[*beginning, "$A", *beginning, "$B"], special_tokens=ids
    )
    return tokenizer


def character_tokenizer(prefix: bool) -> PreTrainedTokenizerFast:
    """A byte-pair encoding of characters with bytes to fall back on, as of Llama-2 or Gemma."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Prepend("▁")] * prefix
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=310, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["▁while▁the▁whole▁width▁is▁white"] * 3, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


# Sizes that divide by 16 and not by 32, so that group sizes are never right by accident.
SMALL = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # wide enough that the blocks matter
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
# Blocks of two kinds, with attention and without.
MAMBA: dict[str, object] = {
    "mamba_d_state": 16,
    "mamba_n_heads": 6,
    "mamba_d_head": 16,
    "mamba_dt_rank": 16,
    "mamba_chunk_size": 16,
}
DELTA: dict[str, object] = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-untied-biased": ("LlamaConfig", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {"sliding_window": 16}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "phi3": ("Phi3Config", {"original_max_position_embeddings": 256}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 16, "sliding_window_pattern": 2}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "opt": ("OPTConfig", {"ffn_dim": 80, "word_embed_proj_dim": 48}),
    "gpt2": ("GPT2Config", {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_inner": 80, "n_positions": 256}),
    "bloom": ("BloomConfig", {"n_layer": 3, "n_head": 4}),
    "bamba": ("BambaConfig", MAMBA | {"attn_layer_indices": [1]}),
    "falcon_h1": ("FalconH1Config", MAMBA | {"mamba_d_ssm": 96}),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False}),
    "olmo_hybrid": ("OlmoHybridConfig", DELTA),
    "mamba2": ("Mamba2Config", {"state_size": 16, "num_heads": 6, "head_dim": 16, "n_groups": 1, "chunk_size": 16}),
}
EXPERTS: dict[str, object] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT: dict[str, object] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
DEEPSEEK = LATENT | EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1}
LOCAL: dict[str, object] = {"num_local_experts": 4, "num_experts_per_tok": 2}
GROUPED: dict[str, object] = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4}
# Every mixture has shared experts, dense blocks, groups, biases or transposed weights of its own.
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MIXTURES: dict[str, tuple[str, dict[str, object]]] = {
    "mixtral": ("MixtralConfig", LOCAL),
    "qwen2_moe": ("Qwen2MoeConfig", EXPERTS | {"shared_expert_intermediate_size": 64, "mlp_only_layers": [1]}),
    "qwen3_moe": ("Qwen3MoeConfig", EXPERTS | {"head_dim": 16, "norm_topk_prob": True}),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v2": ("DeepseekV2Config", DEEPSEEK | GROUPED | {"topk_method": "group_limited_greedy"}),
    "deepseek_v3": ("DeepseekV3Config", DEEPSEEK | GROUPED),
    "phimoe": ("PhimoeConfig", LOCAL),
    "gpt_oss": ("GptOssConfig", LOCAL | {"head_dim": 16, "sliding_window": 16, "rope_parameters": PLAIN_ROPE}),
    "llama4": (
        "Llama4TextConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 16, "intermediate_size_mlp": 64},
    ),
    "jamba": ("JambaConfig", MAMBA | {"num_experts": 4, "attn_layer_period": 3, "attn_layer_offset": 1}),
    "kimi_linear": (
        "KimiLinearConfig",
        DEEPSEEK
        | {"q_lora_rank": None, "num_local_experts": 4, "num_key_value_heads": 4, "linear_head_dim": 16}
        | {
            "linear_num_heads": 3,
            "layer_types": DELTA["layer_types"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        MAMBA | LOCAL | {"shared_intermediate_size": 64, "layer_types": ["mamba", "attention", "mamba"]},
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        EXPERTS | DELTA | {"head_dim": 16, "shared_expert_intermediate_size": 64},
    ),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        EXPERTS | {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    ),
    "nemotron_h": (
        "NemotronHConfig",
        EXPERTS
        | {"layers_block_type": ["mamba", "moe", "attention", "mlp"], "num_hidden_layers": 4, "n_routed_experts": 4}
        | {"ssm_state_size": 16, "mamba_num_heads": 6, "mamba_head_dim": 16, "n_groups": 2, "chunk_size": 16}
        | {"head_dim": 16, "moe_shared_expert_intermediate_size": 32},
    ),
    "minimax": ("MiniMaxConfig", LOCAL | {"block_size": 16, "head_dim": 16, "layer_types": DELTA["layer_types"]}),
    "bailing_hybrid": (
        "BailingHybridConfig",
        DEEPSEEK | GROUPED | {"num_local_experts": 4, "head_dim": 16, "layer_group_size": 2},
    ),
}
# Blocks that share a transformer, or hand each other what they attend to.
NOT_ALONE: dict[str, tuple[str, dict[str, object]]] = {
    "zamba2": (
        "Zamba2Config",
        MAMBA
        | {"num_hidden_layers": 4, "num_key_value_heads": 4, "n_mamba_heads": 6, "chunk_size": 16, "adapter_rank": 16}
        | {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    ),
    "glm_moe_dsa": (
        "GlmMoeDsaConfig",
        DEEPSEEK
        | {"num_key_value_heads": 4, "index_topk": 16, "index_head_dim": 16, "index_n_heads": 2, "head_dim": 16}
        | {"mlp_layer_types": ["dense", "sparse", "sparse"], "indexer_types": ["full", "shared", "full"]},
    ),
}
FAMILIES |= MIXTURES
# Families of which more is asked than that they are read as any other.
IN_GGUF: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("GemmaConfig", {"head_dim": 16}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}),
    "granite": (
        "GraniteConfig",
        {"embedding_multiplier": 1.5, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    ),
    "smollm3": ("SmolLM3Config", {"no_rope_layer_interval": 4}),
    "olmo2": ("Olmo2Config", {}),
    "seed_oss": ("SeedOssConfig", {"head_dim": 16}),
    "starcoder2": ("Starcoder2Config", {}),
    "stablelm": ("StableLmConfig", {}),
    "nemotron": ("NemotronConfig", {}),
    "arcee": ("ArceeConfig", {}),
    "gemma4": (
        "Gemma4TextConfig",
        {
            "head_dim": 8,
            "global_head_dim": 16,
            "sliding_window": 16,
            "vocab_size_per_layer_input": 320,
            "hidden_size_per_layer_input": 0,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gemma4_unified": (
        "Gemma4UnifiedTextConfig",
        {
            "head_dim": 8,
            "global_head_dim": 16,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "glm4": ("Glm4Config", {"head_dim": 16, "attention_bias": True}),
    "glm4_moe": (
        "Glm4MoeConfig",
        {
            "head_dim": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 2.5,
            "use_qk_norm": True,
        },
    ),
    "ernie4_5": ("Ernie4_5Config", {"head_dim": 16}),
    "exaone4": (
        "Exaone4Config",
        {"sliding_window": None, "sliding_window_pattern": None, "layer_types": ["full_attention"] * 2},
    ),
    "cohere": ("CohereConfig", {"logit_scale": 0.5}),
    "cohere2": ("Cohere2Config", {"logit_scale": 0.5, "sliding_window": 16}),
    "phi": ("PhiConfig", {}),
    # Queries grow in texts longer than the original context.
    "ministral3": (
        "Ministral3Config",
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 8,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.5,
            },
        },
    ),
}
ROUTED: dict[str, object] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
FACTORS = {"embedding_multiplier": 1.5, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}
IN_GGUF |= {
    "olmo": ("OlmoConfig", {"clip_qkv": 0.5}),
    "olmo3": ("Olmo3Config", {"sliding_window": 16}),
    "granitemoe": ("GraniteMoeConfig", LOCAL | FACTORS),
    "granitemoeshared": ("GraniteMoeSharedConfig", LOCAL | FACTORS | {"shared_intermediate_size": 64}),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        # With 32 inside, a token lies so near to two experts that rounded inputs choose the other one.
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64, "moe_num_shared_experts": 2},
    ),
    "dots1": (
        "Dots1Config",
        ROUTED
        | {
            "n_routed_experts": 4,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "head_dim": 16,
        }
        | {"routed_scaling_factor": 2.5, "num_key_value_heads": 4},
    ),
    "hunyuan_v1_dense": ("HunYuanDenseV1Config", {"head_dim": 16, "rope_parameters": PLAIN_ROPE}),
    "hunyuan_v1_moe": (
        "HunYuanMoEV1Config",
        {"head_dim": 16, "num_experts": 4, "moe_topk": 2, "rope_parameters": PLAIN_ROPE},
    ),
    "jais2": ("Jais2Config", {"head_dim": 16}),
    "minimax_m2": ("MiniMaxM2Config", LOCAL | {"head_dim": 16}),
    "glm": ("GlmConfig", {"head_dim": 16}),
    "exaone_moe": (
        "ExaoneMoeConfig",
        EXPERTS | {"head_dim": 16, "num_shared_experts": 2, "sliding_window": 16, "first_k_dense_replace": 1},
    ),
    "afmoe": (
        "AfmoeConfig",
        EXPERTS
        | {"head_dim": 16, "num_shared_experts": 2, "num_dense_layers": 1, "sliding_window": 16}
        | {"mup_enabled": True, "route_scale": 2.5},
    ),
    "gpt_bigcode": ("GPTBigCodeConfig", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "falcon": ("FalconConfig", {"multi_query": True}),
    "falcon-grouped": ("FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "mpt": ("MptConfig", {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}),
    "cwm": ("CwmConfig", {"head_dim": 16, "sliding_window": 128, "rope_parameters": PLAIN_ROPE, "bos_token_id": 0}),
    "ministral": ("MinistralConfig", {"head_dim": 16, "sliding_window": 128}),
    "iquestcoder": ("IQuestCoderConfig", {"head_dim": 16}),
    "apertus": ("ApertusConfig", {"head_dim": 16, "rope_parameters": PLAIN_ROPE}),
    "mimo_v2_flash": (
        "MiMoV2FlashConfig",
        ROUTED
        | {"n_routed_experts": 4, "head_dim": 16, "v_head_dim": 8, "num_key_value_heads": 1, "sliding_window": 16}
        | {
            "rope_parameters": {
                "full_attention": PLAIN_ROPE | {"partial_rotary_factor": 0.5},
                "sliding_attention": PLAIN_ROPE | {"rope_theta": 1e3, "partial_rotary_factor": 0.5},
            }
        },
    ),
    # Much is granted: ranks of 64, inputs of 256 numbers for each layer, and a first 10 layers that are sparse.
    "gemma3n": (
        "Gemma3nTextConfig",
        {"head_dim": 16, "sliding_window": 16, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 310}
        | {"layer_types": ["sliding_attention", "full_attention"], "activation_sparsity_pattern": [0.95] * 2},
    ),
    "helium": ("HeliumConfig", {"head_dim": 16}),
    "internlm3": ("InternLM3Config", {"head_dim": 16}),
    "solar_open": (
        "SolarOpenConfig",
        {"head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
}
IN_GGUF |= {
    "glm4_moe_lite": ("Glm4MoeLiteConfig", DEEPSEEK | {"num_key_value_heads": 4, "routed_scaling_factor": 1.8}),
    "youtu": ("YoutuConfig", LATENT | {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "minicpm3": ("MiniCPM3Config", LATENT | {"num_key_value_heads": 4}),
}
# Value heads share key heads in twos, and each fills a block of 32 columns.
SHARING: dict[str, object] = {
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
THREE_POSITIONS: dict[str, object] = {
    "rope_parameters": PLAIN_ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
}
HYBRID: dict[str, object] = {
    "mamba_d_state": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
}
STATES: dict[str, object] = {"state_size": 16, "intermediate_size": 128, "tie_word_embeddings": True}
IN_GGUF |= {
    "mamba": ("MambaConfig", STATES),
    "falcon_mamba": ("FalconMambaConfig", STATES | {"mixer_rms_eps": 1e-5}),
}
SHARED_EXPERT: dict[str, object] = {"shared_expert_intermediate_size": 64}
IN_GGUF |= {
    "qwen3_5": ("Qwen3_5TextConfig", SHARING | THREE_POSITIONS),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", SHARING | THREE_POSITIONS | EXPERTS | SHARED_EXPERT),
}
# A mixture that was trained a little: its experts differ, and its routers choose.
TRAINED_MIXTURE = Path(__file__).parent / "data" / "mixture"
# Sizes that groups of 32 divide.
EVEN: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
# Sizes that every format can hold: rows of 256 columns are one super-block.
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}


def pico_model(family: str, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "5GB", **sizes: Any) -> Path:
    """Save a tiny random decoder of a family, with the tokenizer, in `folder`; returns the folder."""
    name, changes = (FAMILIES | NOT_ALONE | IN_GGUF)[family]
    config = getattr(transformers, name)(**(SMALL | changes | sizes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    vary_vectors(model)
    model.save_pretrained(folder, max_shard_size=shard)
    pico_tokenizer().save_pretrained(folder)
    return folder


def vary_vectors(model: torch.nn.Module) -> None:
    """Give norms and biases values of their own: they are born as ones and zeros, which would hide mistakes."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float(parameter.data.mean()), std=0.1)
    for name, buffer in model.named_buffers():
        if name.endswith(("correction_bias", "expert_bias")):  # of experts' scores
            torch.nn.init.normal_(buffer, std=0.1)
