"""Tiny random checkpoints of every family, written by transformers itself."""

from pathlib import Path

import torch
import transformers

SHAPE = {
    "vocab_size": 131,
    "hidden_size": 60,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,  # large enough that attention and the gates are far from linear
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
ROPE = {"rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = ROPE | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GRANITE = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.4,
    "residual_multiplier": 0.6,
    "logits_scaling": 2.5,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0, 1.1, 1.3, 1.2, 1.4, 2.0],
    "long_factor": [1.5, 2.0, 2.5, 3.0, 5.0, 9.0],
}
# Rows of 16 bytes: torch's grouped products of bfloat16 take no others
EXPERTS = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "hidden_size": 64}
# Scores and logits that the caps bend; the same for a family that has none.
GEMMA = {
    "sliding_window": 17,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 5,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    "tie_word_embeddings": True,
}
LOCAL_AND_GLOBAL = {
    "full_attention": {"rope_type": "linear", "rope_theta": 900.0, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
# Head sizes follow from the hidden size where a family has no field for them.
DERIVED = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": None}

FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-multi-head": ("Llama", {"num_key_value_heads": 6}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}}),
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("Llama", {"rope_parameters": ROPE | {"rope_type": "yarn"}}),
    "llama-yarn-factor": (
        "Llama",
        {"rope_parameters": ROPE | {"rope_type": "yarn", "attention_factor": 0.7, "beta_fast": 2.0, "truncate": False}},
    ),
    "llama-yarn-edge": (
        "Llama",
        {"rope_parameters": ROPE | {"rope_type": "yarn", "rope_theta": 5.0, "beta_slow": 0.1}},
    ),
    "llama-yarn-mscale": (
        "Llama",
        {"rope_parameters": ROPE | {"rope_type": "yarn", "mscale": 1.4, "mscale_all_dim": 0.6, "beta_slow": 2.0}},
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", DERIVED),
    "qwen2-tied": ("Qwen2", DERIVED | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 24}),
    "qwen3-biased": ("Qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    "granite": ("Granite", DERIVED | GRANITE),
    "granite-biased": ("Granite", DERIVED | GRANITE | {"attention_bias": True, "mlp_bias": True}),
    "phi3": ("Phi3", DERIVED),
    "phi3-partial-longrope": (
        "Phi3",
        DERIVED
        | {"original_max_position_embeddings": 64, "rope_parameters": LONGROPE | {"partial_rotary_factor": 0.75}},
    ),
    "smollm3": ("SmolLM3", DERIVED | {"no_rope_layer_interval": 2}),
    "olmo2": ("Olmo2", DERIVED),
    "glm4": ("Glm4", {"attention_bias": True}),
    # Windows that are shorter than the tests' prompts, and no multiple of a block or of a tile
    "mistral-window": ("Mistral", {"sliding_window": 19}),
    "phi3-window": ("Phi3", DERIVED | {"sliding_window": 13}),
    "qwen2-window": ("Qwen2", DERIVED | {"sliding_window": 11, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3-moe": ("Qwen3Moe", EXPERTS | {"mlp_only_layers": [1], "norm_topk_prob": True}),
    "qwen3-moe-sparse-step": ("Qwen3Moe", EXPERTS | {"decoder_sparse_step": 2, "norm_topk_prob": False}),
    "mixtral-moe": (
        "Mixtral",
        {"num_local_experts": 5, "num_experts_per_tok": 2, "hidden_size": 64, "sliding_window": 19},
    ),
    "qwen2-moe": (
        "Qwen2Moe",
        EXPERTS | {"mlp_only_layers": [0], "shared_expert_intermediate_size": 40, "norm_topk_prob": True},
    ),
    "qwen2-moe-sparse-step": (
        "Qwen2Moe",
        EXPERTS | {"decoder_sparse_step": 2, "shared_expert_intermediate_size": 56, "qkv_bias": False},
    ),
    "granite-moe": (
        "GraniteMoe",
        DERIVED | GRANITE | {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 32},
    ),
    "granite-moe-shared": (
        "GraniteMoeShared",
        DERIVED
        | GRANITE
        | {"num_local_experts": 5, "num_experts_per_tok": 3, "attention_bias": True, "shared_intermediate_size": 48},
    ),
    "gpt-oss-moe": (
        "GptOss",
        {
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "hidden_size": 64,
            "sliding_window": 19,
            "swiglu_limit": 1.5,
            "rope_parameters": ROPE | {"rope_type": "yarn", "truncate": False},
        },
    ),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3": ("Gemma3", GEMMA | {"rope_parameters": LOCAL_AND_GLOBAL}),
}

# For the interpreted kernels: without experts, and without those that differ from others by numbers only
INTERPRETED = [
    name
    for name in FAMILIES
    if "moe" not in name and name not in ("llama-yarn-edge", "llama-yarn-mscale", "phi3-window", "qwen2-window")
]


def write_checkpoint(name: str, directory: Path, *, shard_size: str = "50GB", **settings: object) -> torch.nn.Module:
    """Write a family's tiny model to the directory and return it, in float32.

    `shard_size` is what transformers calls max_shard_size; other settings go into the model's configuration.
    """
    family, own = FAMILIES[name]
    values = {key: value for key, value in (SHAPE | own | settings).items() if (key, value) != ("head_dim", None)}
    torch.manual_seed(7)
    values["attn_implementation"] = "eager"  # the only one that caps scores
    model = getattr(transformers, f"{family}ForCausalLM")(_config(family, values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases start as zeros and norms as ones, which would hide them
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory, max_shard_size=shard_size)
    return model


def _config(family: str, values: dict[str, object]) -> transformers.PreTrainedConfig:
    """A family's configuration; Gemma 3's text has a name of its own."""
    name = "Gemma3Text" if family == "Gemma3" else family
    return getattr(transformers, f"{name}Config")(**values)
