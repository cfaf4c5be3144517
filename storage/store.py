"""Bytes under keys: what every store offers, and how it fails."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

# What `get` may take into memory; whatever can be larger is for `fetch`.
MAX_GET_BYTES = 64 << 20

_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}", re.ASCII)


class StoreError(Exception):
    """The store could not do what it was asked; the message says what and why, and has no credentials."""


class InvalidKey(StoreError, ValueError):
    """A key that could mean something else than one object of this store."""


class NotFound(StoreError):
    """There is no object under the key."""


class PreconditionFailed(StoreError):
    """The object was not, or no longer, what the caller's condition said."""


class StoreFull(StoreError):
    """There is no room left for the bytes."""


class AccessDenied(StoreError):
    """The store knows no such credentials, or does not let them do this."""


class StoreUnavailable(StoreError):
    """The store did not answer, or answered that it cannot now, however often it was asked."""


class ObjectChanged(StoreError):
    """The object was replaced, again and again, while it was read."""


class ObjectTooLarge(StoreError):
    """The object has more bytes than the caller takes."""


class Corrupt(StoreError):
    """The bytes are not the ones that their digest names."""


class Stored(NamedTuple):
    """A small object: its bytes, and the etag that names exactly these bytes to a conditional `put`."""

    content: bytes
    etag: str


class Entry(NamedTuple):
    """One object of a list.

    `revision` is opaque and differs whenever the content was replaced (it may also differ after a `touch`).
    `modified_at` is the time of the last `put` or `touch`, in seconds since 1970; 0.0 where nobody knows it.
    """

    key: str
    bytes: int
    revision: str
    modified_at: float


OnProgress = Callable[[int, int], None]  # bytes so far, bytes in all; called from any thread, one call at a time


class Reader(Protocol):
    """Objects to be read under keys such as `names/x.json`; calls block, so an event loop runs them on threads.

    An object is always one whole `put`: a reader never sees half of one. Etags are opaque. Every call may
    raise `StoreError`.
    """

    def get(self, key: str) -> Stored:
        """Read an object of at most `MAX_GET_BYTES` into memory; `NotFound` if there is none."""
        ...

    def fetch(
        self, key: str, destination: Path, *, max_bytes: int | None = None, on_progress: OnProgress | None = None
    ) -> str:
        """Copy an object of any size to a file and return its etag; on failure no file is left there.

        `ObjectTooLarge` when it has more than `max_bytes`. The file is whole, but not yet flushed to the disk.
        """
        ...

    def list(self, prefix: str = "") -> list[Entry]:
        """Every object whose key starts with `prefix`, sorted by key."""
        ...


class Store(Reader, Protocol):
    """Objects that can be written, too; a `put` or `delete` that has returned survives the loss of power."""

    def put(self, key: str, content: bytes | Path, *, if_match: str | None = None, if_none_match: bool = False) -> str:
        """Store bytes, or a copy of a file, and return the etag.

        `if_match` demands that the object has that etag, `if_none_match` that there is none; otherwise
        `PreconditionFailed`, and nothing has changed. `StoreFull` when there is no room.
        """
        ...

    def touch(self, key: str) -> bool:
        """Make an object as young as one just put, so that a collector spares it; False when there is none.

        For objects whose content never changes under their key: a `put` at the same time may be undone by it.
        """
        ...

    def delete(self, key: str, *, unless_changed: Entry | None = None) -> bool:
        """Remove an object; one that is not there is fine.

        With an entry of a list, only an object that was neither put nor touched since; False when it was, or is gone.
        A directory is exact about that, a bucket only as far as its server and the resolution of its times allow.
        """
        ...

    def close(self) -> None:
        """Give back connections and scratch files, and end transfers under way; closing twice is fine."""
        ...


def is_key(key: str) -> bool:
    """Whether it is segments of letters, digits, `.`, `_` and `-` joined by `/`, none of them beginning with a sign."""
    return all(_SEGMENT.fullmatch(segment) for segment in key.split("/"))


def checked_key(key: str) -> str:
    """The key itself, or `InvalidKey`."""
    if not is_key(key):
        raise InvalidKey(f"{key!r} is not a key: expected names of letters, digits, '.', '_' and '-', joined by '/'")
    return key


def checked_prefix(prefix: str) -> str:
    """The beginning of a key itself, or `InvalidKey`."""
    folder = prefix.rpartition("/")[0]
    if folder:
        checked_key(folder)
    return prefix
