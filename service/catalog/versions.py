"""The current version of each name, in memory: readers never wait."""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import msgspec
from blake3 import blake3

from runtime.models.config import ModelConfig
from runtime.output.logs import Field
from service.catalog.blobs import Blobs
from service.catalog.record import AdapterRecord, AdapterVersion, Condition
from service.errors import RequestError
from service.logs import log_event

_log = logging.getLogger(__name__)


class Versions:
    """Owns the version of each name, and the versions without a name on which requests still run.

    Each name and each request holds one reference to its digest in `Blobs`.
    """

    def __init__(self, blobs: Blobs, model: ModelConfig, max_rank: int) -> None:
        self._blobs, self._max_rank = blobs, max_rank
        self.base = base_shape(model)  # the digest in the records of adapters that fit this server's base model
        self._versions: dict[str, AdapterVersion] = {}  # by name
        self._names: dict[str, set[str]] = {}  # by digest
        self._draining: set[AdapterVersion] = set()

    def resolve(self, name: str) -> AdapterVersion | None:
        """The current version of a name. Enter `using` before the next await, or the version may be deleted by then."""
        return self._versions.get(name)

    def list(self) -> list[AdapterVersion]:
        """Every named version, by name."""
        return [version for _, version in sorted(self._versions.items())]

    def names_of(self, digest: str) -> tuple[str, ...]:
        """The names that point at a digest."""
        return tuple(sorted(self._names.get(digest, ())))

    def draining(self, name: str) -> AdapterVersion | None:
        """The latest version that lost this name while requests run on it."""
        ended = [version for version in self._draining if version.name == name]
        return max(ended, key=lambda version: version.record.created_at, default=None)

    def failure(self, version: AdapterVersion) -> str | None:
        """Why this server cannot serve a version, None if it can."""
        return self._unfit(version.record)

    def require(self, name: str, condition: Condition, *, ephemeral: bool = False) -> None:
        """Raise the RequestError that a change of the name would get: `precondition_failed` or `adapter_is_durable`."""
        version = self._versions.get(name)
        if condition.if_none_match and version is not None:
            raise RequestError("precondition_failed", f"adapter {name!r} exists", "If-None-Match")
        if condition.if_match is not None:
            if version is None:
                raise RequestError("precondition_failed", f"adapter {name!r} does not exist", "If-Match")
            if not condition.if_match & {"*", version.digest}:
                raise RequestError("precondition_failed", f"adapter {name!r} is now {version.digest}", "If-Match")
        if ephemeral and version is not None and not version.ephemeral:
            message = f"adapter {name!r} is stored durably: delete it first, or upload under another name"
            raise RequestError("adapter_is_durable", message, "ephemeral")

    @contextmanager
    def using(self, version: AdapterVersion) -> Iterator[None]:
        """Keep a version, its file and its registration in the engine while one request runs.

        Raises RequestError: `adapter_failed` if the version cannot be served, `model_not_found` if it was deleted.
        """
        if (failure := self.failure(version)) is not None:
            raise RequestError("adapter_failed", f"adapter {version.name!r} cannot be served: {failure}", "model")
        if not self._blobs.referenced(version.digest):
            raise RequestError("model_not_found", f"adapter {version.name!r} was deleted", "model")
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

    def check(self, others: Mapping[str, int] = MappingProxyType({})) -> None:
        """Recount the references to all digests; `others` are those that neither names nor requests hold.

        Call it only while no change is under way.
        """
        counts = Counter(version.digest for version in self._versions.values())
        counts.update(others)
        for version in {*self._versions.values(), *self._draining}:
            assert version.requests >= 0
            if version.requests:
                counts[version.digest] += version.requests
        assert all(version.requests for version in self._draining)
        assert {(name, digest) for digest, names in self._names.items() for name in names} == {
            (name, version.digest) for name, version in self._versions.items()
        }
        self._blobs.check(counts)

    def named(self, name: str) -> AdapterVersion:
        """The current version of a name. Raises RequestError `adapter_not_found`."""
        version = self._versions.get(name)
        if version is None:
            raise no_adapter(name)
        return version

    def point(self, record: AdapterRecord, *, ephemeral: bool) -> AdapterVersion:
        """Make a name point at a record, and take over the caller's reference to its digest."""
        old = self._versions.get(record.name)
        if old is not None and old.digest == record.digest:
            old.record, old.ephemeral = record, ephemeral
            version = old
        else:
            version = self._versions[record.name] = AdapterVersion(record, ephemeral)
            self._names.setdefault(record.digest, set()).add(record.name)
        if self._unfit(record) is None:
            self._blobs.serve(record.digest)
        if old is not None:
            self._end(old, goes_on=old is version)
        if old is not None and old is not version:
            fields: dict[str, Field] = {"name": record.name, "digest": record.digest, "bytes": record.bytes}
            log_event(_log, "adapter replaced", {**fields, "was": old.digest, "requests_on_it": old.requests})
        return version

    def drop(self, name: str) -> None:
        """Make a name point at nothing."""
        self._end(self._versions.pop(name), goes_on=False)

    def _end(self, version: AdapterVersion, *, goes_on: bool) -> None:
        """Release a name's reference to a version. Requests on the version have references of their own."""
        if not goes_on:
            names = self._names[version.digest]
            names.discard(version.name)
            if not names:
                del self._names[version.digest]
        if version.requests and not goes_on:
            self._draining.add(version)
        self._blobs.release(version.digest)

    def _unfit(self, record: AdapterRecord) -> str | None:
        if record.base != self.base:
            return (
                "it was checked against a base model of another shape: serve it with that one, or upload one that was "
                "trained on this one"
            )
        if record.rank > self._max_rank:
            return f"its rank {record.rank} is above this server's limit of {self._max_rank}"
        return None


def no_adapter(name: str) -> RequestError:
    return RequestError(
        "adapter_not_found", f"there is no adapter {name!r}: GET /adapters lists those there are", "name"
    )


def base_shape(model: ModelConfig) -> str:
    """A digest of every shape that an adapter's tensors are checked against."""
    return blake3(msgspec.json.encode(model.sites())).hexdigest()
