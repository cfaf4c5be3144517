"""An adapter as clients see it: what it is, where it is, and how far it has come."""

from typing import Literal

import msgspec

from runtime.messages import AdapterState, Stats, Tier
from service.catalog.catalog import Catalog
from service.catalog.record import AdapterVersion
from service.ingest.imports import Import
from service.services import Services


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a fetch from a remote store or source has come, or a load into memory; the size may not be known yet."""

    stage: Literal["download", "load"]
    bytes: int
    total_bytes: int | None


class Adapter(msgspec.Struct, frozen=True, kw_only=True):
    """What GET /adapters/{name} shows. Times are seconds since 1970.

    What a first import has yet to find out is null. `tier` is the highest that has it whole. `reason` says why the
    state is `failed`, or why the last import over a version that still serves has failed. `invocation_tokens` are an
    aLoRA's. `kv_blocks` are those of its namespace, in use and cached: null where the engine was not asked (in answers
    to changes) or did not say in time. `requests_in_flight` counts held prefixes too.
    """

    name: str
    digest: str | None
    generation: int | None
    kind: Literal["lora", "alora"] | None
    rank: int | None
    targets: list[str]
    bytes: int | None
    source: str
    created_at: float
    last_used_at: float | None
    pinned: bool
    pin_tier: Tier | None
    ephemeral: bool
    tier: Literal["device", "host", "disk", "remote"]
    state: Literal["loading", "ready", "draining", "failed"]
    reason: str | None
    progress: Progress | None
    requests_in_flight: int
    invocation_tokens: list[int] | None
    kv_blocks: int | None
    warnings: list[str]


class AdapterList(msgspec.Struct, frozen=True, kw_only=True):
    adapters: list[Adapter]


def find_adapter(services: Services, name: str, stats: Stats | None = None) -> Adapter | None:
    """A name's version, or the import that is to give it one, or the version that drains after it lost the name."""
    versions, job = services.catalog.versions, services.imports.get(name)
    if (version := versions.resolve(name)) is not None:
        return adapter_resource(services, version, job, stats)
    if job is not None:
        return _imported(job)
    draining = versions.draining(name)
    return None if draining is None else adapter_resource(services, draining, stats=stats)


def list_adapters(services: Services, stats: Stats | None = None) -> list[Adapter]:
    """Every named version and every import of a new name, by name."""
    jobs = {job.name: job for job in services.imports.jobs()}
    named = services.catalog.versions.list()
    found = [adapter_resource(services, version, jobs.pop(version.name, None), stats) for version in named]
    return sorted([*found, *map(_imported, jobs.values())], key=lambda adapter: adapter.name)


def adapter_resource(
    services: Services, version: AdapterVersion, job: Import | None = None, stats: Stats | None = None
) -> Adapter:
    """A version as it is now, with the import under way over it; `stats` are a recent snapshot of the engine."""
    catalog, engine = services.catalog, services.engine.adapters.states.get(version.digest)
    record, failure = version.record, catalog.versions.failure(version)
    if failure is None and engine is not None and engine.state == "failed":
        failure = engine.reason
    progress = _progress(catalog, version, engine)
    phase: Literal["loading", "ready", "draining", "failed"] = "ready"
    if catalog.versions.resolve(version.name) is not version:
        phase = "draining"
    elif failure is not None:
        phase = "failed"
    elif progress is not None:
        phase = "loading"
    if job is not None and job.error is None:
        progress = Progress(stage="download", bytes=job.bytes, total_bytes=job.total_bytes)
    elif job is not None and job.error is not None and failure is None:
        failure = f"the import of {job.source.url} failed: {job.error.message}"
    return Adapter(
        name=record.name,
        digest=record.digest,
        generation=record.generation,
        kind=record.kind,
        rank=record.rank,
        targets=record.targets,
        bytes=record.bytes,
        source=record.source,
        created_at=record.created_at,
        last_used_at=version.last_used_at,
        pinned=record.pinned,
        pin_tier=record.pin_tier if record.pinned else None,
        ephemeral=version.ephemeral,
        tier=_tier(catalog, version, engine),
        state=phase,
        reason=failure,
        progress=progress,
        requests_in_flight=version.requests,
        invocation_tokens=record.invocation_tokens,
        kv_blocks=None if stats is None else _kv_blocks(stats, record.digest),
        warnings=record.warnings,
    )


def _tier(
    catalog: Catalog, version: AdapterVersion, engine: AdapterState | None
) -> Literal["device", "host", "disk", "remote"]:
    if engine is not None and engine.tier is not None:
        return engine.tier
    if version.ephemeral:
        return "host"  # its file is in memory
    return "disk" if catalog.blobs.here(version.digest) else "remote"


def _kv_blocks(stats: Stats, digest: str) -> int:
    namespace = stats.namespaces.get(digest)
    return 0 if namespace is None else namespace.blocks_used + namespace.blocks_cached


def _progress(catalog: Catalog, version: AdapterVersion, engine: AdapterState | None) -> Progress | None:
    if (download := catalog.blobs.download(version.digest)) is not None:
        return Progress(stage="download", bytes=download.bytes_done, total_bytes=download.bytes_total)
    if engine is None or engine.state not in ("missing", "loading"):
        return None
    stage: Literal["download", "load"] = "download" if engine.state == "missing" else "load"
    return Progress(stage=stage, bytes=0, total_bytes=version.record.bytes)


def _imported(job: Import) -> Adapter:
    """An import of a name that means nothing yet."""
    failed = job.error is not None
    progress = None if failed else Progress(stage="download", bytes=job.bytes, total_bytes=job.total_bytes)
    return Adapter(
        name=job.name,
        digest=None,
        generation=None,
        kind=None,
        rank=None,
        targets=[],
        bytes=None,
        source=job.source.url,
        created_at=job.created_at,
        last_used_at=None,
        pinned=False,
        pin_tier=None,
        ephemeral=job.ephemeral,
        tier="remote",
        state="failed" if failed else "loading",
        reason=None if job.error is None else job.error.message,
        progress=progress,
        requests_in_flight=0,
        invocation_tokens=None,
        kv_blocks=None,
        warnings=[],
    )
