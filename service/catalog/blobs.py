"""Adapter files by digest: each is kept, and the engine knows it, while anything refers to it."""

import asyncio
import logging
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Collection, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from runtime.adapter_format.errors import InvalidAdapter
from runtime.adapter_format.mix import Mix, Part, compose
from runtime.background import yield_to_others
from runtime.messages import AdapterState
from service.catalog.files import SUFFIX, AdapterStorage
from service.engine.adapters import EngineAdapters
from service.metrics import Metrics
from storage.scratch import memory_scratch
from storage.store import AccessDenied, Corrupt, NotFound, ObjectTooLarge, StoreError, StoreFull, StoreUnavailable

_log = logging.getLogger(__name__)
_DOWNLOADS = 4  # at once: each of them may use several connections
UNREFERENCED = "no name points at it any more"
# What clients are told when a file cannot be fetched. The log also says where it should have been.
REASONS: dict[type[Exception], str] = {
    NotFound: "its file is missing from the adapter store",
    Corrupt: "its file in the adapter store is corrupt",
    ObjectTooLarge: "its file in the adapter store is corrupt",
    AccessDenied: "the adapter store denies access to its file",
    StoreUnavailable: "the adapter store does not answer",
    StoreFull: "there is no room for its file on this server's disk",
}


class Ingredient(NamedTuple):
    """One part of a mix."""

    digest: str
    weight: float
    bytes: int  # of its canonical file


class Recipe(NamedTuple):
    """What the file of a mix is composed of, as often as it is needed."""

    parts: tuple[Ingredient, ...]
    max_rank: int  # of a module


class Download:
    """A file that is fetched from a remote store, in bytes."""

    def __init__(self, bytes_total: int) -> None:
        self.bytes_done, self.bytes_total = 0, bytes_total

    def progress(self, done: int, total: int) -> None:
        self.bytes_done, self.bytes_total = done, total


class Blob:
    """One content: who refers to it, where its file is, and what the engine knows."""

    def __init__(self, digest: str) -> None:
        self.digest = digest
        self.references = 0  # names, running requests and uploads
        self.stored_bytes: int | None = None  # size of the file in the store; None: it is not stored
        self.in_memory = False  # an ephemeral upload, with a file of its own even if the content is stored too
        self.recipe: Recipe | None = None  # of a mix, whose file is in the scratch directory
        self.broken = False  # the stored file is missing or has other bytes
        self.held = False  # the disk cache must not evict it: it was fetched, and the engine has not read it yet
        self.registered: Path | None = None  # where the engine was told that the file is
        self.download: Download | None = None
        self.lock = asyncio.Lock()  # held while its file is stored or removed


