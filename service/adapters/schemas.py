"""The adapter resource: its content, the tier it is in, and its state."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from runtime.messages import AdapterState, Stats, Tier
from service.catalog.catalog import Catalog
from service.catalog.record import AdapterVersion, OnMissing
from service.catalog.seen import Seen
from service.ingest.imports import Import
from service.keys.caller import Caller
from service.services import Services


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """The progress of a download from a store or a source, or of a load into memory."""

    stage: Literal["download", "load"]
    bytes: Annotated[int, Meta(description="done so far")]
    total_bytes: Annotated[int | None, Meta(description="null while the size is not known")]


class Adapter(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter. While its first import runs, the fields that are not known yet are null."""

    name: str
    digest: Annotated[str | None, Meta(description="BLAKE3 of the canonical file")]
    generation: Annotated[
        int | None, Meta(description="1 for the first content under the name, and one more for each other content")
    ]
    kind: Literal["lora", "alora"] | None
    rank: Annotated[int | None, Meta(description="the highest of its modules")]
    targets: Annotated[list[str], Meta(description="the adapted modules")]
    bytes: Annotated[int | None, Meta(description="of the canonical file")]
    source: Annotated[str, Meta(description='the URL of an import, or "upload"')]
    created_at: Annotated[float, Meta(description="seconds since 1970")]
    last_used_at: Annotated[float | None, Meta(description="seconds since 1970; null before the first request")]
    pinned: bool
    pin_tier: Annotated[Tier | None, Meta(description="the tier that it is pinned in")]
    ephemeral: Annotated[bool, Meta(description="kept in memory only, and gone after a restart")]
    tier: Annotated[
        Literal["device", "host", "disk", "remote"], Meta(description="the fastest tier that has all of its bytes")
    ]
    state: Annotated[
        Literal["loading", "ready", "draining", "failed"],
        Meta(description="draining: the name points elsewhere, and requests still run on this version"),
    ]
    reason: Annotated[
        str | None,
        Meta(description="why the state is failed, or why the last import over a version that still serves failed"),
    ]
    progress: Progress | None
    requests_in_flight: Annotated[int, Meta(description="running requests and held prefixes")]
    invocation_tokens: Annotated[list[int] | None, Meta(description="of an aLoRA")]
    alora_on_missing: Annotated[
        OnMissing | None,
        Meta(description="what is done for a prompt without the invocation; null: as the server's option says"),
    ]
    chat_template: Annotated[bool, Meta(description="it brings a chat template, which is used in place of the base's")]
    kv_blocks: Annotated[
        int | None,
        Meta(
            description="used and cached KV blocks of its namespace; null in answers to changes, "
            "and where the engine did not answer in time"
        ),
    ]
    warnings: list[str]


class AdapterList(msgspec.Struct, frozen=True, kw_only=True):
    adapters: list[Adapter]


def find_adapter(services: Services, name: str, caller: Caller, stats: Stats | None = None) -> Adapter | None:
    """A name's current version, else its import, else the version that still drains after it lost the name.

    None also for a name that the caller does not see.
    """
    if not caller.sees(name):
        return None
    versions, job = services.catalog.versions, services.imports.get(name)
    if (version := versions.resolve(name)) is not None:
        return adapter_resource(services, version, job, stats)
    if job is not None:
        return _imported(job)
    draining = versions.draining(name)
    return None if draining is None else adapter_resource(services, draining, stats=stats)


def list_adapters(services: Services, caller: Caller, stats: Stats | None = None) -> list[Adapter]:
    """Every named version and every import of a new name that the caller sees, sorted by name."""
    jobs = {job.name: job for job in services.imports.jobs() if caller.sees(job.name)}
    named = Seen(services.catalog, caller).list()
    found = [adapter_resource(services, version, jobs.pop(version.name, None), stats) for version in named]
    return sorted([*found, *map(_imported, jobs.values())], key=lambda adapter: adapter.name)


def adapter_resource(
    services: Services, version: AdapterVersion, job: Import | None = None, stats: Stats | None = None
) -> Adapter:
    """A version as it is now. `job` is an import under its name, `stats` a recent snapshot of the engine."""
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
        alora_on_missing=record.alora_on_missing,
        chat_template=record.chat_template is not None,
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
    """The import of a name that has no version yet."""
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
        alora_on_missing=None,
        chat_template=False,
        kv_blocks=None,
        warnings=[],
    )
