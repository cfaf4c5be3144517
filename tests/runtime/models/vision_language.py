"""Tiny random vision-language checkpoints, written by transformers itself."""

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.runtime.models.families import DERIVED, GEMMA, LOCAL_AND_GLOBAL, SHAPE

TEXT: dict[str, Any] = {key: value for key, value in (SHAPE | DERIVED).items() if key != "head_dim"}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
MROPE = {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [2, 3, 3]}
# By the family of the text: architecture, configuration, text, the part that sees images, other fields
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        "Gemma3",
        TEXT | GEMMA | {"head_dim": 16, "rope_parameters": LOCAL_AND_GLOBAL, "model_type": "gemma3_text"},
        VISION,
        {"mm_tokens_per_image": 4, "image_token_index": 130, "tie_word_embeddings": True},
    ),
    "mistral3": (
        "Mistral3",
        TEXT | {"head_dim": 16, "sliding_window": None, "model_type": "mistral"},
        VISION | {"head_dim": 8, "model_type": "pixtral"},
        {"image_token_index": 130, "tie_word_embeddings": False},
    ),
    "qwen2.5-vl": (
        "Qwen2_5_VL",
        TEXT | {"rope_parameters": MROPE},
        {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64},
        {"image_token_id": 130, "video_token_id": 129, "vision_start_token_id": 128, "tie_word_embeddings": False},
    ),
}
# Of the names in a saved checkpoint; with the new ones it has those of the module itself
NAMES_OF_THE_MODULE = {
    "language_model.model.": "model.language_model.",
    "model.layers.": "model.language_model.layers.",
    "model.embed_tokens.": "model.language_model.embed_tokens.",
    "model.norm.": "model.language_model.norm.",
    "language_model.lm_head.": "lm_head.",
    "visual.": "model.visual.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}


def write_vision_language(name: str, directory: Path) -> torch.nn.Module:
    """Write a tiny model to the directory and return it, in float32."""
    family, text, vision, others = MODELS[name]
    config = getattr(transformers, f"{family}Config")(text_config=text, vision_config=vision, **others)
    config._attn_implementation = "eager"
    torch.manual_seed(7)
    model: torch.nn.Module = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() == 1 else 0.1))
    model.save_pretrained(directory)
    return model


def respell(directory: Path, spelling: dict[str, str]) -> None:
    """Give the tensors of a checkpoint other names, by their beginnings."""
    path = directory / "model.safetensors"
    tensors = load_file(path)

    def respelled(name: str) -> str:
        old = next((old for old in spelling if name.startswith(old)), None)
        return name if old is None else spelling[old] + name.removeprefix(old)

    save_file({respelled(name): tensor for name, tensor in tensors.items()}, path)
