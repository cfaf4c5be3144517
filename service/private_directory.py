"""Directories of this process alone, which do not outlive it for long and which no other user can read."""

import os
import tempfile
from pathlib import Path

from storage.scratch import Scratch


def private_scratch(parent: Path | None = None) -> Scratch:
    """A scratch directory below `parent`, by default where temporary files go. Raises PermissionError, OSError."""
    root = (parent or Path(tempfile.gettempdir())) / f"rootstock-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    if os.lstat(root).st_uid != os.getuid():
        raise PermissionError(f"{root} belongs to another user")
    return Scratch(root)


def memory_scratch() -> Scratch:
    """One in memory, where the machine offers that: what is in it never touches a disk."""
    shared = Path("/dev/shm")
    return private_scratch(shared if os.access(shared, os.W_OK | os.X_OK) else None)
