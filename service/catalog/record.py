"""What a name points at: as the store keeps it, as this process serves it, and as an upload delivers it."""

import time
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec

from runtime.adapter_format.canonical import AdapterSummary
from runtime.messages import Tier

MAX_NAME_CHARACTERS = 128
# Words that `/`, `@` or `:` join: org/name, model@7, team:poet
NAME = "[A-Za-z0-9][A-Za-z0-9._-]*([/@:][A-Za-z0-9][A-Za-z0-9._-]*)*"
NAME_PATTERN = rf"^(?=.{{1,{MAX_NAME_CHARACTERS}}}\Z){NAME}\Z"

MAX_TEMPLATE_BYTES = 64 << 10  # of a chat template, which a record holds whole

OnMissing = Literal["error", "base", "append"]  # what to do for a prompt that does not invoke its aLoRA


class AdapterRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a name points at, as the store keeps it."""

    name: Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]
    digest: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]  # of the canonical file
    generation: int  # 1 for the first content under the name, and one more for each other content
    kind: Literal["lora", "alora"]
    rank: int  # the highest of its modules
    targets: list[str]  # the adapted modules
    bytes: int  # of the canonical file
    source: str  # the URL of an import, or "upload"
    created_at: float  # seconds since 1970
    pinned: bool
    warnings: list[str]  # of the check of the upload
    base: str  # digest of the shape of the base model that the adapter was checked against
    pin_tier: Tier = "device"  # ignored while the adapter is not pinned
    invocation_tokens: list[int] | None = None  # of an aLoRA
    leaves_kv: bool = False  # its K/V equal the base's
    alora_on_missing: OnMissing | None = None  # for requests that do not say; None: as the server's option
    chat_template: str | None = None  # in place of the base's
    uploaded_by: str | None = None  # the id of the key whose upload it is; None: there were no keys
    pinned_by: str | None = None  # the id of the key that pinned it

    @property
    def pin(self) -> Tier | None:
        """The tier that the adapter is pinned in."""
        return self.pin_tier if self.pinned else None


class AdapterVersion:
    """One content under one name. It lives while the name points at it or requests run on it."""

    __slots__ = ("__weakref__", "ephemeral", "last_used_at", "record", "requests")

    def __init__(self, record: AdapterRecord, ephemeral: bool) -> None:
        self.record, self.ephemeral = record, ephemeral
        self.requests = 0  # that run on it
        self.last_used_at: float | None = None  # seconds since 1970

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
    """What must hold for a name before it is changed; nothing by default."""

    if_match: frozenset[str] | None = None  # the name points at one of these digests; "*" stands for any
    if_none_match: bool = False  # the name points at nothing


class Upload(NamedTuple):
    """A checked adapter that is to be published under a name."""

    summary: AdapterSummary
    file: Path  # the canonical file, in a staging directory
    source: str  # the URL of an import, or "upload"
    ephemeral: bool = False  # keep it in memory only
    preload: bool = False  # load it to the device at once
    pin: bool | None = None  # pin it to the device; None keeps the pin of the name
    alora_on_missing: OnMissing | None = None  # None keeps that of the name
    chat_template: str | None = None


def pinned_record(old: AdapterRecord, tier: Tier | None, by: str | None) -> AdapterRecord:
    """A record with another pin, of the key with the id `by`; one that is there already stays its key's."""
    pinned_by = None if tier is None else old.pinned_by if tier == old.pin else by
    return msgspec.structs.replace(old, pinned=tier is not None, pin_tier=tier or old.pin_tier, pinned_by=pinned_by)


def record_of(name: str, upload: Upload, old: AdapterRecord | None, base: str, by: str | None = None) -> AdapterRecord:
    """The record of a name after an upload with the key of the id `by`; `old` is the record before.

    Only other bytes raise the generation.
    """
    summary = upload.summary
    pin = None if old is None else old.pin
    if upload.pin is not None:
        pin = "device" if upload.pin else None
    pinned, pin_tier = pin is not None, pin or "device"
    on_missing = upload.alora_on_missing or (None if old is None else old.alora_on_missing)
    if old is not None and old.digest == summary.digest:
        return msgspec.structs.replace(
            pinned_record(old, pin, by),
            pin_tier=pin_tier,
            uploaded_by=by,
            base=base,
            leaves_kv=summary.kv_is_base,
            alora_on_missing=on_missing,
            chat_template=upload.chat_template,
        )
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
        alora_on_missing=on_missing,
        chat_template=upload.chat_template,
        uploaded_by=by,
        pinned_by=by if pinned else None,
    )