class Blobs:
    """Owns the files that names and requests refer to: in the store, in memory for ephemeral uploads, composed of both.

    Each name, each running request and each upload counts one reference to its digest. After the last release the
    engine forgets the digest, and a file in memory or of a mix is removed. A stored file stays until it is collected.
    """

    def __init__(self, storage: AdapterStorage, engine: EngineAdapters, metrics: Metrics) -> None:
        self._storage, self._files, self._engine, self._metrics = storage, storage.files, engine, metrics
        self._memory = memory_scratch()
        self._blobs: dict[str, Blob] = {}  # those with references, and those that are being discarded
        self._slots = asyncio.Semaphore(_DOWNLOADS)
        self._tasks: set[asyncio.Task[None]] = set()
        # One, so that the memory for composing is bounded; of low priority, because steps wait for all their threads
        self._mixer = ThreadPoolExecutor(1, "adapter-mixer", yield_to_others)

    @asynccontextmanager
    async def staging(self, ephemeral: bool) -> AsyncIterator[Path]:
        """A private directory for an upload, on the file system where its bytes will stay; removed at the end."""
        parent = self._memory.path if ephemeral else self._files.scratch
        directory = Path(tempfile.mkdtemp(dir=parent))  # not on a thread: a cancelled one would leave it behind
        try:
            yield directory
        finally:
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True))

    @property
    def digests(self) -> Collection[str]:
        """Every digest with references."""
        return [digest for digest, blob in self._blobs.items() if blob.references]

    def referenced(self, digest: str) -> bool:
        blob = self._blobs.get(digest)
        return blob is not None and blob.references > 0

    def here(self, digest: str) -> bool:
        """Whether the file is on this machine."""
        blob = self._blobs.get(digest)
        if blob is not None and blob.recipe is not None:
            return self._path(blob).exists()
        return (blob is not None and blob.in_memory) or self._files.has(digest)

    def download(self, digest: str) -> Download | None:
        """The progress of the file's download from a remote store, None while there is no download."""
        blob = self._blobs.get(digest)
        return None if blob is None else blob.download

    async def close(self) -> None:
        """Remove the files in memory; stored files stay."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._mixer.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._memory.close)

    def adopt(self, digest: str, size: int) -> None:
        """Add a reference to a digest that a name in the store points at."""
        self.acquire(digest)
        self._blobs[digest].stored_bytes = size

    async def keep(self, digest: str, size: int, file: Path, *, ephemeral: bool) -> None:
        """Add a reference to a digest and keep its bytes, which are verified and staged in `file`."""
        self.acquire(digest)
        blob = self._blobs[digest]
        try:
            async with blob.lock:
                if ephemeral:
                    await asyncio.to_thread(shutil.move, file, self._memory_path(digest))
                    blob.in_memory = True
                else:
                    await self._storage.run(self._files.add, digest, file, replace=blob.broken)
                    blob.stored_bytes = size
                state = self._engine.states.get(digest)
                if blob.broken or (state is not None and state.state == "failed"):
                    blob.registered = None  # so that `serve` tells the engine of the whole file
                blob.broken = False
        except BaseException:
            self.release(digest)
            raise

    async def mix(self, recipe: Recipe) -> Mix:
        """Compose a mix, add a reference to its digest, and tell the engine of it.

        Raises InvalidAdapter for parts that cannot be mixed, StoreError or OSError for a file that cannot be had.
        """
        async with self.staging(ephemeral=False) as directory:
            file = directory / f"mix{SUFFIX}"
            found = await self._compose(recipe, file)
            self.acquire(found.digest)
            blob = self._blobs[found.digest]
            try:
                async with blob.lock:
                    await asyncio.to_thread(file.replace, self._mix_path(found.digest))
                    blob.recipe = recipe
                    state = self._engine.states.get(found.digest)
                    if state is not None and state.state == "failed":
                        blob.registered = None  # so that `serve` tells the engine of the new file
                self.serve(found.digest)
            except BaseException:
                self.release(found.digest)
                raise
        return found

    def mixes_of(self, digest: str) -> list[str]:
        """The digests of the mixes that a digest is a part of."""
        mixes = [(blob.digest, blob.recipe.parts) for blob in self._blobs.values() if blob.recipe is not None]
        return [mix for mix, parts in mixes if any(part.digest == digest for part in parts)]

    async def confirm(self, digest: str, file: Path) -> None:
        """Store a file again if the store has lost it since `keep`; called once a name points at it.

        A collector may have listed the file before `keep` touched it, and deleted it afterwards.
        """
        await self._storage.run(self._files.confirm, digest, file)

    def serve(self, digest: str) -> None:
        """Tell the engine where the file of a digest is."""
        blob = self._blobs[digest]
        if blob.registered != self._path(blob):
            self._register(blob)

    def acquire(self, digest: str) -> None:
        """Add a reference to a digest."""
        if digest not in self._blobs:
            self._blobs[digest] = Blob(digest)
        self._blobs[digest].references += 1

    def release(self, digest: str) -> None:
        """Remove a reference to a digest."""
        blob = self._blobs[digest]
        blob.references -= 1
        if not blob.references:
            self._start(self._discard(blob))

    async def until_idle(self) -> None:
        """Wait until every digest without references is discarded and every download has ended."""
        await self._engine.changes.join()
        while self._tasks:
            await asyncio.gather(*self._tasks)
            await self._engine.changes.join()

    def check(self, references: Mapping[str, int]) -> None:
        """Assert that exactly these digests are referenced, so often, and that no other file is kept."""
        counted = {digest: blob.references for digest, blob in self._blobs.items()}
        assert counted == references, f"counted {counted}, expected {references}"
        for digest, blob in self._blobs.items():
            assert blob.in_memory or blob.recipe or blob.stored_bytes is not None, (
                f"{digest} is referenced and kept nowhere"
            )
            assert blob.download is None, f"{digest} is still being fetched"
        kept = {path.name.removesuffix(SUFFIX) for path in self._memory.path.glob(f"*{SUFFIX}")}
        expected = {digest for digest, blob in self._blobs.items() if blob.in_memory}
        assert kept == expected, f"{kept ^ expected} are in memory without a reference, or are missing there"
        kept = {path.name.removesuffix(SUFFIX) for path in self._files.scratch.glob(f"*{SUFFIX}")}
        expected = {digest for digest, blob in self._blobs.items() if blob.recipe is not None}
        assert kept == expected, f"{kept ^ expected} are mixes without a reference, or are missing"

    def on_state(self, state: AdapterState) -> int | None:
        """Fetch a file that the engine asks for, or let the cache evict one that it has read; returns its bytes."""
        if (blob := self._blobs.get(state.digest)) is None:
            return None
        if state.state == "missing":
            self._on_missing(blob)
        elif state.state != "loading":
            self._allow_eviction(blob)
        return blob.stored_bytes

    def _on_missing(self, blob: Blob) -> None:
        if blob.references and blob.download is None:
            blob.download = Download(blob.stored_bytes or 0)
            self._start(self._fetch(blob, blob.download))

    async def _fetch(self, blob: Blob, download: Download) -> None:
        """Fetch or verify a file that the engine did not find, and tell the engine the outcome."""
        if not blob.held:
            blob.held = True
            self._files.hold(blob.digest)
        failure: StoreError | OSError | InvalidAdapter | None = None
        try:
            started = time.monotonic()
            if blob.recipe is not None:
                await self._compose_again(blob, blob.recipe)
            else:
                async with self._slots:
                    started = time.monotonic()
                    if not blob.in_memory:
                        await self._storage.run(self._files.fetch, blob.digest, download.bytes_total, download.progress)
            ended = time.monotonic()
        except (StoreError, OSError, InvalidAdapter) as error:
            failure = error
        finally:
            blob.download = None
        if not blob.references:
            self._start(self._discard(blob))  # the first attempt left the record to this download
        if failure is not None:
            _log.warning("adapter %s: %s", blob.digest, failure)
            blob.broken = blob.broken or isinstance(failure, Corrupt | NotFound | ObjectTooLarge)
            self._allow_eviction(blob)
            reason = REASONS.get(type(failure), "its file cannot be read") if blob.references else UNREFERENCED
            self._engine.fail(blob.digest, reason)
            return
        if blob.recipe is None:
            self._metrics.downloaded(ended - started)
            self._engine.fetched(blob.digest, started, ended)
        if blob.references:
            self._register(blob)

    async def _compose(self, recipe: Recipe, file: Path) -> Mix:
        """Write the file of a mix, from parts that are kept and verified meanwhile."""
        with ExitStack() as held:
            parts = []
            for digest, weight, size in recipe.parts:
                self.acquire(digest)
                held.callback(self.release, digest)
                self._files.hold(digest)
                held.callback(self._files.release, digest)
                blob = self._blobs[digest]
                if not blob.in_memory:
                    async with self._slots:
                        await self._storage.run(self._files.fetch, digest, size)
                path = self._memory_path(digest) if blob.in_memory else self._files.path(digest)
                parts.append(Part(path, weight))
            work = partial(compose, parts, file, max_rank=recipe.max_rank)
            return await asyncio.get_running_loop().run_in_executor(self._mixer, work)

    async def _compose_again(self, blob: Blob, recipe: Recipe) -> None:
        async with self.staging(ephemeral=False) as directory:
            file = directory / f"mix{SUFFIX}"
            await self._compose(recipe, file)
            if blob.references:
                await asyncio.to_thread(file.replace, self._mix_path(blob.digest))

    def _register(self, blob: Blob) -> None:
        blob.registered = self._path(blob)
        self._engine.register(blob.digest, blob.registered)

    def _retire(self, blob: Blob) -> None:
        if blob.registered is not None:
            blob.registered = None
            self._engine.retire(blob.digest)

    def _allow_eviction(self, blob: Blob) -> None:
        if blob.held:
            blob.held = False
            self._files.release(blob.digest)

    async def _discard(self, blob: Blob) -> None:
        """Forget a digest, unless it has references again."""
        async with blob.lock:
            if blob.references or self._blobs.get(blob.digest) is not blob:
                return
            mixed, blob.in_memory, blob.recipe = blob.recipe is not None, False, None
            self._retire(blob)
            await asyncio.to_thread(self._memory_path(blob.digest).unlink, missing_ok=True)
            if mixed:
                await asyncio.to_thread(self._mix_path(blob.digest).unlink, missing_ok=True)
            if not blob.references and blob.download is None:
                self._retire(blob)  # again: a name may have come and gone while the file was removed
                self._allow_eviction(blob)
                del self._blobs[blob.digest]

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _path(self, blob: Blob) -> Path:
        if blob.recipe is not None:
            return self._mix_path(blob.digest)
        return self._memory_path(blob.digest) if blob.in_memory else self._files.path(blob.digest)

    def _mix_path(self, digest: str) -> Path:
        return self._files.scratch / f"{digest}{SUFFIX}"

    def _memory_path(self, digest: str) -> Path:
        return self._memory.path / f"{digest}{SUFFIX}"
