"""From the two files of a bundle to a name: checked completely, made canonical, published."""

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

from starlette.datastructures import State
from starlette.requests import Request

from runtime.adapter_format.canonical import canonicalise
from runtime.adapter_format.errors import InvalidAdapter
from service.catalog.record import Condition, Upload
from service.ingest.base_tensors import base_tensors
from service.ingest.bundle import Bundle
from service.ingest.imports import Import, Imports, Published
from service.ingest.throttle import Pace
from service.ingest.upload_body import read_bundle
from service.responses import ApiError
from service.source_urls import Source
from storage.store import StoreError, StoreFull

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Wishes(NamedTuple):
    """What is asked for a new version besides its bytes; `pin` None keeps what the name has."""

    preload: bool = True
    pin: bool | None = None
    ephemeral: bool = False


async def upload(request: Request, name: str, wishes: Wishes, condition: Condition) -> Published:
    """Publish the bundle in a request's body. Raises ApiError, ClientDisconnect."""
    state = request.app.state
    imports: Imports = state.imports
    imports.require_idle(name)
    state.catalog.require(name, condition, ephemeral=wishes.ephemeral)  # before gigabytes are read in vain
    async with imports.uploading(), translated_errors(), state.catalog.staging(wishes.ephemeral) as directory:
        pace = Pace(state.engine.busy)
        bundle = await read_bundle(request, directory, state.settings.max_upload_bytes, pace)
        checked = await asyncio.to_thread(_checked, state, bundle, "upload", wishes, pace)
        imports.require_idle(name)
        published: Published = await state.catalog.publish(name, checked, condition)
    imports.published(name)
    return published


def start_import(state: State, name: str, source: Source, wishes: Wishes, condition: Condition) -> Import:
    """Begin to publish a checked source; `Imports.result` waits for it. Raises ApiError 409, 412 and 503 at once."""
    imports: Imports = state.imports
    imports.require_idle(name)
    state.catalog.require(name, condition, ephemeral=wishes.ephemeral)

    async def work(job: Import) -> Published:
        async with translated_errors(), state.catalog.staging(wishes.ephemeral) as directory:
            pace = Pace(state.engine.busy)
            fetched = await imports.on_thread(job, state.sources.fetch, source, directory, job.progressed)
            checked = await imports.on_thread(job, _checked, state, fetched.bundle, fetched.url, wishes, pace)
            job.committing = True
            published: Published = await state.catalog.publish(name, checked, condition)
            imports.published(name)
            return published

    return imports.start(Import(name, source, ephemeral=wishes.ephemeral), work)


async def remove(state: State, name: str, condition: Condition, *, force: bool = False) -> None:
    """Take a name away, and end an import of it. Raises ApiError as `Catalog.delete` does."""
    state.catalog.require(name, condition)
    imported = await state.imports.forget(name)
    if imported and state.catalog.resolve(name) is None:
        return
    async with translated_errors():
        await state.catalog.delete(name, condition, force=force)


def _checked(state: State, bundle: Bundle, source: str, wishes: Wishes, pace: Pace) -> Upload:
    """Check a bundle completely and write its canonical file beside it; blocks."""
    target = bundle.weights.with_name("canonical.safetensors")
    engine = state.settings.engine
    summary = canonicalise(
        bundle.weights,
        bundle.config,
        state.model_config,
        target,
        max_rank=engine.max_lora_rank,
        base_model_names=(state.settings.served_name, engine.model),
        base_tensor=base_tensors(engine),
        pause=pace.pause,
    )
    return Upload(summary, target, source, wishes.ephemeral, wishes.preload, wishes.pin)


@asynccontextmanager
async def translated_errors() -> AsyncIterator[None]:
    """What goes wrong with a change of the catalog, as an ApiError."""
    try:
        yield
    except InvalidAdapter as error:
        raise ApiError(422, "invalid_adapter", str(error), error.field) from error
    except StoreFull as error:
        raise ApiError(507, "storage_full", "there is no room left to keep adapters") from error
    except StoreError as error:
        raise ApiError(503, "storage_unavailable", "the adapter store does not work") from error
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise ApiError(507, "storage_full", "there is no room left to keep adapters") from error
        raise
