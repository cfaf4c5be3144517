"""What every name means now, in memory: readers never wait."""

import asyncio
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import msgspec
from blake3 import blake3

from runtime.models.config import ModelConfig
from service.catalog.blobs import Blobs, Download, Engine
from service.catalog.files import AdapterStorage
from service.catalog.record import AdapterRecord, AdapterVersion, Condition
from service.responses import ApiError
from storage.cache import DiskCache


class AdapterView:
    """The version of each name, and the versions that lost theirs while requests run on them.

    Each of them, and each request, counts one on its digest in `Blobs`.
    """

    def __init__(self, storage: AdapterStorage, engine: Engine, model: ModelConfig, max_rank: int) -> None:
        self._storage = storage
        self._blobs = Blobs(storage, engine)
        self._base, self._max_rank = _shape(model), max_rank
        self._versions: dict[str, AdapterVersion] = {}
        self._draining: set[AdapterVersion] = set()

    def resolve(self, name: str) -> AdapterVersion | None:
        """The version that a name means now; enter `using` before the next await, or it may be gone."""
        return self._versions.get(name)

    def list(self) -> list[AdapterVersion]:
        """Every named version, by name."""
        return [version for _, version in sorted(self._versions.items())]

    def draining(self, name: str) -> AdapterVersion | None:
        """The latest version that lost this name while requests run on it."""
        ended = [version for version in self._draining if version.name == name]
        return max(ended, key=lambda version: version.record.created_at, default=None)

    def failure(self, version: AdapterVersion) -> str | None:
        """Why a version does not go with this server, though it once went with one; None if it does."""
        return self._unfit(version.record)

    def on_disk(self, version: AdapterVersion) -> bool:
        """Whether its file is on this machine."""
        return self._blobs.here(version.digest)

    def download(self, version: AdapterVersion) -> Download | None:
        """How far its file's way from a remote store is, None when it is on none."""
        return self._blobs.download(version.digest)

    def counted(self, digest: str) -> bool:
        """Whether a name or a request stands on a digest."""
        return self._blobs.counted(digest)

    @property
    def disk(self) -> DiskCache | None:
        """The cache before a remote store."""
        return self._storage.disk

    @property
    def memory(self) -> Path:
        """The directory of ephemeral uploads."""
        return self._blobs.memory

    @property
    def on_download(self) -> Callable[[float], None] | None:
        """Called with the seconds that each fetch of a file took."""
        return self._blobs.on_download

    @on_download.setter
    def on_download(self, callback: Callable[[float], None] | None) -> None:
        self._blobs.on_download = callback

    def require(self, name: str, condition: Condition, *, ephemeral: bool = False) -> None:
        """Raise the ApiError that a change of the name would meet now: 412, or 409 for a durable name."""
        version = self._versions.get(name)
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

    @asynccontextmanager
    async def staging(self, ephemeral: bool) -> AsyncIterator[Path]:
        """A private directory for an upload, where its bytes will stay; what is left in it goes with it."""
        parent = self._blobs.memory if ephemeral else self._storage.files.scratch
        directory = Path(tempfile.mkdtemp(dir=parent))  # at once: a cancelled thread would leave one behind
        try:
            yield directory
        finally:
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True))

    def check(self) -> None:
        """Recount who counts on what; to be called while no change is under way."""
        counts = Counter(version.digest for version in self._versions.values())
        for version in {*self._versions.values(), *self._draining}:
            assert version.requests >= 0
            if version.requests:
                counts[version.digest] += version.requests
        assert all(version.requests for version in self._draining)
        self._blobs.check(counts)

    # ------------------------------------------------------------------ for the catalog

    def _require_version(self, name: str) -> AdapterVersion:
        version = self._versions.get(name)
        if version is None:
            raise no_adapter(name)
        return version

    def _point(self, record: AdapterRecord, *, ephemeral: bool) -> AdapterVersion:
        """Make a name mean a record, whose bytes the caller has counted one on; takes that over from what it meant."""
        old = self._versions.get(record.name)
        if old is not None and old.digest == record.digest:
            old.record, old.ephemeral = record, ephemeral
            version = old
        else:
            version = self._versions[record.name] = AdapterVersion(record, ephemeral)
        if self._unfit(record) is None:
            self._blobs.serve(record.digest)
        if old is not None:
            self._end(old, goes_on=old is version)
        return version

    def _drop(self, name: str) -> None:
        """Make a name mean nothing."""
        self._end(self._versions.pop(name), goes_on=False)

    def _end(self, version: AdapterVersion, *, goes_on: bool) -> None:
        """Take away what a name counted on a version; the requests on it count for themselves."""
        if version.requests and not goes_on:
            self._draining.add(version)
        self._blobs.release(version.digest)

    def _unfit(self, record: AdapterRecord) -> str | None:
        if record.base != self._base:
            return (
                "it was uploaded to a base model of another shape; upload it again to have it checked against this one"
            )
        if record.rank > self._max_rank:
            return f"its rank {record.rank} is above this server's limit of {self._max_rank}"
        return None


def no_adapter(name: str) -> ApiError:
    return ApiError(404, "adapter_not_found", f"there is no adapter {name!r}", "name")


def _shape(model: ModelConfig) -> str:
    """A digest of everything that an adapter's tensors are checked against."""
    return blake3(msgspec.json.encode(model.sites())).hexdigest()
