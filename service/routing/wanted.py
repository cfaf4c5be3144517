"""What a request asks for, read from its path, headers and body by a router that has no tokenizer."""

from collections.abc import Mapping
from typing import Any

import msgspec

from service.routing.choice import Wanted
from service.routing.heads import heads_of

FIELDS = ("lora_name", "name", "model", "lora_path", "adapter_id")  # of imports, and of generations
SAGEMAKER_HEADER = "x-amzn-sagemaker-adapter-identifier"
_decode = msgspec.json.Decoder(dict[str, Any]).decode


def wanted_of(path: str, headers: Mapping[str, str], body: bytes, base: str) -> Wanted:
    """What a request asks for; `base` is the name of the base model. What cannot be read asks for nothing."""
    if path.startswith("/adapters/"):
        return Wanted(_names(path.removeprefix("/adapters/").removesuffix("/load").removesuffix("/unload"), base))
    try:
        fields = _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        fields = {}
    named = [headers.get(SAGEMAKER_HEADER), *(fields.get(field) for field in FIELDS)]
    mix = fields.get("adapters")
    for value in (*named, *(mix if isinstance(mix, dict) else ())):
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str) and (names := _names(name, base)):
                return Wanted(names)
    return Wanted(heads=heads_of(fields.get("messages"), fields.get("prompt")))


def _names(name: str, base: str) -> tuple[str, ...]:
    """The adapters that a name may mean: itself, and without the digest behind it; none for the base."""
    own = name.removeprefix(f"{base}:")
    if own in (base, ""):
        return ()
    return tuple(dict.fromkeys((own, own.rpartition("@")[0] or own)))
