"""Adapter files under their digest: kept, and known to the engine, while anything counts on them."""

import asyncio
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol
from weakref import WeakValueDictionary

from blake3 import blake3

from runtime.messages import AdapterState
from storage.local import LocalStore
from storage.scratch import Scratch
from storage.store import StoreError

_log = logging.getLogger(__name__)
_PREFIX, _SUFFIX = "blobs/", ".safetensors"


class Engine(Protocol):
    """What adapters need of the engine's client."""

    @property
    def adapter_states(self) -> Mapping[str, AdapterState]: ...

    def register_adapter(self, digest: str, path: Path, load: bool = False) -> None: ...

    def retire_adapter(self, digest: str) -> None: ...

    def end_requests(self, code: str, message: str, digest: str | None = None) -> None: ...


class Blobs:
    """The bytes that names and requests stand on: in the store, or in memory for ephemeral uploads.

    Each name, each running request and each upload under way counts one on its digest. When the last of
    them lets go, the engine forgets the digest and the file goes.
    """

    def __init__(self, store: LocalStore, engine: Engine) -> None:
        self._store, self._engine = store, engine
        self._memory = _memory_scratch()
        self._counts: dict[str, int] = {}
        self._stored: set[str] = set()
        self._failures: dict[str, str] = {}
        self._served: dict[str, Path] = {}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._discards: set[asyncio.Task[None]] = set()

    def path(self, digest: str) -> Path:
        return self._store.path(_key(digest)) if digest in self._stored else self._memory_path(digest)

    def failure(self, digest: str) -> str | None:
        """Why a digest cannot be served, None if it can."""
        return self._failures.get(digest)

    @property
    def memory(self) -> Path:
        """The directory of what is only in memory."""
        return self._memory.path

    def close(self) -> None:
        """Drop what is only in memory; what is stored stays."""
        self._memory.close()

    def adopt(self, digest: str, failure: str | None) -> None:
        """Count one on a blob found in the store; blocks to verify its bytes unless it has failed already."""
        if digest not in self._counts:
            failure = failure or self._verify(digest)
            self._stored.add(digest)
            if failure is not None:
                self._failures[digest] = failure
        self.acquire(digest)

    def collect(self, wanted: Iterable[str]) -> None:
        """Delete the stored blobs that are not wanted; blocks."""
        wanted = {_key(digest) for digest in wanted}
        with self._store.scratch.alone() as alone:
            for entry in self._store.list(_PREFIX):
                # Another process may have stored a blob that it is about to name.
                if alone and entry.key not in wanted:
                    _log.info("deleting %s: no name points at it", entry.key)
                    self._store.delete(entry.key)

    async def keep(self, digest: str, file: Path, *, ephemeral: bool) -> None:
        """Count one on a digest and make its bytes, verified and staged in `file`, stay."""
        self.acquire(digest)
        try:
            async with self._lock(digest):
                if digest in self._stored and digest not in self._failures:
                    return
                if ephemeral:
                    await asyncio.to_thread(shutil.move, file, self._memory_path(digest))
                    self._stored.discard(digest)
                else:
                    await asyncio.to_thread(self._store.put, _key(digest), file)
                    self._stored.add(digest)
                self._failures.pop(digest, None)
        except BaseException:
            self.release(digest)
            raise

    def serve(self, digest: str, *, load: bool) -> None:
        """Make the engine know a digest, and load it if asked."""
        path = self.path(digest)
        if load or self._served.get(digest) != path:
            self._served[digest] = path
            self._engine.register_adapter(digest, path, load)

    def acquire(self, digest: str) -> None:
        self._counts[digest] = self._counts.get(digest, 0) + 1

    def release(self, digest: str) -> None:
        self._counts[digest] -= 1
        if not self._counts[digest]:
            del self._counts[digest]
            task = asyncio.get_running_loop().create_task(self._discard(digest))
            self._discards.add(task)
            task.add_done_callback(self._discards.discard)

    def counted(self, digest: str) -> bool:
        return digest in self._counts

    async def settle(self) -> None:
        """Wait until everything that nobody counts on is gone."""
        while self._discards:
            await asyncio.gather(*self._discards)

    def check(self, counts: Mapping[str, int]) -> None:
        """Assert that exactly these digests are counted, so often, and that each is served or has failed."""
        assert self._counts == counts, f"counted {self._counts}, expected {counts}"
        assert self._stored | self._served.keys() | self._failures.keys() <= counts.keys()
        for digest in counts:
            assert self.path(digest).exists() or digest in self._failures, f"{digest} has no file"
            assert digest in self._served or digest in self._failures, f"{digest} is unknown to the engine"

    async def _discard(self, digest: str) -> None:
        async with self._lock(digest):
            if digest in self._counts:
                return  # the same bytes came again meanwhile
            self._failures.pop(digest, None)
            stored = digest in self._stored
            self._stored.discard(digest)
            if self._served.pop(digest, None) is not None:
                self._engine.retire_adapter(digest)
            await asyncio.to_thread(self._remove, digest, stored)

    def _remove(self, digest: str, stored: bool) -> None:
        self._memory_path(digest).unlink(missing_ok=True)
        if not stored:
            return
        try:
            with self._store.scratch.alone() as alone:
                if alone:  # else another process may count on it
                    self._store.delete(_key(digest))
        except StoreError as error:
            _log.warning("could not delete %s, the next start will: %s", _key(digest), error)

    def _verify(self, digest: str) -> str | None:
        path = self._store.path(_key(digest))
        if not path.exists():
            return f"its file {_key(digest)} is missing from the store"
        found = blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()
        return None if found == digest else f"its file {_key(digest)} is corrupt: its digest is {found}"

    def _memory_path(self, digest: str) -> Path:
        return self._memory.path / f"{digest}{_SUFFIX}"

    def _lock(self, digest: str) -> asyncio.Lock:
        return self._locks.setdefault(digest, asyncio.Lock())


def _key(digest: str) -> str:
    return f"{_PREFIX}{digest}{_SUFFIX}"


def _memory_scratch() -> Scratch:
    """A directory in memory where the machine offers one: ephemeral adapters never touch a disk."""
    shared = Path("/dev/shm")
    parent = shared if os.access(shared, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
    root = parent / f"rootstock-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    if os.lstat(root).st_uid != os.getuid():
        raise PermissionError(f"{root} belongs to another user")
    return Scratch(root)
