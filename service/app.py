"""The wiring: routes, errors, and the parts that live as long as the service does."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from runtime.adapter_format.errors import InvalidAdapter
from runtime.messages import KvChanges
from runtime.models.config import ModelConfig
from service.access import AccessLog, RequestId
from service.adapters import dialects
from service.adapters import routes as adapters
from service.catalog.catalog import Catalog
from service.catalog.files import AdapterStorage, open_storage
from service.dialects.sagemaker import invocations
from service.dialects.tokens import generate
from service.door.bodies import Bodies
from service.door.gate import AtGate, Gate
from service.engine.client import EngineClient
from service.errors import RequestError
from service.grammars.grammars import Grammars
from service.grammars.structural_tags import Markers
from service.health import config, health, metrics, openapi, ready, version
from service.http import on_client_disconnect, on_error, on_http_exception, on_unhandled
from service.ingest.imports import Imports
from service.ingest.sources import Sources
from service.keys.keys import Keys
from service.keys.require import RequireKey
from service.keys.scopes import OPEN_ROUTES, guarded
from service.kv import control
from service.kv import routes as kv
from service.kv.events import EventsUnavailable, KvEvents
from service.kv.prefixes import Prefixes
from service.metrics import Metrics
from service.openai.chat import chat_completions
from service.openai.completions import completions
from service.openai.models import get_model, list_models
from service.openai.prompts import PromptEncoder
from service.openai.tokenize import detokenize, tokenize, tokenizer_info
from service.page import routes as page
from service.responses import routes as responses
from service.responses.store import ResponseStore
from service.routing.heads import PrefixHeads
from service.routing.routes import routing
from service.services import Services
from service.settings import Settings, child_environment
from service.text.chat_templates import ChatTemplates
from service.text.tokenizer import Tokenizer
from service.traces.tracing import TraceRequests, Traces, otlp_exporter
from storage.store import StoreError

routes = [
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    *responses.routes,
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
    Route("/tokenizer_info", tokenizer_info),
    Route("/v1/models", list_models),
    Route("/v1/models/{model:path}", get_model),
    *adapters.routes,
    *dialects.routes,
    *kv.routes,
    *control.routes,
    *page.routes,
    Route("/invocations", invocations, methods=["POST"]),
    Route("/inference/v1/generate", generate, methods=["POST"]),
    Route("/health", health),
    Route("/health/ready", ready),
    Route("/ping", ready),
    Route("/version", version),
    Route("/config", config),
    Route("/metrics", metrics),
    Route("/routing", routing),
    Route("/openapi.json", openapi),
]
OPEN_PATHS = OPEN_ROUTES | page.PATHS  # no key needed
WATCHED_PATHS = frozenset({"/health", "/health/ready", "/ping", "/metrics"})  # answered while the service drains
SHOWN_HEADERS = (  # to scripts of other origins
    "etag",
    "location",
    "retry-after",
    "x-request-id",
    "x-adapter-digest",
    "x-adapter-generation",
    "x-alora-invocation",
    "x-alora-activation",
    "x-queue-time-ms",
    "x-cached-tokens",
    "x-time-to-first-token-ms",
)

errors = {
    RequestError: on_error,
    InvalidAdapter: on_error,
    StoreError: on_error,
    OSError: on_error,
    RecursionError: on_error,
    HTTPException: on_http_exception,
    ClientDisconnect: on_client_disconnect,
}


def create_app(settings: Settings) -> Starlette:
    """The service as an ASGI application; its lifespan starts and ends the engine process.

    It may be mounted in another one, which then enters `app.router.lifespan_context(app)` (docs/embedding.md); the
    operators' page needs the root. Raises KeysFileError and TracesMissing with a sentence.
    """
    keys = Keys(settings.api_key, settings.keys_file, share_cache=settings.share_cache_between_keys)
    traces = None if settings.otlp_endpoint is None else Traces(otlp_exporter(settings.otlp_endpoint))
    middleware = [Middleware(AccessLog, needs_key=keys.needed), Middleware(RequestId)]
    if traces is not None:
        middleware.append(Middleware(TraceRequests, traces, WATCHED_PATHS))
    if settings.cors_origins:  # before the key: browsers ask without one whether they may send it
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.cors_origins,
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=SHOWN_HEADERS,
            )
        )
    # Starlette's own one is outside of all middleware: a page could not read its answer
    middleware.append(Middleware(ServerErrorMiddleware, handler=on_unhandled))
    gate = Gate()
    middleware.append(Middleware(AtGate, gate, WATCHED_PATHS))
    if keys.needed:
        open_paths = OPEN_PATHS | {"/metrics"} if settings.open_metrics else OPEN_PATHS
        middleware.append(Middleware(RequireKey, keys, open_paths))
    app = Starlette(routes=guarded(routes), exception_handlers=errors, middleware=middleware, lifespan=lifespan)
    app.router.redirect_slashes = False
    app.state.settings, app.state.gate, app.state.keys, app.state.traces = settings, gate, keys, traces
    return app


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """Set `app.state.services` while they run.

    Raises UnsupportedModel, TokenizerMissing, StoreError, EventsUnavailable or EngineStartFailed with a sentence.
    """
    async with AsyncExitStack() as stack:
        if app.state.traces is not None:
            stack.push_async_callback(app.state.traces.close)
        app.state.services = await stack.enter_async_context(running(app.state.settings))
        stack.push_async_callback(ended, asyncio.create_task(app.state.keys.follow(), name="keys file"))
        yield


async def ended(task: asyncio.Task[None]) -> None:
    """End a task that would never return."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _markers(tokenizer: Tokenizer, model: ModelConfig, vocab_size: int) -> Markers:
    """The tokens that are no text to a grammar. One that ends an answer is no part of free text either."""
    ids = {text: token_id for text, token_id in tokenizer.markers.items() if token_id < vocab_size}
    ends = {text for text, token_id in ids.items() if token_id in model.eos_token_ids}
    return Markers(ids, tokenizer.special | ends)


