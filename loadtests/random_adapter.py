"""Makes random LoRA adapters for a model's shapes, without torch, for benchmarks to upload."""

import json
import random
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RANK = 16
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# The upper byte of a bfloat16 is its sign and seven bits of its exponent. This table keeps the sign and sets an
# exponent for magnitudes between 2^-7 and 2^-5: never zero, and small enough that activations stay finite.
UPPER_BYTE = bytes(byte & 0x80 | 0x3C for byte in range(256))


def adapter_config(rank: int = RANK, invocation: Sequence[int] | None = None) -> dict[str, Any]:
    """Return the fields that PEFT and other servers need to read the adapter; an `invocation` makes it an aLoRA."""
    activated = {} if invocation is None else {"alora_invocation_tokens": list(invocation)}
    return {
        **activated,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(PROJECTIONS),
        "inference_mode": True,
    }


def write_adapter(directory: Path, model_config: dict[str, Any], seed: int, rank: int = RANK) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` to `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(adapter_config(rank)))
    (directory / "adapter_model.safetensors").write_bytes(adapter_file(model_config, seed, rank))


def adapter_file(
    model_config: dict[str, Any], seed: int, rank: int = RANK, invocation: Sequence[int] | None = None
) -> bytearray:
    """Return a safetensors file (bfloat16, all seven projections) with its configuration in the metadata.

    An aLoRA and a plain LoRA of the same seed have the same weights.
    """
    rng = random.Random(seed)
    config = json.dumps(adapter_config(rank, invocation))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "adapter_config": config}}
    end = 0
    for name, shape in sorted(tensor_shapes(model_config, rank).items()):
        start, end = end, end + 2 * shape[0] * shape[1]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return bytearray(struct.pack("<Q", len(encoded)) + encoded) + random_bfloat16(rng, end // 2)


def number_file(file: bytearray, number: int) -> None:
    """Write a number into the low bits of an adapter file's last four weights, so that its digest is unique."""
    file[-8::2] = struct.pack("<I", number)


def tensor_shapes(model_config: dict[str, Any], rank: int) -> dict[str, tuple[int, int]]:
    """Return the shapes of A (rank, in) and B (out, rank) of every projection, under PEFT's names."""
    hidden, inner = model_config["hidden_size"], model_config["intermediate_size"]
    heads = model_config["num_attention_heads"]
    head_dim = model_config.get("head_dim") or hidden // heads
    q, kv = heads * head_dim, (model_config.get("num_key_value_heads") or heads) * head_dim
    sizes = {
        "self_attn.q_proj": (hidden, q),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (q, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    shapes = {}
    for layer in range(model_config["num_hidden_layers"]):
        for module, (in_features, out_features) in sizes.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            shapes[f"{prefix}.lora_A.weight"] = (rank, in_features)
            shapes[f"{prefix}.lora_B.weight"] = (out_features, rank)
    return shapes


def random_bfloat16(rng: random.Random, count: int) -> bytes:
    values = bytearray(2 * count)
    values[0::2] = rng.randbytes(count)
    values[1::2] = rng.randbytes(count).translate(UPPER_BYTE)
    return bytes(values)
