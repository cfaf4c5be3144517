"""Turns what training programs leave into the two files of PEFT that an upload takes."""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from runtime.adapter_format.errors import MERGE, InvalidAdapter, shown
from runtime.adapter_format.patterns import Question, answers
from runtime.adapter_format.safetensors_header import exact_json_object, write_header
from runtime.adapter_format.weight_dtypes import NAMES
from runtime.conversion.mlx import from_mlx
from runtime.conversion.stored_weights import WHOLE, stored_weights
from runtime.output.progress import progress

CONFIG = "adapter_config.json"
BESIDE = ("chat_template.jinja", "tokenizer_config.json")  # an upload takes them too
PREFIX = "base_model.model."

# What parallel training and compilation put into the names of modules
_WRAPPERS = re.compile(r"(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
# A vision-language model has the language model in a part of its own
_LANGUAGE_MODEL = re.compile(r"^(?:model\.)?language_model\.(?:model\.)?(?=layers\.|embed_tokens)")
_LANGUAGE_HEAD = re.compile(r"^(?:model\.)?language_model\.(?=lm_head)")
_OTHER_PARTS = re.compile(r"(?:model\.)?(?:visual|vision_\w+|multi_modal_projector|audio_\w+|embed_vision)\.")
_TENSOR = re.compile(r"(?P<module>.+)\.(?P<leaf>lora_(?:embedding_)?[AB])(?:\.(?!weight$|bias$)\w+)?(?P<kind>\.\w+)?")

Tokenize = Callable[[str], Sequence[int]]


def convert(source: Path, target: Path, tokenize: Tokenize | None = None, *, bars: bool = False) -> list[str]:
    """Write the adapter in `source` to the new directory `target`, and return what was done, a sentence each.

    `tokenize` turns the invocation of an old aLoRA into token ids; `bars` shows as a bar what is written. Raises
    InvalidAdapter for what cannot be converted exactly, by its name, OSError; then there is no `target`.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists already: name a directory that does not")
    if not (source / CONFIG).exists():
        raise InvalidAdapter(CONFIG, f"is not in {source}", "copy it from where PEFT's save_pretrained put the weights")
    config = exact_json_object((source / CONFIG).read_bytes(), CONFIG)
    weights = stored_weights(source)
    tensors, done = weights.tensors, [weights.said]
    if weights.is_mlx:
        tensors, config = from_mlx(tensors, config)
        done.append(f"turned mlx's a and b; lora_alpha is scale·r = {config['lora_alpha']:g}")
    tensors, config = _renamed(tensors, config, done)
    config = _with_tokens(config, tokenize, done)
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as directory:
        unfinished = Path(directory) / target.name
        unfinished.mkdir()
        _write(tensors, unfinished / WHOLE, bars=bars)
        (unfinished / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
        for name in BESIDE:
            if (source / name).is_file():
                shutil.copyfile(source / name, unfinished / name)
        unfinished.rename(target)
    return [*done, f"wrote {len(tensors)} tensors and {CONFIG} to {target}"]


def _renamed(
    tensors: Mapping[str, np.ndarray], config: dict[str, Any], done: list[str]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Give tensors the names of a plain language model, and the configuration the same names."""
    result: dict[str, np.ndarray] = {}
    modules: dict[str, str] = {}  # the old name of each module whose tensors stay
    left_out = 0
    for name, tensor in tensors.items():
        plain = _WRAPPERS.sub("", name.removeprefix(PREFIX))
        if _OTHER_PARTS.match(plain):
            left_out += 1
            continue
        new = _LANGUAGE_HEAD.sub("", _LANGUAGE_MODEL.sub("model.", plain, 1), 1)
        if (match := _TENSOR.fullmatch(new)) is not None:
            new = f"{match['module']}.{match['leaf']}{match['kind'] or ''}"
            modules[match["module"]] = plain.partition(".lora_")[0]
        if f"{PREFIX}{new}" in result:
            raise InvalidAdapter(name, f"has the same name as another tensor, {new}", "save one adapter alone")
        result[f"{PREFIX}{new}"] = tensor
    if left_out:
        done.append(f"left out {left_out} tensors of parts that see or hear, which no text goes through")
    if not modules:
        raise InvalidAdapter("weights", "have no lora_A and lora_B of a language model", "give the adapter of one")
    if not left_out and all(new == old for new, old in modules.items()):
        return result, config
    done.append("named the modules as in the language model alone, in the tensors and in the configuration")
    return result, config | _explicit(result, modules, config)


def _explicit(tensors: Mapping[str, np.ndarray], modules: Mapping[str, str], config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a configuration that select modules, without patterns: the patterns have the old names."""
    alphas = config.get("alpha_pattern") or {}
    if not isinstance(alphas, dict):
        raise InvalidAdapter("alpha_pattern", f"is {shown(alphas)}, expected an object of module name patterns")
    values = [*alphas.values()]
    [found] = answers((Question("alpha_pattern", tuple(alphas), r"(.*\.)?(", ")$"),), tuple(modules.values()))
    ranks = {
        module: next(t.shape[0] for n, t in tensors.items() if n.startswith(f"{PREFIX}{module}.lora_") and "_A" in n)
        for module in modules
    }
    return {
        "target_modules": sorted(modules),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != config.get("r")},
        "alpha_pattern": {m: values[f[0]] for m, f in zip(modules, found, strict=True) if f is not None},
    }


def _with_tokens(config: dict[str, Any], tokenize: Tokenize | None, done: list[str]) -> dict[str, Any]:
    """Replace the invocation of an aLoRA of IBM's first format by tokens: that became active one token later."""
    text = config.get("invocation_string")
    if text is None:
        return config
    if not isinstance(text, str):
        raise InvalidAdapter("invocation_string", f"is {shown(text)}, expected a string")
    if tokenize is None:
        raise InvalidAdapter("invocation_string", "needs the base's tokenizer", "give its directory with --tokenizer")
    tokens = [*tokenize(text)][1:]
    if not tokens:
        raise InvalidAdapter("invocation_string", f"{shown(text)!r} is one token, and it was active after that", MERGE)
    done.append(f"alora_invocation_tokens = {tokens}, of the invocation string without its first token")
    rest = {name: value for name, value in config.items() if name != "invocation_string"}
    return rest | {"alora_invocation_tokens": tokens, "peft_type": "LORA"}


def _write(tensors: Mapping[str, np.ndarray], path: Path, *, bars: bool) -> None:
    header = write_header({n: (NAMES[t.dtype], t.shape) for n, t in tensors.items()}, {"format": "pt"})
    with path.open("xb") as file:
        file.write(header)
        for tensor in progress(tensors.values(), "writing the tensors", bars=bars, unit="tensor"):
            file.write(np.ascontiguousarray(tensor).data)
