"""Directories for temporary files, removed with their process or by the next one."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock


class Scratch:
    """A directory that only this process uses, below a root that several processes may share.

    The process holds a lock (flock) on it, which the kernel releases when the process ends, even by a kill. So the next
    process that opens the root finds the directories without an owner and removes them. A process id would not do: ids
    are reused, and containers share them.
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
        """The directory, always of one name; if a cleaner of temporary files removed it, it is made again, empty."""
        if not self._path.is_dir():
            with self._changing:
                if self._lock is not None:
                    self._make_again(self._lock)
        return self._path

    def close(self) -> None:
        """Remove the directory and everything in it; closing twice is fine."""
        with self._changing:
            if self._lock is not None:
                # The root's lock excludes sweeps by other processes. After an error, the next sweep removes it.
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


def private_scratch(parent: Path | None = None) -> Scratch:
    """A scratch directory that no other user can read, below `parent`; by default in the system's temporary directory.

    Raises PermissionError, OSError.
    """
    root = (parent or Path(tempfile.gettempdir())) / f"rootstock-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    if os.lstat(root).st_uid != os.getuid():
        raise PermissionError(f"{root} belongs to another user")
    return Scratch(root)


def memory_scratch() -> Scratch:
    """A private scratch directory in memory (tmpfs) if the machine has one, so that its files never reach a disk."""
    shared = Path("/dev/shm")
    return private_scratch(shared if os.access(shared, os.W_OK | os.X_OK) else None)


def _sweep(root: Path) -> None:
    """Remove the directories without an owner; the root must be locked. Other files are not ours and stay."""
    for path in root.iterdir():
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            pass  # its process is alive
        finally:
            os.close(lock)


def held(directory: Path, *, wait: bool = True) -> int:
    """Lock a directory and return the descriptor that holds the lock until it is closed.

    Raises BlockingIOError, unless `wait`, when the directory is locked already.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a directory's lock during the block; threads and processes exclude each other."""
    descriptor = held(directory)
    try:
        yield
    finally:
        os.close(descriptor)
