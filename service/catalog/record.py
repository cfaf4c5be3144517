"""An adapter's name and content, as stored, as served, and as they arrive."""

import time
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec

from runtime.adapter_format.canonical import AdapterSummary
from runtime.messages import Tier

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z"


class AdapterRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a name points at, as the store keeps it.

    `base` is the digest of the base's shape it was checked against; `pin_tier` counts only while it is `pinned`.
    `invocation_tokens` are those of an aLoRA, None for plain LoRA; `leaves_kv` says that its K/V are the base's.
    """

    name: Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]
    digest: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
    generation: int
    kind: Literal["lora", "alora"]
    rank: int
    targets: list[str]
    bytes: int
    source: str
    created_at: float
    pinned: bool
    warnings: list[str]
    base: str
    pin_tier: Tier = "device"
    invocation_tokens: list[int] | None = None
    leaves_kv: bool = False

    @property
    def pin(self) -> Tier | None:
        return self.pin_tier if self.pinned else None


class AdapterVersion:
    """One content under one name, for as long as the name points at it or requests run on it."""

    __slots__ = ("__weakref__", "ephemeral", "last_used_at", "record", "requests")

    def __init__(self, record: AdapterRecord, ephemeral: bool) -> None:
        self.record, self.ephemeral = record, ephemeral
        self.requests = 0
        self.last_used_at: float | None = None

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def digest(self) -> str:
        return self.record.digest

    @property
    def generation(self) -> int:
        return self.record.generation


class Condition(NamedTuple):
    """What a change demands of the name before it: one of some digests (or "*", any), or absence."""

    if_match: frozenset[str] | None = None
    if_none_match: bool = False


class Upload(NamedTuple):
    """A checked adapter on its way to a name; `file` is its canonical file, in a staging directory."""

    summary: AdapterSummary
    file: Path
    source: str
    ephemeral: bool = False
    preload: bool = False
    pin: bool | None = None  # on the device; None keeps what the name has


def record_of(name: str, upload: Upload, old: AdapterRecord | None, base: str) -> AdapterRecord:
    """What a name that now has the record `old` points at after an upload: only other bytes are a new generation."""
    summary = upload.summary
    pin = None if old is None else old.pin
    if upload.pin is not None:
        pin = "device" if upload.pin else None
    pinned, pin_tier = pin is not None, pin or "device"
    if old is not None and old.digest == summary.digest:
        return msgspec.structs.replace(old, pinned=pinned, pin_tier=pin_tier, base=base, leaves_kv=summary.kv_is_base)
    return AdapterRecord(
        name=name,
        digest=summary.digest,
        generation=1 if old is None else old.generation + 1,
        kind=summary.kind,
        rank=summary.rank,
        targets=list(summary.targets),
        bytes=summary.bytes,
        source=upload.source,
        created_at=time.time(),
        pinned=pinned,
        pin_tier=pin_tier,
        warnings=list(summary.warnings),
        base=base,
        invocation_tokens=None if summary.invocation_tokens is None else list(summary.invocation_tokens),
        leaves_kv=summary.kv_is_base,
    )
