"""From the two files of a bundle to a name: checked completely, made canonical, published."""

import asyncio
from typing import NamedTuple

from starlette.requests import Request

from runtime.adapter_format.canonical import canonicalise
from service.catalog.record import Condition, Upload
from service.ingest.base_tensors import base_tensors
from service.ingest.bundle import Bundle
from service.ingest.imports import Import, Published
from service.ingest.throttle import Pace
from service.ingest.upload_body import read_bundle
from service.services import Services
from service.source_urls import Source


class Wishes(NamedTuple):
    """What is asked for a new version besides its bytes; `pin` None keeps what the name has."""

    preload: bool = True
    pin: bool | None = None
    ephemeral: bool = False


async def upload(services: Services, request: Request, name: str, wishes: Wishes, condition: Condition) -> Published:
    """Publish the bundle in a request's body. Raises RequestError, InvalidAdapter, StoreError, ClientDisconnect."""
    catalog, imports = services.catalog, services.imports
    imports.require_idle(name)
    catalog.versions.require(name, condition, ephemeral=wishes.ephemeral)  # before gigabytes are read in vain
    async with imports.uploading(), catalog.blobs.staging(wishes.ephemeral) as directory:
        pace = Pace(services.engine.busy)
        bundle = await read_bundle(request, directory, services.settings.max_upload_bytes, pace)
        checked = await asyncio.to_thread(_checked, services, bundle, "upload", wishes, pace)
        imports.require_idle(name)
        published = await catalog.publish(name, checked, condition)
    imports.published(name)
    return published


def start_import(services: Services, name: str, source: Source, wishes: Wishes, condition: Condition) -> Import:
    """Begin to publish a checked source; `Imports.result` waits for it. Raises RequestError at once."""
    catalog, imports = services.catalog, services.imports
    imports.require_idle(name)
    catalog.versions.require(name, condition, ephemeral=wishes.ephemeral)

    async def work(job: Import) -> Published:
        async with catalog.blobs.staging(wishes.ephemeral) as directory:
            pace = Pace(services.engine.busy)
            fetched = await imports.on_thread(job, services.sources.fetch, source, directory, job.progressed)
            checked = await imports.on_thread(job, _checked, services, fetched.bundle, fetched.url, wishes, pace)
            job.committing = True
            published = await catalog.publish(name, checked, condition)
            imports.published(name)
            return published

    return imports.start(Import(name, source, ephemeral=wishes.ephemeral), work)


async def remove(services: Services, name: str, condition: Condition, *, force: bool = False) -> None:
    """Delete a name, and end an import of it. Raises RequestError as `Catalog.delete` does."""
    services.catalog.versions.require(name, condition)
    imported = await services.imports.forget(name)
    if imported and services.catalog.versions.resolve(name) is None:
        return
    await services.catalog.delete(name, condition, force=force)


def _checked(services: Services, bundle: Bundle, source: str, wishes: Wishes, pace: Pace) -> Upload:
    """Check a bundle completely and write its canonical file beside it; blocks. Raises InvalidAdapter."""
    target = bundle.weights.with_name("canonical.safetensors")
    engine = services.settings.engine
    summary = canonicalise(
        bundle.weights,
        bundle.config,
        services.model,
        target,
        max_rank=engine.max_lora_rank,
        base_model_names=(services.settings.served_name, engine.model),
        base_tensor=base_tensors(engine),
        pause=pace.pause,
    )
    return Upload(summary, target, source, wishes.ephemeral, wishes.preload, wishes.pin)
