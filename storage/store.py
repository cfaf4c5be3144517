"""Bytes under keys: the interface of every store, and its errors."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

MAX_GET_BYTES = 64 << 20  # the largest object that `get` reads into memory; `fetch` has no limit

_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}", re.ASCII)


class StoreError(Exception):
    """A call to a store failed; the message names the object and the reason and contains no credentials.

    `public` is the reason as far as a stranger may know it, with what to do: it names no host, account or key.
    """

    def __init__(self, message: str = "", *, public: str = "") -> None:
        self.public = public
        super().__init__(message)


class InvalidKey(StoreError, ValueError):
    """The key is not one that names exactly one object of the store."""


class NotFound(StoreError):
    """No object has the key."""


class PreconditionFailed(StoreError):
    """The object does not match the caller's condition, or no longer does."""


class StoreFull(StoreError):
    """There is no space left for the bytes."""


class AccessDenied(StoreError):
    """The store rejects the credentials, or they do not permit the call."""


class StoreUnavailable(StoreError):
    """The store did not answer, or answered that it is unavailable, to every attempt."""


class StoreLost(StoreError):
    """What the store had is gone, though nobody deleted it through a store."""


class ObjectChanged(StoreError):
    """The object was replaced while it was read, at every attempt."""


class ObjectTooLarge(StoreError):
    """The object is larger than the caller permits."""


class Corrupt(StoreError):
    """The bytes do not have the expected size and digest."""


class Stored(NamedTuple):
    """A small object."""

    content: bytes
    etag: str  # names exactly these bytes in a conditional `put`


class Entry(NamedTuple):
    """One object of a list."""

    key: str
    bytes: int
    revision: str  # opaque; changes with every `put` of other content, and may change with a `touch`
    modified_at: float  # the time of the last `put` or `touch`, in seconds since 1970


OnProgress = Callable[[int, int], None]  # bytes read, bytes in all; called from any thread, one call at a time


class Reader(Protocol):
    """Objects that can be copied to files; calls block, so an event loop runs them on threads. Raises StoreError."""

    def fetch(
        self, key: str, destination: Path, *, max_bytes: int | None = None, on_progress: OnProgress | None = None
    ) -> str:
        """Copy an object to a file and return its etag; after a failure the file is as it was before.

        The file has one whole `put`; it is not flushed to the disk. An exception that `on_progress` raises ends the
        transfer. Raises ObjectTooLarge, before it reads data, for more than `max_bytes`; NotFound.
        """
        ...


class Store(Reader, Protocol):
    """Objects under keys such as `names/x.json`; a `put` or `delete` that has returned survives a power loss.

    An object is always one whole `put`: no reader sees half of one. Etags are opaque.
    """

    def get(self, key: str) -> Stored:
        """Read an object of at most `MAX_GET_BYTES` into memory. Raises NotFound, ObjectTooLarge."""
        ...

    def list(self, prefix: str = "") -> list[Entry]:
        """Every object whose key starts with `prefix`, sorted by key."""
        ...

    def put(self, key: str, content: bytes | Path, *, if_match: str | None = None, if_none_match: bool = False) -> str:
        """Store bytes, or a copy of a file, and return the etag.

        `if_match` requires that the object has that etag, `if_none_match` that there is no object. Raises
        PreconditionFailed, without a change, when that is not so; StoreFull.
        """
        ...

    def touch(self, key: str) -> bool:
        """Set an object's time to now, so that garbage collection spares it; False if there is no such object.

        Only for objects whose content never changes: a touch may undo a `put` at the same time.
        """
        ...

    def delete(self, key: str, *, unless_changed: Entry | None = None) -> bool:
        """Remove an object; it may be absent.

        With an entry of a list: only if the object was neither put nor touched since; False if it was, or is absent. A
        directory compares exactly, a bucket as exactly as its server and the resolution of its times allow.
        """
        ...

    def now(self) -> float:
        """The time in seconds since 1970 by the clock that `Entry.modified_at` comes from."""
        ...

    def close(self) -> None:
        """Release connections and scratch files without waiting; closing twice is fine.

        Transfers under way fail with StoreUnavailable at their next bytes, or at the timeout of their connection.
        """
        ...


def is_key(key: str) -> bool:
    """Whether it is names of letters, digits, `.`, `_` and `-`, joined by `/`; each begins with a letter or digit."""
    return all(_SEGMENT.fullmatch(segment) for segment in key.split("/"))


def checked_key(key: str) -> str:
    """The key. Raises InvalidKey."""
    if not is_key(key):
        raise InvalidKey(f"{key!r} is not a key: expected names of letters, digits, '.', '_' and '-', joined by '/'")
    return key


def checked_prefix(prefix: str) -> str:
    """The beginning of a key. Raises InvalidKey."""
    folder = prefix.rpartition("/")[0]
    if folder:
        checked_key(folder)
    return prefix
