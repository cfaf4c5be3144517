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
}


def write_checkpoint(name: str, directory: Path, *, shard_size: str = "50GB", **settings: object) -> torch.nn.Module:
    """Write a family's tiny model to the directory and return it, in float32.

    `shard_size` is what transformers calls max_shard_size; other settings go into the model's configuration.
    """
    family, own = FAMILIES[name]
    values = {key: value for key, value in (SHAPE | own | settings).items() if (key, value) != ("head_dim", None)}
    torch.manual_seed(7)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases start as zeros and norms as ones, which would hide them
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory, max_shard_size=shard_size)
    return model
