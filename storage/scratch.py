"""Temporary files that cannot outlive their process for long."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Scratch:
    """A directory of this process alone, below a root that several processes may share.

    Its owner holds a lock (flock) on it, which the kernel drops however the process ends. So whoever opens
    the root next can tell the directories of the dead from those in use, and removes them. A process id
    would not do: it is reused, and means another process in another container.
    """

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self._root = root
        with locked(root):
            self._sweep()
            self.path = Path(tempfile.mkdtemp(dir=root))
            self._lock: int | None = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def close(self) -> None:
        """Remove the directory and everything in it; closing twice is fine."""
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = None

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Whether no other process has the root open, and that stays so until the block ends."""
        with locked(self._root):
            self._sweep()
            yield all(path == self.path for path in self._root.iterdir())

    def _sweep(self) -> None:
        for path in self._root.iterdir():
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            except BlockingIOError:
                pass  # its process lives
            finally:
                os.close(lock)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a directory's lock: one holder at a time, among threads and among processes."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
