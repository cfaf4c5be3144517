"""Adapters of mlx-lm: y += scale·(x·a)·b with a (in, r) and b (r, out), which are PEFT's A and B turned."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from runtime.adapter_format.errors import CORRECT, MERGE, InvalidAdapter, shown

_LEAVES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
_EMBEDDING_LEAVES = {"lora_a": "lora_embedding_A", "lora_b": "lora_embedding_B"}


def from_mlx(
    tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the tensors and the configuration as PEFT has them. Raises InvalidAdapter."""
    if config.get("fine_tune_type", "lora") != "lora":
        kind = shown(config["fine_tune_type"])
        raise InvalidAdapter("fine_tune_type", f"is {kind}", "train with --fine-tune-type lora")
    scale = _scale(config.get("lora_parameters"))
    turned, ranks = {}, {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf not in _LEAVES or tensor.ndim != 2:
            shape = list(tensor.shape)
            raise InvalidAdapter(name, f"has shape {shape}, and only lora_a and lora_b of linears are converted", MERGE)
        leaves = _EMBEDDING_LEAVES if module.endswith("embed_tokens") else _LEAVES
        turned[f"{module}.{leaves[leaf]}"] = np.ascontiguousarray(tensor.T)
        if leaf == "lora_a":
            ranks[module] = tensor.shape[1]
    if not ranks:
        raise InvalidAdapter("adapters.safetensors", "has no lora_a", "give the directory that mlx-lm trained to")
    r = max(ranks.values())
    return turned, {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": scale * r,
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != r},
        "alpha_pattern": {module: scale * rank for module, rank in ranks.items() if rank != r},
        "target_modules": sorted(ranks),
        "base_model_name_or_path": config.get("model"),
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }


def _scale(parameters: object) -> float:
    scale = parameters.get("scale") if isinstance(parameters, Mapping) else None
    if isinstance(scale, bool) or not isinstance(scale, int | float) or scale <= 0:
        raise InvalidAdapter("lora_parameters", f"is {shown(parameters)}, expected rank and a positive scale", CORRECT)
    assert isinstance(parameters, Mapping)
    if "alpha" in parameters:
        why = "early versions of mlx-lm multiply scale by alpha/rank, later ones ignore alpha"
        raise InvalidAdapter("lora_parameters", f"has alpha: {why}", "remove it, and set scale to what multiplies")
    return float(scale)
