"""Atomic writes of files, and the errors of their disk."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from storage.store import StoreError, StoreFull

CHUNK_BYTES = 1 << 20
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def disk_errors(key: str) -> Iterator[None]:
    """Raise an OSError that concerns an object as StoreFull or StoreError."""
    try:
        yield
    except OSError as error:
        kind = StoreFull if error.errno in _NO_ROOM else StoreError
        raise kind(f"{key!r}: {error.strerror}") from error


@contextmanager
def temporary_file(directory: Path) -> Iterator[tuple[str, BinaryIO]]:
    """A new file and its name; it is removed at the end of the block unless the block has renamed it."""
    descriptor, name = tempfile.mkstemp(dir=directory)
    try:
        with open(descriptor, "wb") as file:
            yield name, file
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def atomic_file(destination: Path) -> Iterator[BinaryIO]:
    """A file that replaces `destination` at the end of the block; if the block raises, it is removed instead."""
    with temporary_file(destination.parent) as (name, file):
        yield file
        file.flush()
        os.rename(name, destination)


def make_directory(directory: Path) -> None:
    """Make a directory durably: its own entry survives a power loss."""
    if not directory.is_dir():
        make_directory(directory.parent)
        directory.mkdir(exist_ok=True)
        sync_directory(directory.parent)


def sync_directory(directory: Path) -> None:
    """Flush a directory, so that renames and removals in it survive a power loss."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
