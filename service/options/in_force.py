"""What is in force: each option's value and where it comes from, with secrets hidden, and what the engine decided."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from runtime.messages import Ready
from service.options.parser import Declared, Source, declared
from service.settings import Settings

HIDDEN = "(hidden)"
# What comes before the @ of a URL, and its query: both carry passwords and tokens
CREDENTIALS = re.compile(r"(?<=://)[^/?#\s]*@")
QUERY = re.compile(r"(://[^?#\s]*\?)[^#\s]+")

Value = str | int | float | bool | list[str] | None


class OptionInForce(msgspec.Struct, frozen=True, kw_only=True):
    value: Annotated[Value, Meta(description="null: it is not set, and the option's default in words holds")]
    source: Source | Literal["default"]


class EngineInForce(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine decided from its options, the model and the machine."""

    device: str
    kernels: Annotated[str, Meta(description="triton, compiled (with their instructions) or torch")]
    threads: Annotated[int | None, Meta(description="of a step on a CPU")]
    dtype: Annotated[str, Meta(description="of K/V, and of activations where the kernels round them")]
    weights: Annotated[str, Meta(description="how the base's weights are held")]
    max_model_len: Annotated[int, Meta(description="tokens of prompt and answer together")]
    max_running: Annotated[int, Meta(description="requests computed in one step")]
    max_batch_tokens: Annotated[int, Meta(description="tokens computed in one step")]
    vocab_size: int
    block_size: Annotated[int, Meta(description="tokens in a block of K/V")]
    blocks: Annotated[int, Meta(description="of K/V on the device")]
    host_blocks: Annotated[int, Meta(description="of K/V in host memory")]
    adapter_bytes: Annotated[int, Meta(description="device memory for adapters")]
    host_adapter_bytes: Annotated[int, Meta(description="host memory for adapters")]
    timings_ms: Annotated[dict[str, float], Meta(description="what was measured to choose the kernels")]


class ConfigInForce(msgspec.Struct, frozen=True, kw_only=True):
    """The options by name, without secrets; and the engine, null while none runs."""

    options: dict[str, OptionInForce]
    engine: EngineInForce | None


def config_in_force(settings: Settings, ready: Ready | None) -> ConfigInForce:
    """What is in force now; `ready` is what the engine said of itself."""
    options = {option.name: shown for option, shown in _options(settings)}
    return ConfigInForce(options=options, engine=None if ready is None else _engine(ready))


def _options(settings: Settings) -> Iterator[tuple[Declared, OptionInForce]]:
    for struct in (settings, settings.engine):
        for option in declared(type(struct)):
            value = getattr(struct, option.field)
            source: Source | Literal["default"] = settings.sources.get(option.field, "default")
            secret = option.option.secret and value is not None
            yield option, OptionInForce(value=HIDDEN if secret else _shown(value), source=source)


def _shown(value: Any) -> Value:
    if isinstance(value, tuple):
        return [without_credentials(str(item)) for item in value]
    shown: Value = without_credentials(str(value)) if isinstance(value, str | Path) else value
    return shown


def without_credentials(text: str) -> str:
    """A text in which the credentials of URLs are hidden."""
    return QUERY.sub(rf"\1{HIDDEN}", CREDENTIALS.sub(f"{HIDDEN}@", text))


def _engine(ready: Ready) -> EngineInForce:
    return EngineInForce(
        device=ready.device,
        kernels=ready.kernels,
        threads=ready.threads,
        dtype=ready.dtype,
        weights=ready.weights or ready.dtype,
        max_model_len=ready.max_model_len,
        max_running=ready.max_running,
        max_batch_tokens=ready.max_batch_tokens,
        vocab_size=ready.vocab_size,
        block_size=ready.block_size,
        blocks=ready.num_blocks,
        host_blocks=ready.num_host_blocks,
        adapter_bytes=ready.adapter_bytes,
        host_adapter_bytes=ready.host_adapter_bytes,
        timings_ms=ready.timings,
    )
