"""A store in a directory."""

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from storage.files import CHUNK_BYTES, atomic_file, disk_errors, make_directory, sync_directory, temporary_file
from storage.identity import Identity
from storage.scratch import Scratch, locked
from storage.store import (
    MAX_GET_BYTES,
    Entry,
    NotFound,
    ObjectTooLarge,
    OnProgress,
    PreconditionFailed,
    Stored,
    checked_key,
    checked_prefix,
    is_key,
)

_ABSENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError)  # a directory is not an object


class LocalStore:
    """Files below `root`, one for each object; several processes may share them.

    A put writes a temporary file, flushes it to the disk and renames it into place; its condition is checked under
    the lock of the directory. An etag is a digest of the bytes. Lists and changes raise StoreLost if the directory was
    emptied or replaced since it was opened.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        with disk_errors(str(root)):
            self.scratch = Scratch(root / ".scratch")  # on the file system of `root`, so that files can be renamed
            self._identity = Identity(root, self.scratch.path)

    def close(self) -> None:
        self.scratch.close()

    def path(self, key: str) -> Path:
        """The file of an object, for readers that need no copy; it may be absent."""
        return self._root / checked_key(key)

    def put(self, key: str, content: bytes | Path, *, if_match: str | None = None, if_none_match: bool = False) -> str:
        target = self.path(key)
        with disk_errors(key), temporary_file(self.scratch.path) as (name, file):
            etag = _write(file, _chunks(content))
            file.flush()
            os.fsync(file.fileno())
            with locked(self._root):
                self._identity.check()
                _check_condition(key, target, if_match, if_none_match)
                make_directory(target.parent)
                _set_time(file)
                os.rename(name, target)
                sync_directory(target.parent)
        return etag

    def touch(self, key: str) -> bool:
        with disk_errors(key), locked(self._root):  # excludes `delete`, which compares times
            self._identity.check()
            try:
                with self._open(key) as file:
                    _set_time(file)
            except NotFound:
                return False
        return True

    def get(self, key: str) -> Stored:
        with disk_errors(key), self._open(key) as file:
            content = file.read(MAX_GET_BYTES + 1)
        if len(content) > MAX_GET_BYTES:
            raise ObjectTooLarge(f"{key!r} has more than {MAX_GET_BYTES} bytes: too large to read into memory")
        return Stored(content, hashlib.blake2b(content, digest_size=16).hexdigest())

    def fetch(
        self, key: str, destination: Path, *, max_bytes: int | None = None, on_progress: OnProgress | None = None
    ) -> str:
        with disk_errors(key), self._open(key) as source:
            total = os.fstat(source.fileno()).st_size  # this file never changes: a `put` makes a new one
            if max_bytes is not None and total > max_bytes:
                raise ObjectTooLarge(f"{key!r} has {total} bytes; at most {max_bytes} are taken")
            with atomic_file(destination) as file:
                return _write(file, _reported(_read(source), total, on_progress))

    def list(self, prefix: str = "") -> list[Entry]:
        parent = checked_prefix(prefix).rpartition("/")[0]
        top = self.path(parent) if parent else self._root
        entries = []
        with disk_errors(prefix or str(top)):
            for directory, subdirectories, names in os.walk(top, onerror=_raise_unless_absent):
                subdirectories[:] = [name for name in subdirectories if not name.startswith(".")]
                for name in names:
                    path = Path(directory, name)
                    key = path.relative_to(self._root).as_posix()
                    if key.startswith(prefix) and is_key(key):
                        with suppress(*_ABSENT):  # deleted since the directory was read
                            entries.append(_entry(key, path.stat()))
            self._identity.check()
        return sorted(entries)

    def delete(self, key: str, *, unless_changed: Entry | None = None) -> bool:
        target = self.path(key)
        with disk_errors(key), locked(self._root):  # `put` and `touch` take this lock, too
            self._identity.check()
            try:
                if unless_changed is not None and _entry(key, target.stat()) != unless_changed:
                    return False
                target.unlink()
                sync_directory(target.parent)
            except _ABSENT:
                return unless_changed is None
        return True

    def now(self) -> float:
        return time.time()  # as `_set_time` has it

    def _open(self, key: str) -> BinaryIO:
        try:
            return self.path(key).open("rb")
        except _ABSENT as error:
            raise NotFound(f"there is no object {key!r}") from error


def _entry(key: str, stat: os.stat_result) -> Entry:
    # Each put makes a new file: the inode number distinguishes two that were written in one tick of the clock.
    return Entry(key, stat.st_size, f"{stat.st_mtime_ns}-{stat.st_ino}-{stat.st_size}", stat.st_mtime)


def _raise_unless_absent(error: OSError) -> None:
    """A list with an unreadable directory must fail: a caller that takes it for complete may delete what it lacks."""
    if not isinstance(error, _ABSENT):
        raise error


def _set_time(file: BinaryIO) -> None:
    """Set a file's time to now. The kernel's own file times have coarser ticks, and two writes must differ."""
    now = time.time_ns()
    os.utime(file.fileno(), ns=(now, now))


def _write(file: BinaryIO, chunks: Iterator[bytes]) -> str:
    """Write the chunks and return their etag."""
    digest = hashlib.blake2b(digest_size=16)
    for chunk in chunks:
        digest.update(chunk)
        file.write(chunk)
    return digest.hexdigest()


def _chunks(content: bytes | Path) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
    else:
        with content.open("rb") as source:
            yield from _read(source)


def _read(source: BinaryIO) -> Iterator[bytes]:
    while chunk := source.read(CHUNK_BYTES):
        yield chunk


def _reported(chunks: Iterator[bytes], total: int, on_progress: OnProgress | None) -> Iterator[bytes]:
    done = 0
    for chunk in chunks:
        yield chunk
        done += len(chunk)
        if on_progress is not None:
            on_progress(done, total)


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
