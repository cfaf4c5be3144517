"""A source that is a directory of the server. Its files are read without following a link."""

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from service.errors import RequestError
from service.ingest.bundle import OPTIONAL, REQUIRED, WEIGHTS, BundleFiles
from storage.store import OnProgress

_COPY_BYTES = 1 << 20
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


def copy_files(root: Path, below: Sequence[str], files: BundleFiles, on_progress: OnProgress) -> None:
    """Copy the files of a directory, so that they cannot change while they are checked. Blocks.

    `below` are the names that lead from `root` to the directory. A link below the root is refused, because it may lead
    out of the root. Raises RequestError: links, missing files, files over their limits; and what `on_progress` raises.
    """
    with _directory(root, below) as directory:
        present = set(os.listdir(directory))
        for name in (*(name for name in OPTIONAL if name in present), *REQUIRED):
            with _open_plain(name, directory) as file:
                size, done = os.fstat(file.fileno()).st_size, 0
                files.begin(name, size)
                while chunk := file.read(_COPY_BYTES):
                    files.write(chunk)
                    done += len(chunk)
                    if name == WEIGHTS:
                        on_progress(done, max(done, size))
                files.end()


@contextmanager
def _directory(root: Path, below: Sequence[str]) -> Iterator[int]:
    try:
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        for segment in below:
            parent = descriptor
            try:
                descriptor = os.open(segment, _DIRECTORY, dir_fd=parent)
            finally:
                os.close(parent)
    except FileNotFoundError:
        raise RequestError("source_not_found", "the directory of the source does not exist", "src") from None
    except OSError as error:
        message = f"the source is not a directory that the server may read: {error.strerror}"
        raise RequestError("source_not_allowed", message, "src") from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _open_plain(name: str, directory: int) -> BinaryIO:
    """Open a file of a bundle, but not a link, and without waiting for the writer of a pipe."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
    except FileNotFoundError:
        raise RequestError("source_not_found", f"the source has no {name}", "src") from None
    except OSError as error:
        raise RequestError("source_not_allowed", f"{name} of the source: {error.strerror}", "src") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RequestError("source_not_allowed", f"{name} of the source is not a plain file", "src")
    return open(descriptor, "rb")
