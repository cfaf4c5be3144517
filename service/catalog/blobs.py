"""Adapter files under their digest: kept, and known to the engine, while anything counts on them."""

import asyncio
import logging
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Collection, Coroutine, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from runtime.messages import AdapterState
from service.catalog.files import SUFFIX, AdapterStorage
from service.engine.adapters import EngineAdapters
from service.metrics import Metrics
from storage.scratch import memory_scratch
from storage.store import AccessDenied, Corrupt, NotFound, ObjectTooLarge, StoreError, StoreFull, StoreUnavailable

_log = logging.getLogger(__name__)
_DOWNLOADS = 4  # at once: each of them may use several connections
IDLE = AdapterState(digest="", state="idle")
UNKNOWN = "no name points at it any more"
# What clients are told of a file that cannot be had; the log has where it should have been
REASONS: dict[type[Exception], str] = {
    NotFound: "its file is missing from the adapter store",
    Corrupt: "its file in the adapter store is corrupt",
    ObjectTooLarge: "its file in the adapter store is corrupt",
    AccessDenied: "the adapter store denies access to its file",
    StoreUnavailable: "the adapter store does not answer",
    StoreFull: "there is no room for its file on this server's disk",
}


class Download:
    """A file on its way from a remote store, in bytes."""

    def __init__(self, bytes_total: int) -> None:
        self.bytes_done, self.bytes_total = 0, bytes_total

    def progress(self, done: int, total: int) -> None:
        self.bytes_done, self.bytes_total = done, total


