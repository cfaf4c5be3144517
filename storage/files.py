"""Files that appear whole or not at all, and what their disk's errors mean."""

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
    """Raise what the disk says about an object as errors of the store."""
    try:
        yield
    except OSError as error:
        kind = StoreFull if error.errno in _NO_ROOM else StoreError
        raise kind(f"{key!r}: {error.strerror}") from error


@contextmanager
def temporary_file(directory: Path) -> Iterator[tuple[str, BinaryIO]]:
    """A new file, removed in the end unless it was renamed away."""
    descriptor, name = tempfile.mkstemp(dir=directory)
    try:
        with open(descriptor, "wb", buffering=0) as file:
            yield name, file
    finally:
        Path(name).unlink(missing_ok=True)


def write_all(file: BinaryIO, chunk: bytes) -> None:
    """Write every byte, where one call may write fewer."""
    view = memoryview(chunk)
    while view:
        view = view[file.write(view) :]


def make_directory(directory: Path) -> None:
    """Make a directory whose own entry survives a loss of power."""
    if not directory.is_dir():
        make_directory(directory.parent)
        directory.mkdir(exist_ok=True)
        sync_directory(directory.parent)


def sync_directory(directory: Path) -> None:
    """Make renames and removals in a directory survive a loss of power."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
