"""Whether the base that an adapter's configuration names is this server's: its class is sure, its name a hint."""

import json
import re
from collections.abc import Sequence

from runtime.adapter_format.errors import ITS_BASE, InvalidAdapter, shown

# A directory of the hub's cache, which has the repository's name two levels up
_CACHED = re.compile(r"models--(?:[^/]*--)?(?P<name>[^/]+)/snapshots/[^/]+/*$")
# Copies of one model that only hold its weights in another form; training on them is training on the model
_COPY = re.compile(
    r"[-_.](?:unsloth|bnb|dynamic|[48]bits?|int[48]|w[48]a16|nf4|fp8|fp16|bf16|awq|gptq|hqq|mlx|hf|gguf|quantized|q[48](?:_\w+)?)$"
)
_VENDOR = re.compile(r"^meta-(?=llama)")
_CLASS = re.compile(r"(?P<family>\w+?)(?:For[A-Z]\w*|Model|LMHeadModel)")


def plain_name(name: str) -> str:
    """A model's name without its owner, the directory that it lies in, and the form of its weights."""
    cached = _CACHED.search(name)
    plain = (cached["name"] if cached else name.rstrip("/").rpartition("/")[2]).lower()
    while (shorter := _COPY.sub("", plain)) != plain:
        plain = shorter
    return _VENDOR.sub("", plain)


def base_warnings(claimed: str | None, names: Sequence[str], *, strict: bool) -> list[str]:
    """A warning if an adapter was trained on a model of another name; InvalidAdapter if `strict`."""
    if claimed is None or not names or plain_name(claimed) in {plain_name(name) for name in names}:
        return []
    text = f"is {json.dumps(shown(claimed))}, this server's base is {names[0]}"
    if strict:
        way = "set it to that if the adapter was trained on it, or serve without --strict-base"
        raise InvalidAdapter("base_model_name_or_path", text, way)
    return [f"base_model_name_or_path: {text}"]


def check_base_class(claimed: str | None, architecture: str) -> None:
    """Refuse an adapter of another family, whose shapes may fit by chance. A wrapper's class says nothing."""
    theirs, ours = _CLASS.fullmatch(claimed or ""), _CLASS.fullmatch(architecture)
    if theirs is not None and ours is not None and theirs["family"].lower() != ours["family"].lower():
        text = f"is {shown(claimed)}, this server's base is a {architecture}"
        raise InvalidAdapter("auto_mapping.base_model_class", text, ITS_BASE)
