"""The file of keys: it has their hashes, and is written as a whole.

A key has 256 random bits. So a plain SHA-256 of it cannot be guessed from, with or without a salt, and costs a request
a microsecond; the slow, salted hashes are for what people make up.
"""

import hashlib
import os
import re
import secrets
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from service.keys.caller import Scope
from service.keys.limits import Limits

MARK = "rk"  # what keys begin with, so that people and scanners know one when they see it
API_KEY = "api-key"  # the id of the option's key
ID = r"^[a-z0-9][a-z0-9.-]{0,63}\Z"
_PREFIX = re.compile(r"([A-Za-z0-9][A-Za-z0-9._/@:-]{0,127})?")
Limit = Annotated[int, Meta(ge=1)]
Size = Annotated[int, Meta(ge=0)]


class KeysFileError(ValueError):
    """The file cannot be read, or is none; the message is a sentence."""


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A key as the file has it. Raises ValueError with a sentence for values that do not go together."""

    id: Annotated[str, Meta(pattern=ID)]
    hash: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]  # SHA-256 of the key
    scopes: Annotated[list[Scope], Meta(min_length=1)]
    adapter_prefix: str = ""  # empty: it sees all adapters
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    concurrent_requests: Limit | None = None
    disk_bytes: Size | None = None
    pinned_bytes: Size | None = None
    created_at: float  # seconds since 1970

    def __post_init__(self) -> None:
        if self.id == API_KEY:
            raise ValueError(f"the id {API_KEY} is that of the option --api-key: take another one")
        if not _PREFIX.fullmatch(self.adapter_prefix):
            raise ValueError(f"{self.adapter_prefix!r} is not how a name of an adapter begins")
        if self.adapter_prefix and "admin" in self.scopes:
            raise ValueError("a key with the scope admin sees all adapters: give it no prefix, or other scopes")

    @property
    def limits(self) -> Limits:
        return Limits(self.requests_per_minute, self.tokens_per_minute, self.concurrent_requests)


class KeysFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: list[KeyRecord]


def new_key(id: str) -> str:
    return f"{MARK}_{id}_{secrets.token_urlsafe(32)}"


def id_of(key: str) -> str | None:
    """The id that a key names, None for one that was not made here."""
    parts = key.split("_", 2)
    return parts[1] if len(parts) == 3 and parts[0] == MARK else None


def hash_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(path: Path) -> list[KeyRecord]:
    """The keys of a file. Raises KeysFileError."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=KeysFile).keys
    except OSError as error:
        raise KeysFileError(f"the keys file {path} cannot be read: {error.strerror}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise KeysFileError(f"{path} is no keys file: {error}") from None
    for id, times in Counter(record.id for record in found).items():
        if times > 1:
            raise KeysFileError(f"{path} is no keys file: it has the id {id!r} {times} times")
    return found


def write_keys(path: Path, records: Sequence[KeyRecord]) -> None:
    """Replace the file in one step; its owner and mode stay, and a new one is its owner's alone. Raises OSError."""
    content = msgspec.json.format(msgspec.json.encode(KeysFile(list(records))), indent=2) + b"\n"
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            if path.exists():
                before = path.stat()
                os.fchmod(descriptor, before.st_mode & 0o777)
                with suppress(PermissionError):
                    os.fchown(descriptor, before.st_uid, before.st_gid)
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
