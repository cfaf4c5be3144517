"""From the files of a bundle to a name: check them completely, write the canonical file, publish it."""

from typing import NamedTuple

from starlette.requests import Request

from runtime.adapter_format.base_tensors import base_tensors
from runtime.adapter_format.canonical import canonicalise
from runtime.adapter_format.errors import InvalidAdapter
from service.access import who
from service.adapters.events import adapter_event
from service.catalog.record import Condition, OnMissing, Upload
from service.catalog.seen import Seen, least_generation
from service.errors import RequestError
from service.ingest.body_reader import BodyReader
from service.ingest.bundle import WITHOUT_TEMPLATE, Bundle
from service.ingest.imports import Import, Published
from service.ingest.throttle import Throttle
from service.ingest.upload_body import read_bundle
from service.keys.caller import caller_of
from service.services import Services, services_of
from service.source_urls import Source
from service.text.rendering import InvalidTemplate, names_in


class UploadOptions(NamedTuple):
    """How a new version is published."""

    preload: bool = True  # load it to the device at once
    pin: bool | None = None  # pin it to the device; None keeps the pin of the name
    ephemeral: bool = False  # keep it in memory only
    alora_on_missing: OnMissing | None = None  # for requests that do not say; None keeps that of the name


async def upload(
    services: Services, request: Request, name: str, options: UploadOptions, condition: Condition
) -> Published:
    """Publish the bundle in a request's body. Raises RequestError, InvalidAdapter, StoreError, ClientDisconnect."""
    with adapter_event("upload", name, who(request)) as event:
        published = await _upload(services, request, name, options, condition)
        event.note(published[0])
    return published


async def _upload(
    services: Services, request: Request, name: str, options: UploadOptions, condition: Condition
) -> Published:
    catalog, imports, caller = services.catalog, services.imports, caller_of(request)
    imports.require_idle(name)
    await Seen(catalog, caller).reconsider(name, condition)
    catalog.versions.require(name, condition, ephemeral=options.ephemeral)  # before gigabytes are read in vain
    catalog.quotas.require_room(name, caller)
    async with imports.uploading(_client(request)), catalog.blobs.staging(options.ephemeral) as directory:
        throttle = Throttle(services.engine.busy)
        body = BodyReader(request, services.settings.max_upload_bytes, throttle)
        bundle = await imports.on_thread(body.close, read_bundle, body, directory)
        checked = await imports.on_thread(body.close, _checked, services, bundle, "upload", options, throttle)
        imports.require_idle(name)
        published = await catalog.publish(name, checked, condition, caller)
    imports.published(name)
    return published


async def start_import(
    request: Request, name: str, source: Source, options: UploadOptions, condition: Condition
) -> Import:
    """Begin to publish a checked source; `Imports.result` waits for it. Raises RequestError if it cannot begin."""
    services, caller, by = services_of(request), caller_of(request), who(request)
    catalog, imports = services.catalog, services.imports
    await Seen(catalog, caller).reconsider(name, condition)
    imports.require_idle(name)
    catalog.versions.require(name, condition, ephemeral=options.ephemeral)
    catalog.quotas.require_room(name, caller)

    async def work(job: Import) -> Published:
        with adapter_event("import", name, by) as event:
            event.note(source=source.url)
            published = await fetch(job)
            event.note(published[0])
        return published

    async def fetch(job: Import) -> Published:
        async with catalog.blobs.staging(options.ephemeral) as directory:
            throttle = Throttle(services.engine.busy)
            fetched = await imports.on_thread(job.cancel, services.sources.fetch, source, directory, job.progressed)
            checked = await imports.on_thread(
                job.cancel, _checked, services, fetched.bundle, fetched.url, options, throttle
            )
            job.committing = True
            published = await catalog.publish(name, checked, condition, caller)
            imports.published(name)
            return published

    return imports.start(Import(name, source, _client(request), ephemeral=options.ephemeral), work)


def _client(request: Request) -> str:
    """Whose places an upload or an import takes: the key's, else the address's."""
    return caller_of(request).id or ("" if request.client is None else request.client.host)


async def remove(request: Request, name: str, condition: Condition, *, force: bool = False) -> None:
    """Delete a name, and cancel an import of it. Raises RequestError as `Catalog.delete` does."""
    services, caller, least = services_of(request), caller_of(request), least_generation(request.headers)
    versions = services.catalog.versions
    with adapter_event("delete", name, who(request)) as event:
        seen = Seen(services.catalog, caller)
        seen.require(name)
        if services.imports.get(name) is None:
            await seen.know(name, least)
        await seen.reconsider(name, condition)
        versions.require(name, condition)
        was_imported = await services.imports.forget(name)
        if (version := versions.resolve(name)) is None and was_imported:
            return  # the import was all that the name had
        event.note(version)
        await services.catalog.delete(name, condition, force=force, caller=caller)


def _checked(services: Services, bundle: Bundle, source: str, options: UploadOptions, throttle: Throttle) -> Upload:
    """Check a bundle completely and write its canonical file beside it. Blocks. Raises InvalidAdapter."""
    if bundle.template is not None:
        try:
            names_in(bundle.template.text)
        except InvalidTemplate as error:
            what = f"the chat template does not parse: {error}"
            raise InvalidAdapter(bundle.template.file, what, WITHOUT_TEMPLATE) from None
    target = bundle.weights.with_name("canonical.safetensors")
    engine = services.settings.engine
    summary = canonicalise(
        bundle.weights,
        bundle.config,
        services.model,
        target,
        max_rank=engine.max_lora_rank,
        base_model_names=(services.settings.served_name, engine.model),
        strict=services.settings.strict_base,
        base_tensor=base_tensors(engine),
        pause=throttle.pause,
    )
    if options.alora_on_missing is not None and summary.invocation_tokens is None:
        message = "alora_on_missing says what to do without an aLoRA's invocation, and this adapter is a plain LoRA"
        raise RequestError("alora_not_applicable", message, "alora_on_missing")
    preload, pin, ephemeral, on_missing = options
    template = None if bundle.template is None else bundle.template.text
    return Upload(summary, target, source, ephemeral, preload, pin, on_missing, template)
