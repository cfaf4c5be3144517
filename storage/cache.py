"""A bounded disk cache of files named by the digest of their bytes, with LRU eviction."""

import errno
import os
import re
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from threading import Condition, RLock

from blake3 import blake3

from storage.files import CHUNK_BYTES, disk_errors
from storage.scratch import Scratch, held
from storage.store import Corrupt, InvalidKey, StoreError, StoreFull, StoreUnavailable

_SUFFIX = ".safetensors"
_ARRIVING = ".arriving"
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)


class DiskCache:
    """At most `capacity_bytes` of files, each named by the BLAKE3 digest of its bytes; thread-safe.

    A new process takes over the files of the last one, in the order of their last use (the modification time).
    `fetch` verifies a file's digest at each call; no other method reads files. A reader that has opened a file keeps
    it when it is evicted; a reader that will open it later must `hold` it. Raises StoreError when another process uses
    the directory.
    """

    def __init__(self, directory: Path, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.hits = self.misses = self.evictions = 0
        self._directory = directory
        with disk_errors(str(directory)):
            directory.mkdir(parents=True, exist_ok=True)
            try:
                self._lock_file: int | None = held(directory, wait=False)
            except BlockingIOError as error:
                raise StoreError(
                    f"another process uses the disk cache {str(directory)!r}: each needs one of its own"
                ) from error
            try:
                self._bytes = _scan(directory)  # the size of each cached file, the least recently used one first
                self.scratch = Scratch(directory / ".scratch")
            except BaseException:
                os.close(self._lock_file)
                raise
        self._holds: Counter[str] = Counter()
        self._pins: Counter[str] = Counter()  # the holds that may last for ever; a subset of `_holds`
        self._flights: dict[str, Future[Path]] = {}  # one for each digest that is being fetched
        self._expected: dict[str, int] = {}  # bytes reserved for each download under way
        self._lock = RLock()
        self._room = Condition(self._lock)  # a file was removed or released, or a download has ended
        with self._lock:
            self._make_room(None, 0)

    def close(self) -> None:
        """Release the directory to other processes; fetches that wait for space fail. Closing twice is fine."""
        with self._room:
            lock_file, self._lock_file = self._lock_file, None
            self._room.notify_all()
        if lock_file is not None:
            self.scratch.close()
            os.close(lock_file)

    @property
    def bytes_used(self) -> int:
        with self._lock:
            return sum(self._bytes.values())

    @property
    def files(self) -> int:
        return len(self._bytes)

    @property
    def held_bytes(self) -> int:
        """Bytes of the cached files that are held, so that they cannot be evicted."""
        with self._lock:
            return sum(size for digest, size in self._bytes.items() if digest in self._holds)

    def path(self, digest: str) -> Path:
        """The path of the file with this digest, cached or not. Raises InvalidKey."""
        if not _DIGEST.fullmatch(digest):
            raise InvalidKey(f"{digest!r} is not a digest: expected 64 hexadecimal digits")
        return self._directory / f"{digest}{_SUFFIX}"

    def has(self, digest: str) -> bool:
        """Whether the file is cached; its bytes are not verified."""
        return digest in self._bytes

    def fetch(self, digest: str, size: int, download: Callable[[Path], object], *, wait_seconds: float = 0.0) -> Path:
        """Return the path of the verified file; on a miss, `download` writes it to the path that it is called with.

        Concurrent calls for one digest share one download, and its error; the next call tries again. A file that does
        not fit waits up to `wait_seconds` for space, unless the pinned files alone leave too little. Raises Corrupt
        when the download is not `size` bytes with this digest, StoreFull, and the errors of `download`.
        """
        path = self.path(digest)
        with self._lock:
            flight = self._flights.get(digest)
            if mine := flight is None:
                flight = self._flights[digest] = Future()
        assert flight is not None
        if not mine:
            return self._share(flight)
        try:
            if not self._hit(digest, path):
                self._miss(digest, path, size, download, wait_seconds)
        except BaseException as error:
            self._end_flight(digest).set_exception(error)
            raise
        self._end_flight(digest).set_result(path)
        return path

    def add(self, digest: str, file: Path) -> None:
        """Move a file into the cache; the caller knows its digest. A file that does not fit is removed instead."""
        path = self.path(digest)
        with disk_errors(digest), self._lock:
            size = file.stat().st_size
            try:
                self._make_room(digest, size)
            except StoreFull:
                file.unlink()
            else:
                self._insert(digest, file, path, size)

    def hold(self, digest: str, *, pinned: bool = False) -> None:
        """Protect a file, cached now or later, from eviction until `release` is called as often.

        `pinned` says that the hold may last for ever, so no fetch waits for its release; `release` must repeat it.
        """
        with self._lock:
            self._holds[digest] += 1
            if pinned:
                self._pins[digest] += 1

    def release(self, digest: str, *, pinned: bool = False) -> None:
        with self._room:
            assert self._holds[digest] > 0, f"{digest} is not held"
            assert not pinned or self._pins[digest] > 0, f"{digest} is not pinned"
            self._holds -= Counter([digest])
            self._pins -= Counter([digest] * pinned)
            self._room.notify_all()

    def check(self) -> None:
        """Recount the invariants: the index matches the directory, and all files and reservations fit."""
        with self._lock:
            assert _scan(self._directory) == self._bytes
            assert self.bytes_used + sum(self._expected.values()) <= self.capacity_bytes
            assert self._expected.keys() <= self._flights.keys()
            assert all(count > 0 for count in self._holds.values())
            assert self._pins <= self._holds
            if not self._flights:
                assert not any(self.scratch.path.glob(f"*{_ARRIVING}"))

    def _share(self, flight: Future[Path]) -> Path:
        path = flight.result()
        with self._lock:
            self.hits += 1  # this call has downloaded nothing
        return path

    def _end_flight(self, digest: str) -> Future[Path]:
        with self._room:
            self._expected.pop(digest, None)
            self._room.notify_all()
            return self._flights.pop(digest)

    def _hit(self, digest: str, path: Path) -> bool:
        """Whether the file is cached and has its digest; a corrupt file is removed."""
        if digest not in self._bytes:
            return False
        with disk_errors(digest):
            good = _digest_of(path) == digest
            with self._lock:
                if good:
                    self.hits += 1
                    self._bytes[digest] = self._bytes.pop(digest)
                    with suppress(FileNotFoundError):
                        os.utime(path)
                else:
                    self._remove(digest)
        return good

    def _miss(
        self, digest: str, path: Path, size: int, download: Callable[[Path], object], wait_seconds: float
    ) -> None:
        with self._lock:
            if digest in self._bytes:  # an upload has just added it
                self.hits += 1
                return
            self.misses += 1
            if not self._wait_for_room(digest, size, wait_seconds):
                return
            self._expected[digest] = size
        with disk_errors(digest):
            arriving = self.scratch.path / f"{digest}{_ARRIVING}"  # a digest has one download at a time
        try:
            download(arriving)
            with disk_errors(digest):
                found = arriving.stat().st_size
                if found != size:
                    raise Corrupt(f"{digest} should have {size} bytes, but {found} were downloaded")
                if _digest_of(arriving) != digest:
                    raise Corrupt(f"the {size} bytes that were downloaded as {digest} have another digest")
                with self._lock:
                    del self._expected[digest]
                    self._insert(digest, arriving, path, size)
        finally:
            arriving.unlink(missing_ok=True)

    def _insert(self, digest: str, file: Path, path: Path, size: int) -> None:
        os.utime(file)
        os.rename(file, path)
        self._bytes.pop(digest, None)
        self._bytes[digest] = size
        self._room.notify_all()

    def _wait_for_room(self, digest: str, size: int, wait_seconds: float) -> bool:
        """Evict files as soon as enough are evictable; False when an upload has added the file meanwhile."""
        until = time.monotonic() + wait_seconds
        while digest not in self._bytes:
            if self._lock_file is None:
                raise StoreUnavailable("the disk cache was closed")
            try:
                self._make_room(digest, size)
            except StoreFull:
                pinned = sum(bytes_ for other, bytes_ in self._bytes.items() if other in self._pins)
                seconds = until - time.monotonic()
                if seconds <= 0 or size + pinned > self.capacity_bytes:
                    raise
                self._room.wait(seconds)
            else:
                return True
        return False

    def _make_room(self, digest: str | None, size: int) -> None:
        """Evict the least recently used files until `size` bytes fit, in place of the digest's own file if cached.

        Raises StoreFull, without an eviction, when they cannot fit.
        """
        others = {other: bytes_ for other, bytes_ in self._bytes.items() if other != digest}
        free = [other for other in others if self._is_free(other)]
        missing = sum(others.values()) + sum(self._expected.values()) + size - self.capacity_bytes
        if missing > 0 and missing > (evictable := sum(others[other] for other in free)):
            kept = sum(others.values()) + sum(self._expected.values()) - evictable
            raise StoreFull(
                f"{size} bytes do not fit into the disk cache: {kept} of its {self.capacity_bytes} bytes are in use"
            )
        for other in free:
            if missing <= 0:
                return
            missing -= others[other]
            self._remove(other)
            self.evictions += 1

    def _is_free(self, digest: str) -> bool:
        return digest not in self._holds and digest not in self._flights

    def _remove(self, digest: str) -> None:
        with disk_errors(digest):
            self.path(digest).unlink(missing_ok=True)
        self._bytes.pop(digest, None)
        self._room.notify_all()


def _scan(directory: Path) -> dict[str, int]:
    """The size of each file that has a digest as its name, the least recently used one first."""
    found = []
    with os.scandir(directory) as entries:
        for entry in entries:
            digest, suffix = os.path.splitext(entry.name)
            if suffix == _SUFFIX and _DIGEST.fullmatch(digest) and entry.is_file(follow_symlinks=False):
                with suppress(FileNotFoundError):  # removed since the directory was read
                    stat = entry.stat()
                    found.append((stat.st_mtime_ns, digest, stat.st_size))
    return {digest: size for _, digest, size in sorted(found)}


def _digest_of(path: Path) -> str:
    """The digest of a file's bytes; "" if the file is absent or cannot be read."""
    try:
        with path.open("rb") as file:
            digest = blake3()
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
            return digest.hexdigest()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EIO):
            raise
        return ""
