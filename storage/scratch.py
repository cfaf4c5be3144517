"""Temporary files that cannot outlive their process for long."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock


class Scratch:
    """A directory of this process alone, below a root that several processes may share.

    Its owner holds a lock (flock) on it, which the kernel drops however the process ends. So whoever opens
    the root next can tell the directories of the dead from those in use, and removes them. A process id
    would not do: it is reused, and means another process in another container.
    """

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self._root = root
        self._changing = Lock()
        with locked(root):
            _sweep(root)
            self._path = Path(tempfile.mkdtemp(dir=root))
            self._lock: int | None = held(self._path)

    @property
    def path(self) -> Path:
        """The directory, the same one always; made again, empty, if a cleaner of temporary files removed it."""
        if not self._path.is_dir():
            with self._changing:
                if self._lock is not None:
                    self._make_again(self._lock)
        return self._path

    def close(self) -> None:
        """Remove the directory and everything in it; closing twice is fine."""
        with self._changing:
            if self._lock is not None:
                # Under the root's lock, for those who sweep; whatever prevents it, the next of them does it.
                with suppress(OSError), locked(self._root):
                    shutil.rmtree(self._path, ignore_errors=True)
                os.close(self._lock)
                self._lock = None

    def _make_again(self, lock: int) -> None:
        self._root.mkdir(parents=True, exist_ok=True)
        with locked(self._root):
            self._path.mkdir(mode=0o700, exist_ok=True)
            self._lock = held(self._path)
        os.close(lock)


def _sweep(root: Path) -> None:
    """Remove the directories of the dead; the root must be locked. What is no directory is not ours."""
    for path in root.iterdir():
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            pass  # its process lives
        finally:
            os.close(lock)


def held(directory: Path, *, wait: bool = True) -> int:
    """A descriptor that holds the directory's lock until it is closed. Raises BlockingIOError instead of waiting."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a directory's lock: one holder at a time, among threads and among processes."""
    descriptor = held(directory)
    try:
        yield
    finally:
        os.close(descriptor)