def _engine(settings: Settings, metrics: Metrics) -> EngineClient:
    return EngineClient(
        msgspec.structs.replace(
            settings.engine, kv_changes=settings.kv_events is not None or settings.routing_prefixes
        ),
        settings.engine_command,
        metrics,
        timeout_seconds=settings.engine_timeout_seconds,
        max_queue_seconds=settings.max_queue_seconds,
        environment=child_environment(),
    )


def _kv_events(settings: Settings, catalog: Catalog, metrics: Metrics) -> KvEvents | None:
    if settings.kv_events is None:
        if settings.kv_events_replay is not None:
            raise EventsUnavailable("--kv-events-replay repeats what is published at --kv-events: set that too")
        return None
    places = settings.kv_events, settings.kv_events_topic, settings.kv_events_replay
    return KvEvents(*places, catalog.versions, metrics, settings.engine.block_size)


def _chat_templates(settings: Settings, tokenizer: Tokenizer) -> ChatTemplates:
    """The option's template if there is one, else the tokenizer's."""
    own = tokenizer.chat_templates if settings.chat_template is None else {"default": settings.chat_template}
    return ChatTemplates(
        own,
        tokenizer.special_tokens,
        family=settings.tool_call_parser,
        reasoning=settings.reasoning_parser,
        environment=child_environment(),
    )


def _prefix_heads(
    settings: Settings, changes: asyncio.Queue[KvChanges | None], stack: AsyncExitStack
) -> tuple[PrefixHeads | None, asyncio.Queue[KvChanges | None]]:
    """What tells routers of base prompts, if it is to, and the changes for whoever follows the engine besides."""
    if not settings.routing_prefixes:
        return None, changes
    heads = PrefixHeads(settings.engine.block_size)
    onward: asyncio.Queue[KvChanges | None] = asyncio.Queue()
    following = heads.follow(changes, None if settings.kv_events is None else onward)
    stack.push_async_callback(ended, asyncio.create_task(following))
    return heads, onward


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Services]:
    """The parts of the service, started together and ended in reverse order."""
    started_at, directory = time.time(), Path(settings.engine.model)
    model, metrics = ModelConfig.from_directory(directory), Metrics(settings.served_name)
    sources = Sources(settings.allowed_sources, settings.max_upload_bytes, unsigned=settings.unsigned_sources)
    imports = Imports(settings.max_uploads)
    engine = _engine(settings, metrics)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(engine.close)
        starting = asyncio.create_task(engine.start())
        stack.callback(starting.cancel)
        tokenizer = await asyncio.to_thread(Tokenizer, directory)
        templates = _chat_templates(settings, tokenizer)
        stack.push_async_callback(templates.close)
        catalog = await Catalog.open(
            await asyncio.to_thread(opened_storage, settings),
            engine,
            metrics,
            model,
            max_rank=settings.engine.max_lora_rank,
            refresh_seconds=settings.refresh_seconds,
            collect_after_seconds=settings.collect_after_seconds,
        )
        stack.push_async_callback(catalog.close)
        stack.push_async_callback(imports.close)
        stack.callback(sources.close)
        heads, changes = _prefix_heads(settings, engine.kv_changes, stack)
        if (events := _kv_events(settings, catalog, metrics)) is not None:
            stack.push_async_callback(events.close)
            events.start(changes)
        prefixes = Prefixes(engine.prefixes, catalog.versions)
        stack.push_async_callback(prefixes.close)
        await starting
        assert engine.ready is not None
        max_model_len, vocab_size = engine.ready.max_model_len, engine.ready.vocab_size
        grammars = Grammars(_markers(tokenizer, model, vocab_size), environment=child_environment())
        stack.push_async_callback(grammars.close)
        yield Services(
            settings=settings,
            started_at=started_at,
            model=model,
            metrics=metrics,
            engine=engine,
            catalog=catalog,
            sources=sources,
            imports=imports,
            tokenizer=tokenizer,
            prompts=PromptEncoder(
                tokenizer,
                templates,
                vocab_size,
                max_model_len,
                settings.alora_on_missing,
                request_templates=settings.allow_request_chat_template,
            ),
            grammars=grammars,
            prefixes=prefixes,
            responses=ResponseStore(settings.responses_store_bytes),
            bodies=Bodies(settings.max_body_bytes),
            heads=heads,
            max_model_len=max_model_len,
            vocab_size=vocab_size,
        )


def opened_storage(settings: Settings) -> AdapterStorage:
    """The storage that the settings name. Raises StoreError with a sentence."""
    try:
        return open_storage(settings)
    except OSError as error:
        raise StoreError(f"cannot keep adapters at {error.filename}: {error.strerror}") from error
