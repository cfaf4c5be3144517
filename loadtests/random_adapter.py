"""Makes random LoRA adapters for a model's shapes, without torch, for benchmarks to upload."""

import json
import random
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RANK = 16
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")  # of Phi-3
PARAMETERS = ("experts.gate_up_proj", "experts.down_proj")  # of a layer's experts, each one parameter for PEFT
GRANITE_MOE = ("granitemoe", "granitemoeshared")

# The upper byte of a bfloat16 is its sign and seven bits of its exponent. This table keeps the sign and sets an
# exponent for magnitudes between 2^-7 and 2^-5: never zero, and small enough that activations stay finite.
UPPER_BYTE = bytes(byte & 0x80 | 0x3C for byte in range(256))


def adapter_config(
    rank: int = RANK, invocation: Sequence[int] | None = None, model_config: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return the fields that PEFT and other servers need to read the adapter; an `invocation` makes it an aLoRA.

    It adapts all projections of the model, by default of one without fused ones and without experts.
    """
    activated: dict[str, Any] = {} if invocation is None else {"alora_invocation_tokens": list(invocation)}
    modules: tuple[str, ...] = (*ATTENTION, *MLP)
    if model_config is not None and model_config.get("model_type") == "phi3":
        modules = FUSED
    if model_config is not None and experts_of(model_config):
        modules = ATTENTION
        if invocation is None:
            activated["target_parameters"] = list(PARAMETERS)
    return {
        **activated,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(modules),
        "inference_mode": True,
    }


def write_adapter(directory: Path, model_config: dict[str, Any], seed: int, rank: int = RANK) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` to `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(adapter_config(rank, model_config=model_config)))
    (directory / "adapter_model.safetensors").write_bytes(adapter_file(model_config, seed, rank))


def adapter_file(
    model_config: dict[str, Any], seed: int, rank: int = RANK, invocation: Sequence[int] | None = None
) -> bytearray:
    """Return a safetensors file (bfloat16, all projections) with its configuration in the metadata.

    An aLoRA and a plain LoRA of the same seed have the same weights, except that there is no aLoRA of experts.
    """
    rng = random.Random(seed)
    config = json.dumps(adapter_config(rank, invocation, model_config))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "adapter_config": config}}
    end = 0
    shapes = tensor_shapes(model_config, rank)
    if invocation is not None:
        shapes = {name: shape for name, shape in shapes.items() if ".experts." not in name}
    for name, shape in sorted(shapes.items()):
        start, end = end, end + 2 * shape[0] * shape[1]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return bytearray(struct.pack("<Q", len(encoded)) + encoded) + random_bfloat16(rng, end // 2)


def number_file(file: bytearray, number: int) -> None:
    """Write a number into the low bits of an adapter file's last four weights, so that its digest is unique."""
    file[-8::2] = struct.pack("<I", number)


def tensor_shapes(model_config: dict[str, Any], rank: int) -> dict[str, tuple[int, int]]:
    """Return the shapes of A (rank, in) and B (out, rank) of every projection, under PEFT's names.

    Of a model with experts in every layer those of all experts are one A (experts · rank, in) and one B.
    """
    hidden, inner = model_config["hidden_size"], model_config["intermediate_size"]
    heads = model_config["num_attention_heads"]
    head_dim = model_config.get("head_dim") or hidden // heads
    q, kv = heads * head_dim, (model_config.get("num_key_value_heads") or heads) * head_dim
    attention = {"q_proj": (hidden, q), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (q, hidden)}
    mlp = {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
    if model_config.get("model_type") == "phi3":
        attention = {"qkv_proj": (hidden, q + 2 * kv), "o_proj": (q, hidden)}
        mlp = {"gate_up_proj": (hidden, 2 * inner), "down_proj": (inner, hidden)}
    ranks = {f"self_attn.{name}": (*shape, rank) for name, shape in attention.items()}
    experts = experts_of(model_config)
    if experts:
        inner = model_config.get("moe_intermediate_size") or inner
        holder = "block_sparse_moe.experts" if model_config.get("model_type") in GRANITE_MOE else "mlp.experts"
        ranks |= {f"{holder}.base_layer": (hidden, 2 * inner, experts * rank), holder: (inner, hidden, experts * rank)}
    else:
        ranks |= {f"mlp.{name}": (*shape, rank) for name, shape in mlp.items()}
    shapes = {}
    for layer in range(model_config["num_hidden_layers"]):
        for module, (in_features, out_features, rows) in ranks.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            shapes[f"{prefix}.lora_A.weight"] = (rows, in_features)
            shapes[f"{prefix}.lora_B.weight"] = (out_features, rows)
    return shapes


def experts_of(model_config: dict[str, Any]) -> int:
    """Return how many experts each layer of a model has; 0: it has MLPs."""
    return int(model_config.get("num_experts") or model_config.get("num_local_experts") or 0)


def random_bfloat16(rng: random.Random, count: int) -> bytes:
    values = bytearray(2 * count)
    values[0::2] = rng.randbytes(count)
    values[1::2] = rng.randbytes(count).translate(UPPER_BYTE)
    return bytes(values)
