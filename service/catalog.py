"""Which adapter a name means: names point at digests, durably in the store."""

import asyncio
import logging
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import msgspec
from blake3 import blake3

from runtime.models.config import ModelConfig
from service.adapter_version import AdapterRecord, AdapterVersion, Condition, Upload, record_of
from service.blobs import Blobs, Engine
from service.responses import ApiError
from storage.local import LocalStore
from storage.store import NotFound, PreconditionFailed, StoreError

_log = logging.getLogger(__name__)
_PREFIX, _SUFFIX = "names/", ".json"
_T = TypeVar("_T")


class Catalog:
    """Owns which version a name means; a name is written only once its bytes are durable.

    All calls belong to one event loop. Readers never wait: they see the view in memory.
    """

    def __init__(self, store: LocalStore, engine: Engine, model: ModelConfig, max_rank: int) -> None:
        self._store = store
        self._engine = engine
        self._blobs = Blobs(store, engine)
        self._base, self._max_rank = _shape(model), max_rank
        self._names: dict[str, AdapterVersion] = {}
        self._etags: dict[str, str] = {}
        self._draining: set[AdapterVersion] = set()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._changes: set[asyncio.Task[Any]] = set()

    @classmethod
    async def open(cls, directory: Path, engine: Engine, model: ModelConfig, max_rank: int) -> "Catalog":
        """The catalog of the store in `directory`, loaded."""
        catalog = cls(await asyncio.to_thread(LocalStore, directory), engine, model, max_rank)
        await catalog.load()
        return catalog

    async def load(self) -> None:
        """Read every name from the store, verify its bytes, and make the engine know it."""
        await asyncio.to_thread(self._load)
        for version in self.list():
            if self.failure(version) is None:
                self._blobs.serve(version.digest, load=version.record.pinned)

    async def close(self) -> None:
        """Forget everything that is only in memory; the names and their bytes stay in the store."""
        await self.settle()
        await asyncio.to_thread(self._blobs.close)
        await asyncio.to_thread(self._store.close)

    def resolve(self, name: str) -> AdapterVersion | None:
        """The version that a name means now; enter `using` before the next await, or it may be gone."""
        return self._names.get(name)

    @contextmanager
    def using(self, version: AdapterVersion) -> Iterator[None]:
        """Keep a version, its bytes and its place in the engine for as long as one request runs.

        Raises ApiError: 503 `adapter_failed` for one that cannot be served, 404 `model_not_found` for one
        that ended before the block began.
        """
        if (failure := self.failure(version)) is not None:
            raise ApiError(503, "adapter_failed", f"adapter {version.name!r} cannot be served: {failure}", "model")
        if not self._blobs.counted(version.digest):
            raise ApiError(404, "model_not_found", f"adapter {version.name!r} was deleted", "model")
        self._blobs.acquire(version.digest)
        version.requests += 1
        version.last_used_at = time.time()
        try:
            yield
        finally:
            version.requests -= 1
            if not version.requests:
                self._draining.discard(version)
            self._blobs.release(version.digest)

    def list(self) -> list[AdapterVersion]:
        """Every named version, by name."""
        return [version for _, version in sorted(self._names.items())]

    def draining(self, name: str) -> AdapterVersion | None:
        """The latest version that lost this name while requests run on it."""
        ended = [version for version in self._draining if version.name == name]
        return max(ended, key=lambda version: version.record.created_at, default=None)

    def failure(self, version: AdapterVersion) -> str | None:
        """Why a version cannot be served, None if it can."""
        return self._blobs.failure(version.digest)

    @property
    def memory(self) -> Path:
        """The directory of ephemeral uploads."""
        return self._blobs.memory

    @asynccontextmanager
    async def staging(self, ephemeral: bool) -> AsyncIterator[Path]:
        """A private directory for an upload, where its bytes will stay; what is left in it goes with it."""
        parent = self._blobs.memory if ephemeral else self._store.scratch.path
        directory = Path(await asyncio.to_thread(tempfile.mkdtemp, dir=parent))
        try:
            yield directory
        finally:
            await self._whole(asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True))

    def require(self, name: str, condition: Condition, *, ephemeral: bool = False) -> None:
        """Raise the ApiError that a change of the name would meet now: 412, or 409 for a durable name."""
        version = self._names.get(name)
        if condition.if_none_match and version is not None:
            raise ApiError(412, "precondition_failed", f"adapter {name!r} exists", "If-None-Match")
        if condition.if_match is not None:
            if version is None:
                raise ApiError(412, "precondition_failed", f"adapter {name!r} does not exist", "If-Match")
            if not condition.if_match & {"*", version.digest}:
                raise ApiError(412, "precondition_failed", f"adapter {name!r} is now {version.digest}", "If-Match")
        if ephemeral and version is not None and not version.ephemeral:
            message = f"adapter {name!r} is stored durably: delete it first, or upload under another name"
            raise ApiError(409, "adapter_is_durable", message, "ephemeral")

    async def publish(self, name: str, upload: Upload, condition: Condition) -> tuple[AdapterVersion, bool]:
        """Make a name mean an upload, and say whether the name is new; durable when this returns.

        The generation rises only with another digest. Raises ApiError as `require` does, or 409 if another
        process changed the name meanwhile; StoreError or OSError if the bytes could not be kept.
        """
        return await self._whole(self._publish(name, upload, condition))

    async def delete(self, name: str, condition: Condition, *, force: bool = False) -> None:
        """Take a name away, durably when this returns, and with `force` end the requests that run on it.

        Raises ApiError: 404 if there is no such name, 412 as `require` does, 409 if `force` would end the
        requests of another name too, which has the same content.
        """
        await self._whole(self._delete(name, condition, force))

    async def settle(self) -> None:
        """Wait until no change is under way and everything that nobody counts on is gone."""
        await asyncio.gather(*self._changes, return_exceptions=True)
        await self._blobs.settle()

    def check(self) -> None:
        """Recount who counts on what; to be called while no change is under way."""
        versions = [*self._names.values(), *self._draining]
        counts = Counter(version.digest for version in self._names.values())
        for version in versions:
            assert version.requests >= 0
            counts[version.digest] += version.requests
        assert all(version.requests for version in self._draining)
        self._blobs.check(counts)

    async def _whole(self, change: Coroutine[Any, Any, _T]) -> _T:
        """Run a change to its end even if its caller is cancelled: half of one would need a restart to heal."""
        task = asyncio.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        return await asyncio.shield(task)

    async def _publish(self, name: str, upload: Upload, condition: Condition) -> tuple[AdapterVersion, bool]:
        async with self._lock(name):
            self.require(name, condition, ephemeral=upload.ephemeral)
            old = self._names.get(name)
            record = record_of(name, upload, None if old is None else old.record, self._base)
            digest = record.digest
            await self._blobs.keep(digest, upload.file, ephemeral=upload.ephemeral)
            try:
                if not upload.ephemeral and (old is None or old.ephemeral or old.record != record):
                    await asyncio.to_thread(self._write, record)
            except BaseException:
                self._blobs.release(digest)
                raise
            self._blobs.serve(digest, load=upload.preload)
            if old is not None and old.digest == digest:
                version = old
                version.record, version.ephemeral = record, upload.ephemeral
                version.path = self._blobs.path(digest)
            else:
                version = AdapterVersion(record, self._blobs.path(digest), upload.ephemeral)
                self._names[name] = version
            if old is not None:
                self._end(old, replaced_by=version)
            return version, old is None

    def _write(self, record: AdapterRecord) -> None:
        etag = self._etags.get(record.name)
        content = msgspec.json.encode(record)
        try:
            self._etags[record.name] = self._store.put(
                _key(record.name), content, if_match=etag, if_none_match=etag is None
            )
        except PreconditionFailed as error:
            self._note_etag(record.name)
            message = f"adapter {record.name!r} was changed by another process; send it again to replace that"
            raise ApiError(409, "adapter_changed", message, "name") from error

    def _note_etag(self, name: str) -> None:
        try:
            self._etags[name] = self._store.get(_key(name)).etag
        except NotFound:
            self._etags.pop(name, None)

    async def _delete(self, name: str, condition: Condition, force: bool) -> None:
        async with self._lock(name):
            version = self._names.get(name)
            if version is None:
                raise ApiError(404, "adapter_not_found", f"there is no adapter {name!r}", "name")
            self.require(name, condition)
            twins = [other.name for other in self.list() if other.digest == version.digest and other is not version]
            if force and twins:
                message = f"adapter {twins[0]!r} has the same content, and force would end its requests too"
                raise ApiError(409, "adapter_is_shared", message, "force")
            if not version.ephemeral:
                await asyncio.to_thread(self._store.delete, _key(name))
            del self._names[name]
            self._etags.pop(name, None)
            if force:
                self._engine.end_requests("adapter_deleted", f"adapter {name!r} was deleted", version.digest)
            self._end(version)

    def _end(self, version: AdapterVersion, replaced_by: AdapterVersion | None = None) -> None:
        """Take away what a name counted on a version; the requests on it count for themselves."""
        if version.requests and version is not replaced_by:
            self._draining.add(version)
        self._blobs.release(version.digest)

    def _load(self) -> None:
        """Fill the view from the store, and delete the blobs that an unfinished upload or delete left there."""
        unreadable = False
        for entry in self._store.list(_PREFIX):
            try:
                self._adopt(self._read(entry.key))
            except (StoreError, msgspec.DecodeError, ValueError) as error:
                _log.error("skipping %s: %s", entry.key, error)
                unreadable = True
        if not unreadable:  # what cannot be read may point at any blob
            self._blobs.collect(version.digest for version in self._names.values())

    def _read(self, key: str) -> AdapterRecord:
        stored = self._store.get(key)
        name = key.removeprefix(_PREFIX).removesuffix(_SUFFIX)
        self._etags[name] = stored.etag  # also of what is broken: a later upload may replace it
        record = msgspec.json.decode(stored.content, type=AdapterRecord)
        if _key(record.name) != key:
            raise ValueError(f"it says that its name is {record.name!r}")
        return record

    def _adopt(self, record: AdapterRecord) -> None:
        self._blobs.adopt(record.digest, self._unfit(record))
        self._names[record.name] = AdapterVersion(record, self._blobs.path(record.digest), ephemeral=False)
        if (failure := self._blobs.failure(record.digest)) is not None:
            _log.error("adapter %s cannot be served: %s", record.name, failure)

    def _unfit(self, record: AdapterRecord) -> str | None:
        """Why a stored adapter does not go with this server, though it once went with one."""
        if record.base != self._base:
            return (
                "it was uploaded to a base model of another shape; upload it again to have it checked against this one"
            )
        if record.rank > self._max_rank:
            return f"its rank {record.rank} is above this server's limit of {self._max_rank}"
        return None

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())


def _key(name: str) -> str:
    return f"{_PREFIX}{name}{_SUFFIX}"


def _shape(model: ModelConfig) -> str:
    """A digest of everything that an adapter's tensors are checked against."""
    return blake3(msgspec.json.encode(model.sites())).hexdigest()
