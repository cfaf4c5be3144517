"""An adapter's file, read whole and found to be what its digest says."""

import os
import stat
from collections.abc import Callable
from io import FileIO
from pathlib import Path

import numpy as np
from blake3 import blake3

from runtime.adapter_format.errors import InvalidAdapter
from runtime.adapter_format.safetensors_header import read_header

PIECE_BYTES = 1 << 20  # of a copy, which then takes a tenth of a millisecond: what a step may have to share a core with

Pause = Callable[[], None]
Memory = Callable[[int], np.ndarray]  # of some bytes


class FileWanted(Exception):
    """An adapter's file is missing, or is not what its digest says; the message says which."""


def read_verified(path: Path, digest: str, max_bytes: int, memory: Memory, pause: Pause) -> np.ndarray:
    """A whole file at once: mapped memory would turn a file that shrinks under us into a dead process."""
    try:
        with open(path, "rb", buffering=0, opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise FileWanted("its file cannot be read: Not a regular file")
            if status.st_size > max_bytes:
                raise _too_large(file, status.st_size, max_bytes)
            content, found = _read_paced(file, memory(status.st_size), pause)
    except (FileNotFoundError, NotADirectoryError):
        raise FileWanted("its file is missing") from None
    except OSError as error:  # whose own words name the path, which is nobody's business
        raise FileWanted(f"its file cannot be read: {error.strerror or type(error).__name__}") from None
    if found != digest:
        raise FileWanted(f"its file is corrupt: {len(content)} bytes with the BLAKE3 digest {found}")
    return content


def _read_paced(file: FileIO, content: np.ndarray, pause: Pause) -> tuple[np.ndarray, str]:
    """All of a file, read into memory of its size, and its digest."""
    hasher, view, end = blake3(), content.data, 0
    while end < len(content):
        pause()
        count = file.readinto(view[end : end + PIECE_BYTES])
        if not count:
            break
        hasher.update(view[end : end + count])
        end += count
    return content[:end], hasher.hexdigest()


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # what is no file may never open otherwise


def _too_large(file: FileIO, size: int, max_bytes: int) -> Exception:
    """What is wrong with a file that is not read whole: it may be what it should be, if its header describes it."""
    try:
        read_header(file)
    except InvalidAdapter:
        return FileWanted(f"its file is corrupt: {size} bytes")
    return InvalidAdapter("weights", f"has {size} bytes, and host adapter memory could take {max_bytes}")
