"""Small adapters as a client sends them, and the model that they are for."""

import json
from typing import Any

import numpy as np
from safetensors.numpy import save

from runtime.models.config import ModelConfig, RopeConfig

TINY = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_position=128,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=10000.0),
    tie_embeddings=True,
)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Files = dict[str, tuple[str, bytes]]


def tensors(seed: int = 0, rank: int = 2, module: str = "q_proj", out: int = 16) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    prefix = f"base_model.model.model.layers.0.self_attn.{module}"
    return {
        f"{prefix}.lora_A.weight": random.standard_normal((rank, 16)).astype(np.float32),
        f"{prefix}.lora_B.weight": random.standard_normal((out, rank)).astype(np.float32),
    }


def config(rank: int = 2, **fields: Any) -> bytes:
    written = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    return json.dumps(
        written | {"use_dora": False, "loftq_config": {}, "alora_invocation_tokens": None} | fields
    ).encode()


def bundle(seed: int = 0) -> tuple[bytes, bytes]:
    """An adapter's two files: the configuration and the weights."""
    return config(), save(tensors(seed))


def multipart(config_file: bytes, weights: bytes) -> Files:
    return {CONFIG: (CONFIG, config_file), WEIGHTS: (WEIGHTS, weights)}
