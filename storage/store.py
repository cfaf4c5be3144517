"""Bytes under keys: what every store offers, and how it fails."""

import re
from pathlib import Path
from typing import NamedTuple, Protocol

_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}", re.ASCII)


class StoreError(Exception):
    """The store could not do what it was asked; the message says what and why."""


class InvalidKey(StoreError, ValueError):
    """A key that could mean something else than one object of this store."""


class NotFound(StoreError):
    """There is no object under the key."""


class PreconditionFailed(StoreError):
    """The object was not, or no longer, what the caller's condition said."""


class StoreFull(StoreError):
    """There is no room left for the bytes."""


class Stored(NamedTuple):
    """A small object: its bytes, and the etag that names exactly these bytes to a conditional `put`."""

    content: bytes
    etag: str


class Entry(NamedTuple):
    key: str
    bytes: int


class Store(Protocol):
    """Objects under keys such as `names/x.json`; calls block, so an event loop runs them on threads.

    An object is always one whole `put`: a reader never sees half of one, and a `put` or `delete` that has
    returned survives the machine's loss of power. Etags are opaque. Every call may raise `StoreError`.
    """

    def put(self, key: str, content: bytes | Path, *, if_match: str | None = None, if_none_match: bool = False) -> str:
        """Store bytes, or a copy of a file, and return the etag.

        `if_match` demands that the object has that etag, `if_none_match` that there is none; otherwise
        `PreconditionFailed`, and nothing has changed. `StoreFull` when there is no room.
        """
        ...

    def get(self, key: str) -> Stored:
        """Read a small object into memory; `NotFound` if there is none."""
        ...

    def fetch(self, key: str, destination: Path) -> str:
        """Copy an object of any size to a file and return its etag; on failure no file is left there."""
        ...

    def list(self, prefix: str = "") -> list[Entry]:
        """Every object whose key starts with `prefix`, sorted by key."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is fine."""
        ...


def is_key(key: str) -> bool:
    """Whether it is segments of letters, digits, `.`, `_` and `-` joined by `/`, none of them beginning with a sign."""
    return all(_SEGMENT.fullmatch(segment) for segment in key.split("/"))


def checked_key(key: str) -> str:
    """The key itself, or `InvalidKey`."""
    if not is_key(key):
        raise InvalidKey(f"{key!r} is not a key: expected names of letters, digits, '.', '_' and '-', joined by '/'")
    return key
