"""Files under the digest of their bytes, on a disk of this machine, the least recently used ones gone first."""

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
    """At most `capacity_bytes` of files, each named by the BLAKE3 digest of its bytes; safe from any thread.

    What a process leaves behind, however it ended, the next one takes over, in the order of last use (a file's
    modification time). Only `fetch` reads files and believes them, and it checks each time. A reader that
    has a file open keeps it through an eviction; one that will open it later must `hold` it.
    `StoreError` when another process uses the directory.
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
                self._bytes = _found(directory)  # of each file that is here; the least recently used one first
                self.scratch = Scratch(directory / ".scratch")
            except BaseException:
                os.close(self._lock_file)
                raise
        self._holds: Counter[str] = Counter()
        self._pins: Counter[str] = Counter()  # those of the holds that nobody will soon release
        self._flights: dict[str, Future[Path]] = {}
        self._expected: dict[str, int] = {}  # bytes that downloads under way will need
        self._lock = RLock()
        self._room = Condition(self._lock)  # something that took room has gone, or may go now
        with self._lock:
            self._make_room(None, 0)

    def close(self) -> None:
        """Let another process have the directory, and whoever waits for room fail; closing twice is fine."""
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
        """Bytes of the files that are here and held: as long as they are, the rest must do with what is left."""
        with self._lock:
            return sum(size for digest, size in self._bytes.items() if digest in self._holds)

    def path(self, digest: str) -> Path:
        """The file with this digest, which need not be there."""
        if not _DIGEST.fullmatch(digest):
            raise InvalidKey(f"{digest!r} is not a digest: expected 64 hexadecimal digits")
        return self._directory / f"{digest}{_SUFFIX}"

    def has(self, digest: str) -> bool:
        """Whether the file is here, as far as one can tell without reading it."""
        return digest in self._bytes

    def fetch(self, digest: str, size: int, download: Callable[[Path], object], *, wait_seconds: float = 0.0) -> Path:
        """The file with this digest, its bytes checked, from here or else by `download`, which writes it to a path.

        Whoever asks for a digest while it is on its way waits for it, and shares a failure, too: `Corrupt` when the
        bytes are not `size` bytes with this digest, `StoreFull` when they do not fit beside what is held,
        or whatever `download` raises. The next call tries again. What may fit as soon as others are released or
        have arrived is waited for, `wait_seconds` at most; what cannot fit beside the pinned files fails at once.
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
            if not self._use(digest, path):
                self._bring(digest, path, size, download, wait_seconds)
        except BaseException as error:
            self._land(digest).set_exception(error)
            raise
        self._land(digest).set_result(path)
        return path

    def add(self, digest: str, file: Path) -> None:
        """Move a file in whose bytes are known to have this digest; if there is no room for it, it is removed."""
        path = self.path(digest)
        with disk_errors(digest), self._lock:
            size = file.stat().st_size
            try:
                self._make_room(digest, size)
            except StoreFull:
                file.unlink()
            else:
                self._take_in(digest, file, path, size)

    def hold(self, digest: str, *, pinned: bool = False) -> None:
        """Keep a file, here now or later, from eviction until as many calls of `release`.

        `pinned` is for what may stay held for ever, so that nobody waits for it; it is released as such.
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
        """Recount: what is believed of the files is so, and they fit."""
        with self._lock:
            assert _found(self._directory) == self._bytes
            assert self.bytes_used + sum(self._expected.values()) <= self.capacity_bytes
            assert self._expected.keys() <= self._flights.keys()
            assert all(count > 0 for count in self._holds.values())
            assert self._pins <= self._holds
            if not self._flights:
                assert not any(self.scratch.path.glob(f"*{_ARRIVING}"))

    def _share(self, flight: Future[Path]) -> Path:
        path = flight.result()
        with self._lock:
            self.hits += 1  # it cost no download
        return path

    def _land(self, digest: str) -> Future[Path]:
        with self._room:
            self._expected.pop(digest, None)
            self._room.notify_all()
            return self._flights.pop(digest)

    def _use(self, digest: str, path: Path) -> bool:
        """Whether the file is here and good; one that is not good is removed."""
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

    def _bring(
        self, digest: str, path: Path, size: int, download: Callable[[Path], object], wait_seconds: float
    ) -> None:
        with self._lock:
            if digest in self._bytes:  # somebody has just uploaded it
                self.hits += 1
                return
            self.misses += 1
            if not self._wait_for_room(digest, size, wait_seconds):
                return
            self._expected[digest] = size
        with disk_errors(digest):
            arriving = self.scratch.path / f"{digest}{_ARRIVING}"  # of the one download that there is of it
        try:
            download(arriving)
            with disk_errors(digest):
                found = arriving.stat().st_size
                if found != size:
                    raise Corrupt(f"{digest} should have {size} bytes, and {found} were brought")
                if _digest_of(arriving) != digest:
                    raise Corrupt(f"the {size} bytes that were brought as {digest} have another digest")
                with self._lock:
                    del self._expected[digest]
                    self._take_in(digest, arriving, path, size)
        finally:
            arriving.unlink(missing_ok=True)

    def _take_in(self, digest: str, file: Path, path: Path, size: int) -> None:
        os.utime(file)
        os.rename(file, path)
        self._bytes.pop(digest, None)
        self._bytes[digest] = size
        self._room.notify_all()

    def _wait_for_room(self, digest: str, size: int, wait_seconds: float) -> bool:
        """Make room as soon as that can be done; False when an upload has brought the file meanwhile."""
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
        """Evict what was not used for longest until a file fits in its old one's place; nothing if it cannot."""
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


def _found(directory: Path) -> dict[str, int]:
    """The bytes of each file whose name is one of ours, the least recently used one first."""
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
    """The digest of a file's bytes; "" if it cannot be read to its end."""
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
