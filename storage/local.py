"""A store that is a directory."""

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from storage.scratch import Scratch, locked
from storage.store import Entry, NotFound, PreconditionFailed, Stored, StoreError, StoreFull, checked_key, is_key

_CHUNK_BYTES = 1 << 20
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class LocalStore:
    """Files below `root`, one an object, that several processes may share.

    A write goes to a temporary file, is flushed to the disk and renamed into place; its condition is
    checked under the directory's lock. An etag is a digest of the bytes. `scratch` is on the same disk.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self.scratch = Scratch(root / ".scratch")

    def close(self) -> None:
        self.scratch.close()

    def path(self, key: str) -> Path:
        """The file that holds an object, for readers that need no copy of their own; it may not exist."""
        return self._root / checked_key(key)

    def put(self, key: str, content: bytes | Path, *, if_match: str | None = None, if_none_match: bool = False) -> str:
        target = self.path(key)
        with _translated(key), _temporary_file(self.scratch.path) as (name, file):
            etag = _write(file, content)
            with locked(self._root):
                _check_condition(key, target, if_match, if_none_match)
                _make_directory(target.parent)
                os.rename(name, target)
                _sync_directory(target.parent)
        return etag

    def get(self, key: str) -> Stored:
        with _translated(key):
            content = self.path(key).read_bytes()
        return Stored(content, hashlib.blake2b(content, digest_size=16).hexdigest())

    def fetch(self, key: str, destination: Path) -> str:
        with _translated(key), _temporary_file(destination.parent) as (name, file):
            etag = _write(file, self.path(key))
            os.rename(name, destination)
        return etag

    def list(self, prefix: str = "") -> list[Entry]:
        parent = prefix.rpartition("/")[0]
        entries = []
        for directory, subdirectories, names in os.walk(self.path(parent) if parent else self._root):
            subdirectories[:] = [name for name in subdirectories if not name.startswith(".")]
            for name in names:
                path = Path(directory, name)
                key = path.relative_to(self._root).as_posix()
                if key.startswith(prefix) and is_key(key):
                    with suppress(FileNotFoundError):  # deleted since the directory was read
                        entries.append(Entry(key, path.stat().st_size))
        return sorted(entries)

    def delete(self, key: str) -> None:
        target = self.path(key)
        with _translated(key), locked(self._root), suppress(FileNotFoundError):
            target.unlink()
            _sync_directory(target.parent)


@contextmanager
def _translated(key: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound(f"there is no object {key!r}") from error
    except OSError as error:
        kind = StoreFull if error.errno in _NO_ROOM else StoreError
        raise kind(f"{key!r}: {error.strerror}") from error


@contextmanager
def _temporary_file(directory: Path) -> Iterator[tuple[str, BinaryIO]]:
    """A new file, removed in the end unless it was renamed away."""
    descriptor, name = tempfile.mkstemp(dir=directory)
    try:
        with open(descriptor, "wb", buffering=0) as file:
            yield name, file
    finally:
        Path(name).unlink(missing_ok=True)


def _write(file: BinaryIO, content: bytes | Path) -> str:
    """Write everything through to the disk and return its etag."""
    digest = hashlib.blake2b(digest_size=16)
    for chunk in _chunks(content):
        digest.update(chunk)
        view = memoryview(chunk)
        while view:
            view = view[file.write(view) :]
    os.fsync(file.fileno())
    return digest.hexdigest()


def _chunks(content: bytes | Path) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as source:
        while chunk := source.read(_CHUNK_BYTES):
            yield chunk


def _check_condition(key: str, target: Path, if_match: str | None, if_none_match: bool) -> None:
    if if_none_match and target.exists():
        raise PreconditionFailed(f"{key!r} exists")
    if if_match is None:
        return
    if not target.exists():
        raise PreconditionFailed(f"{key!r} does not exist")
    digest = hashlib.blake2b(digest_size=16)
    for chunk in _chunks(target):
        digest.update(chunk)
    if digest.hexdigest() != if_match:
        raise PreconditionFailed(f"{key!r} has changed")


def _make_directory(directory: Path) -> None:
    """Make a directory whose own entry survives a loss of power."""
    if not directory.is_dir():
        _make_directory(directory.parent)
        directory.mkdir(exist_ok=True)
        _sync_directory(directory.parent)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
