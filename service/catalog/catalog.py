"""Names of adapters: which version each points at, in memory and durably in the store."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from runtime.messages import Tier
from runtime.models.config import ModelConfig
from service.catalog.blobs import Blobs
from service.catalog.engine_log import log_change
from service.catalog.files import AdapterStorage
from service.catalog.garbage import Collected, collect
from service.catalog.lookups import Lookups
from service.catalog.mixes import Mixes
from service.catalog.names import AdapterNames, UnreadableName
from service.catalog.pins import Pins
from service.catalog.quotas import Quotas
from service.catalog.record import AdapterRecord, AdapterVersion, Condition, Upload, pinned_record, record_of
from service.catalog.versions import Versions, no_adapter
from service.engine.client import EngineClient
from service.errors import EngineError, RequestError
from service.keys.caller import ANYONE, Caller
from service.logs import log_event
from service.metrics import Metrics
from storage.cache import DiskCache
from storage.store import PreconditionFailed, StoreError

_log = logging.getLogger(__name__)
_ATTEMPTS = 5  # to write a name that other processes change at the same time
_CLOSE_SECONDS = 5.0  # for changes under way, whose store may not answer
_COLLECT_SECONDS = 60.0  # least time from one collection to the next
_LOOKUP_SECONDS = 2.0  # that a request waits for the store to be asked about a name
_T = TypeVar("_T")


class Catalog:
    """Owns the names: a name is written only once the bytes that it points at are durable.

    The versions in memory follow the names that other processes write to the store. All calls belong to one event loop.
    """

    def __init__(
        self, storage: AdapterStorage, engine: EngineClient, metrics: Metrics, model: ModelConfig, max_rank: int
    ) -> None:
        self.blobs = Blobs(storage, engine.adapters, metrics)
        self.versions = Versions(self.blobs, model, max_rank)
        self.mixes = Mixes(self.blobs, self.versions, max_rank)
        self.quotas = Quotas(self.versions)
        self._storage, self._engine = storage, engine
        self._names = AdapterNames(storage.store)
        self._pins = Pins(storage, engine.adapters)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._changes: set[asyncio.Task[Any]] = set()
        self._lookups = Lookups()
        self._next_lookups: dict[str, asyncio.Task[bool]] = {}  # by name: those that have not begun to read
        self._chores: list[asyncio.Task[None]] = []

    @classmethod
    async def open(
        cls,
        storage: AdapterStorage,
        engine: EngineClient,
        metrics: Metrics,
        model: ModelConfig,
        *,
        max_rank: int,
        refresh_seconds: float,
        collect_after_seconds: float,
    ) -> "Catalog":
        """Load the catalog of a store; it owns and closes the storage. Raises StoreError.

        It reads changed names every `refresh_seconds`, and deletes files that are unreferenced for longer than
        `collect_after_seconds`.
        """
        catalog = cls(storage, engine, metrics, model, max_rank)
        try:
            await catalog.refresh()
        except BaseException:
            await catalog.close()
            raise
        catalog._chores = [
            asyncio.create_task(catalog._follow_engine()),
            asyncio.create_task(catalog._refresh_forever(refresh_seconds)),
            asyncio.create_task(catalog._collect_forever(collect_after_seconds)),
        ]
        return catalog

    @property
    def disk(self) -> DiskCache | None:
        """The disk cache of a remote store, None for a local one."""
        return self._storage.disk

    async def close(self) -> None:
        """Drop ephemeral adapters; stored names and files stay."""
        for chore in self._chores:
            chore.cancel()
        await asyncio.gather(*self._chores, return_exceptions=True)
        if self._changes:
            await asyncio.wait(self._changes, timeout=_CLOSE_SECONDS)
        await self._pins.close()
        await self.mixes.close()
        await asyncio.to_thread(self._storage.close)
        await self.blobs.close()

    async def until_idle(self) -> None:
        """Wait until no change is under way and every digest without references is discarded."""
        await asyncio.gather(*self._changes, return_exceptions=True)
        await self._pins.until_idle()
        await self.blobs.until_idle()

    async def load(self, name: str, tier: Tier, *, wait: bool) -> AdapterVersion:
        """Start to load a name's version into a tier; with `wait`, return when it is there.

        Raises RequestError: 404 if there is no such name, 503 with the reason if the load fails.
        """
        version = self.versions.named(name)
        with self.versions.using(version):
            if not wait:
                self._engine.adapters.prefetch(version.digest, tier)
                return version
            try:
                await self._engine.adapters.load(version.digest, tier)
            except EngineError as error:
                raise EngineError(error.code, error.message, "name") from error
        return version

    async def unload(self, name: str, tier: Tier) -> AdapterVersion:
        """Free the memory of a name's version in a tier and above it. Raises RequestError if it is in use or pinned."""
        version = self.versions.named(name)
        try:
            await self._engine.adapters.unload(version.digest, tier)
        except EngineError as error:
            raise EngineError(error.code, error.message, "name") from error
        return version

    async def publish(
        self, name: str, upload: Upload, condition: Condition, caller: Caller = ANYONE
    ) -> tuple[AdapterVersion, bool]:
        """Make a name point at an upload, and return its version and whether the name is new; durable on return.

        The generation rises only with another digest. Raises RequestError: as `Versions.require` does, `pins_full`, a
        quota, or `adapter_changed` if other processes keep changing the name; StoreError or OSError if the store fails.
        """
        return await self._whole(self._publish(name, upload, condition, caller))

    async def set_pin(
        self, name: str, tier: Tier | None, condition: Condition, caller: Caller = ANYONE
    ) -> AdapterVersion:
        """Pin a name's adapter in a tier, or unpin it (None); durable on return. Raises RequestError."""
        return await self._whole(self._set_pin(name, tier, condition, caller))

    async def delete(self, name: str, condition: Condition, *, force: bool = False, caller: Caller = ANYONE) -> None:
        """Delete a name; durable on return. `force` ends the requests that run on it.

        Raises RequestError: `adapter_not_found`, `precondition_failed`, or `adapter_is_shared` if `force` would end the
        requests of another name with the same content.
        """
        await self._whole(self._delete(name, condition, force, caller))

    async def refresh(self) -> None:
        """Read the names that other processes have written. Raises StoreError after all readable ones are read."""
        names = await self._storage.run(self._names.changed)
        outcomes = await asyncio.gather(*map(self._follow_locked, names), return_exceptions=True)
        for outcome in outcomes:
            if outcome is not None:
                raise outcome

    async def look_up(self, name: str) -> bool:
        """Read one name from the store now, for a request that names what this server does not know.

        False if the store was not asked, or has not answered in time: only so many names are read in a second. Requests
        that come for a name before its read begins share the read. Raises StoreError.
        """
        task = self._next_lookups.get(name)
        if task is None:
            task = self._next_lookups[name] = asyncio.create_task(self._look_up(name))
            self._changes.add(task)
            task.add_done_callback(self._changes.discard)
        try:
            async with asyncio.timeout(_LOOKUP_SECONDS):
                return await asyncio.shield(task)  # it reads to its end: calls for one name must not overlap
        except TimeoutError:
            return False

    async def collect(self, older_than_seconds: float) -> Collected:
        """Delete old stored files that no name points at and that have no references here. Raises StoreError."""
        return await self._storage.run(
            collect, self._storage.store, older_than_seconds, keep=frozenset(self.blobs.digests)
        )

    async def _whole(self, change: Coroutine[Any, Any, _T]) -> _T:
        """Run a change to its end even if its caller is cancelled: only a restart would repair a half-made change."""
        task = asyncio.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        return await asyncio.shield(task)

    async def _publish(
        self, name: str, upload: Upload, condition: Condition, caller: Caller
    ) -> tuple[AdapterVersion, bool]:
        summary = upload.summary

        def uploaded(old: AdapterRecord | None) -> AdapterRecord:
            return record_of(name, upload, old, self.versions.base, caller.id)

        async with self._changing(name):
            self.versions.require(name, condition, ephemeral=upload.ephemeral)
            old = self.versions.resolve(name)
            self.quotas.admit(uploaded(None if old is None else old.record), caller)  # before the file is stored
            await self.blobs.keep(summary.digest, summary.bytes, upload.file, ephemeral=upload.ephemeral)
            try:
                self.blobs.serve(summary.digest)
                record, new = await self._commit(name, condition, uploaded, upload.ephemeral, caller)
                if not upload.ephemeral:
                    await self.blobs.confirm(summary.digest, upload.file)
            except BaseException:
                self.blobs.release(summary.digest)
                raise
            version = self.versions.point(record, ephemeral=upload.ephemeral)
            self.mixes.sweep()
            if upload.preload:
                self._engine.adapters.prefetch(summary.digest)
            return version, new

    async def _set_pin(self, name: str, tier: Tier | None, condition: Condition, caller: Caller) -> AdapterVersion:
        def pinned(old: AdapterRecord | None) -> AdapterRecord:
            if old is None:
                raise no_adapter(name)
            return pinned_record(old, tier, caller.id)

        async with self._changing(name):
            ephemeral = self.versions.named(name).ephemeral
            record, _ = await self._commit(name, condition, pinned, ephemeral, caller)
            self.blobs.acquire(record.digest)
            return self.versions.point(record, ephemeral=ephemeral)

    @asynccontextmanager
    async def _changing(self, name: str) -> AsyncIterator[None]:
        """Hold a name's lock; what the change admits to quotas counts until it is made, or not."""
        async with self._lock(name):
            try:
                yield
            finally:
                self.quotas.settle(name)

    async def _commit(
        self,
        name: str,
        condition: Condition,
        change: Callable[[AdapterRecord | None], AdapterRecord],
        ephemeral: bool,
        caller: Caller,
    ) -> tuple[AdapterRecord, bool]:
        """Change a name's record: pin it, then write it. Returns the record and whether the name is new.

        If another process has written the name, this reads it, checks all conditions again, and repeats the change.
        """
        for _ in range(_ATTEMPTS):
            self.versions.require(name, condition, ephemeral=ephemeral)
            old = self.versions.resolve(name)
            record = change(None if old is None else old.record)
            self.quotas.admit(record, caller)
            await self._pins.pin(name, record.digest, record.pin, record.bytes)
            try:
                if not ephemeral and (old is None or old.ephemeral or old.record != record):
                    await self._storage.run(self._names.write, record)
                return record, old is None
            except PreconditionFailed:
                await self._restore_pin(name, old)
                await self._follow(name)
            except BaseException:
                await self._restore_pin(name, old)
                raise
        raise _contended(name)

    async def _restore_pin(self, name: str, version: AdapterVersion | None) -> None:
        if version is None:
            await self._pins.pin(name, "", None, 0)
        else:
            await self._pins.pin(name, version.digest, version.record.pin, version.record.bytes)

    async def _delete(self, name: str, condition: Condition, force: bool, caller: Caller) -> None:
        async with self._lock(name):
            for _ in range(_ATTEMPTS):
                version = self.versions.named(name)
                self.versions.require(name, condition)
                twins = [
                    other.name
                    for other in self.versions.list()
                    if other.digest == version.digest and other is not version
                ]
                if force and twins:
                    shown = next((f"adapter {twin!r}" for twin in twins if caller.sees(twin)), "another adapter")
                    message = f"{shown} has the same content, and force would end its requests too"
                    raise RequestError("adapter_is_shared", message, "force")
                try:
                    if not version.ephemeral:
                        await self._storage.run(self._names.bury, name)
                    break
                except PreconditionFailed:
                    await self._follow(name)
            else:
                raise _contended(name)
            await self._pins.pin(name, version.digest, None, 0)
            if force:
                for digest in (version.digest, *self.blobs.mixes_of(version.digest)):
                    self._engine.end_requests("adapter_deleted", f"adapter {name!r} was deleted", digest)
            self.versions.drop(name)
            self.mixes.sweep()

    async def _look_up(self, name: str) -> bool:
        async with self._lock(name):
            del self._next_lookups[name]
            if not self._lookups.begin():
                return False
            try:
                record = await self._read(name)
                if record is not None or self._names.buried(name):  # else `changed` says whether a name is gone
                    self._point(name, record)
            except UnreadableName as error:
                _log.error("skipping %s", error)
            finally:
                self._lookups.end()
        return True

    async def _read(self, name: str) -> AdapterRecord | None:
        return await self._storage.run(self._names.read, name)

    async def _follow_locked(self, name: str) -> None:
        async with self._lock(name):
            await self._follow(name)

    async def _follow(self, name: str) -> None:
        """Make a name point at what the store says. The caller has the name's lock."""
        try:
            record = await self._read(name)
        except UnreadableName as error:
            _log.error("skipping %s", error)
        except StoreError:
            self._names.again(name)
            raise
        else:
            self._point(name, record)

    def _point(self, name: str, record: AdapterRecord | None) -> None:
        """Make a name point at a record that was read just now."""
        old = self.versions.resolve(name)
        if record is None:
            if old is not None and not old.ephemeral:
                self._pins.pin_later(name, old.digest, None, 0)
                self.versions.drop(name)
                log_event(_log, "adapter delete", {"name": name, "digest": old.digest, "who": "another server"})
                self.mixes.sweep()
        elif old is None or old.ephemeral or old.record != record:
            self.blobs.adopt(record.digest, record.bytes)
            version = self.versions.point(record, ephemeral=False)
            self.mixes.sweep()
            failure = self.versions.failure(version)
            if failure is not None:
                _log.error("adapter %s cannot be served: %s", name, failure)
            self._pins.pin_later(name, record.digest, None if failure else record.pin, record.bytes)

    async def _follow_engine(self) -> None:
        """Do what the engine's words about adapters ask for, and log them; never returns."""
        changes = self._engine.adapters.changes
        while True:
            change = await changes.get()
            size = self.blobs.on_state(change.now)
            log_change(change, self.versions.names_of(change.now.digest), size)
            changes.task_done()

    async def _refresh_forever(self, seconds: float) -> None:
        """Follow the store. While it cannot be reached, the versions in memory stay."""
        reachable = True
        while True:
            await asyncio.sleep(seconds)
            try:
                await self.refresh()
            except StoreError as error:
                if reachable:
                    _log.error("cannot read the names that other processes change: %s", error)
                reachable = False
            else:
                reachable = True

    async def _collect_forever(self, seconds: float) -> None:
        while True:
            try:
                await self.collect(seconds)
            except StoreError as error:
                _log.warning("cannot delete unreferenced files in the store: %s", error)
            await asyncio.sleep(max(seconds, _COLLECT_SECONDS))

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())


def _contended(name: str) -> RequestError:
    return RequestError("adapter_changed", f"other processes keep changing adapter {name!r}; send it again", "name")