class Blobs:
    """The bytes that names and requests stand on: in the store, or in memory for ephemeral uploads.

    Each name, each running request and each upload under way counts one on its digest. When the last of
    them lets go, the engine forgets the digest, and a file that was only in memory goes; what is stored stays
    until it is collected.
    """

    def __init__(self, storage: AdapterStorage, engine: EngineAdapters, metrics: Metrics) -> None:
        self._storage, self._files, self._engine, self._metrics = storage, storage.files, engine, metrics
        self._memory = memory_scratch()
        self._counts: dict[str, int] = {}
        self._sizes: dict[str, int] = {}  # of those that are stored
        self._in_memory: set[str] = set()
        self._broken: set[str] = set()  # stored, but not with the bytes of its digest
        self._served: dict[str, Path] = {}
        self._downloads: dict[str, Download] = {}
        self._held: set[str] = set()  # brought, and not read yet: the cache must not evict them before that
        self._slots = asyncio.Semaphore(_DOWNLOADS)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def staging(self, ephemeral: bool) -> AsyncIterator[Path]:
        """A private directory for an upload, on the file system where its bytes will stay; removed at the end."""
        parent = self._memory.path if ephemeral else self._files.scratch
        directory = Path(tempfile.mkdtemp(dir=parent))  # at once: a cancelled thread would leave one behind
        try:
            yield directory
        finally:
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True))

    @property
    def digests(self) -> Collection[str]:
        """Everything that is counted on."""
        return self._counts.keys()

    def path(self, digest: str) -> Path:
        return self._memory_path(digest) if digest in self._in_memory else self._files.path(digest)

    def here(self, digest: str) -> bool:
        """Whether the file is on this machine."""
        return digest in self._in_memory or self._files.has(digest)

    def download(self, digest: str) -> Download | None:
        """How far the file's way from a remote store is, None when it is on none."""
        return self._downloads.get(digest)

    def counted(self, digest: str) -> bool:
        return digest in self._counts

    async def close(self) -> None:
        """Drop what is only in memory; what is stored stays."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._memory.close)

    def adopt(self, digest: str, size: int) -> None:
        """Count one on a digest that a name in the store points at."""
        self._sizes[digest] = size
        self.acquire(digest)

    async def keep(self, digest: str, size: int, file: Path, *, ephemeral: bool) -> None:
        """Count one on a digest and make its bytes, verified and staged in `file`, stay."""
        self.acquire(digest)
        try:
            async with self._lock(digest):
                if ephemeral:  # of its own, even if it is stored too: what is stored may lose its name and go
                    await asyncio.to_thread(shutil.move, file, self._memory_path(digest))
                    self._in_memory.add(digest)
                else:
                    await self._storage.run(self._files.add, digest, file, replace=digest in self._broken)
                    self._sizes[digest] = size
                if digest in self._broken or self._engine.states.get(digest, IDLE).state == "failed":
                    self._served.pop(digest, None)  # so that the engine hears of the whole file
                self._broken.discard(digest)
        except BaseException:
            self.release(digest)
            raise

    async def confirm(self, digest: str, file: Path) -> None:
        """Make sure that a file that was kept is stored still, now that a name points at it.

        A collector may have listed it before it was made new, and have deleted it after.
        """
        await self._storage.run(self._files.confirm, digest, file)

    def serve(self, digest: str) -> None:
        """Make the engine know a digest, and where its file is."""
        path = self.path(digest)
        if self._served.get(digest) != path:
            self._served[digest] = path
            self._engine.register(digest, path)

    def acquire(self, digest: str) -> None:
        self._counts[digest] = self._counts.get(digest, 0) + 1

    def release(self, digest: str) -> None:
        self._counts[digest] -= 1
        if not self._counts[digest]:
            del self._counts[digest]
            self._start(self._discard(digest))

    async def settle(self) -> None:
        """Wait until everything that nobody counts on is gone, and every download has ended."""
        await self._engine.changes.join()
        while self._tasks:
            await asyncio.gather(*self._tasks)
            await self._engine.changes.join()

    def check(self, counts: Mapping[str, int]) -> None:
        """Assert that exactly these digests are counted, so often, and that nothing else is kept."""
        assert self._counts == counts, f"counted {self._counts}, expected {counts}"
        known = self._sizes.keys() | self._in_memory
        assert known == counts.keys(), f"{known ^ counts.keys()} are counted and unknown, or the other way round"
        assert self._served.keys() | self._broken | self._held <= counts.keys()
        kept = {path.name.removesuffix(SUFFIX) for path in self._memory.path.glob(f"*{SUFFIX}")}
        assert kept == self._in_memory, f"{kept ^ self._in_memory} are in memory for nobody, or should be and are not"

    async def follow_engine(self) -> None:
        """Fetch the files that the engine asks for, and let the cache evict those that it has read; for ever."""
        while True:
            state = await self._engine.changes.get()
            if state.state == "missing":
                self._on_wanted(state.digest)
            elif state.state != "loading":
                self._on_settled(state.digest)
            self._engine.changes.task_done()

    def _on_wanted(self, digest: str) -> None:
        if digest in self._counts and digest not in self._downloads:
            size = self._sizes.get(digest, 0)
            self._downloads[digest] = Download(size)
            self._start(self._bring(digest, size, self._downloads[digest]))

    async def _bring(self, digest: str, size: int, download: Download) -> None:
        """Fetch or verify the file that the engine did not find, and tell the engine how that went."""
        if digest not in self._held:
            self._held.add(digest)
            self._files.hold(digest)
        try:
            async with self._slots:
                started = time.monotonic()
                if digest not in self._in_memory:
                    await self._storage.run(self._files.bring, digest, size, download.progress)
                seconds = time.monotonic() - started
        except (StoreError, OSError) as error:
            _log.warning("adapter %s: %s", digest, error)
            if isinstance(error, Corrupt | NotFound | ObjectTooLarge):
                self._broken.add(digest)
            self._on_settled(digest)
            reason = REASONS.get(type(error), "its file cannot be read") if digest in self._counts else UNKNOWN
            self._engine.fail(digest, reason)
            return
        finally:
            del self._downloads[digest]
        self._metrics.downloaded(seconds)
        if digest in self._counts:
            self._engine.register(digest, self.path(digest))
        else:
            self._on_settled(digest)

    def _on_settled(self, digest: str) -> None:
        if digest in self._held:
            self._held.discard(digest)
            self._files.release(digest)

    async def _discard(self, digest: str) -> None:
        async with self._lock(digest):
            if digest in self._counts:
                return  # the same bytes came again meanwhile
            self._broken.discard(digest)
            self._sizes.pop(digest, None)
            self._in_memory.discard(digest)
            if digest not in self._downloads:
                self._on_settled(digest)
            if self._served.pop(digest, None) is not None:
                self._engine.retire(digest)
            await asyncio.to_thread(self._memory_path(digest).unlink, missing_ok=True)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _memory_path(self, digest: str) -> Path:
        return self._memory.path / f"{digest}{SUFFIX}"

    def _lock(self, digest: str) -> asyncio.Lock:
        return self._locks.setdefault(digest, asyncio.Lock())
