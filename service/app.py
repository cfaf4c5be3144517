"""The wiring: routes, errors, and what lives as long as the service does."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.datastructures import State
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from runtime.models.config import ModelConfig
from service.access import RequestId, RequireKey
from service.adapters import dialects
from service.adapters import routes as adapters
from service.catalog.catalog import Catalog
from service.catalog.files import AdapterStorage, open_storage
from service.engine.client import EngineClient
from service.health import health, metrics, openapi, ready, version
from service.ingest.imports import Imports
from service.ingest.sources import Sources
from service.kv import routes as kv
from service.kv.prefixes import Prefixes
from service.metrics import Metrics
from service.openai.chat import chat_completions
from service.openai.completions import completions
from service.openai.models import get_model, list_models
from service.openai.sagemaker import invocations
from service.openai.tokenizer import Tokenizer
from service.responses import ApiError, on_api_error, on_client_disconnect, on_http_exception, on_unhandled
from service.settings import Settings
from storage.store import StoreError

routes = [
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/models", list_models),
    Route("/v1/models/{model:path}", get_model),
    *adapters.routes,
    *dialects.routes,
    *kv.routes,
    Route("/invocations", invocations, methods=["POST"]),
    Route("/health", health),
    Route("/health/ready", ready),
    Route("/ping", ready),
    Route("/version", version),
    Route("/metrics", metrics),
    Route("/openapi.json", openapi),
]
OPEN_PATHS = frozenset({"/health", "/health/ready", "/ping", "/metrics"})  # no key needed

errors = {
    ApiError: on_api_error,
    HTTPException: on_http_exception,
    ClientDisconnect: on_client_disconnect,
    Exception: on_unhandled,
}


def create_app(settings: Settings) -> Starlette:
    """The service as an ASGI application; its lifespan starts and ends the engine process."""
    middleware = [Middleware(RequestId)]
    if settings.api_key is not None:
        middleware.append(Middleware(RequireKey, settings.api_key, OPEN_PATHS))
    app = Starlette(routes=routes, exception_handlers=errors, middleware=middleware, lifespan=lifespan)
    app.router.redirect_slashes = False
    app.state.settings = settings
    return app


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """Fill `app.state`. Raises UnsupportedModel, TokenizerMissing, StoreError or EngineStartFailed with a sentence."""
    state, settings = app.state, app.state.settings
    directory = Path(settings.engine.model)
    state.started_at = time.time()
    state.model_config = ModelConfig.from_directory(directory)
    state.metrics = Metrics()
    state.sources = Sources(settings.allowed_sources, settings.max_upload_bytes)
    state.imports = Imports(settings.max_uploads)
    state.engine = EngineClient(settings.engine, settings.engine_command)
    state.engine.on_load = state.metrics.loaded
    async with AsyncExitStack() as stack:
        stack.push_async_callback(state.engine.close)
        starting = asyncio.create_task(state.engine.start())
        stack.callback(starting.cancel)
        state.tokenizer = await asyncio.to_thread(Tokenizer, directory)
        state.catalog = await open_catalog(state)
        stack.push_async_callback(state.catalog.close)
        stack.push_async_callback(state.imports.close)
        stack.callback(state.sources.close)
        state.prefixes = Prefixes(state.engine, state.catalog)
        stack.callback(state.prefixes.close)
        await starting
        state.max_model_len = state.engine.ready.max_model_len
        state.vocab_size = state.engine.ready.vocab_size
        yield


async def open_catalog(state: State) -> Catalog:
    """The catalog of the store that the settings name. Raises StoreError with a sentence."""
    settings: Settings = state.settings
    storage = await asyncio.to_thread(opened_storage, settings)
    catalog = await Catalog.open(
        storage,
        state.engine,
        state.model_config,
        settings.engine.max_lora_rank,
        settings.refresh_seconds,
        settings.collect_after_seconds,
    )
    catalog.on_download = state.metrics.downloaded
    return catalog


def opened_storage(settings: Settings) -> AdapterStorage:
    try:
        return open_storage(settings)
    except OSError as error:
        raise StoreError(f"cannot keep adapters at {error.filename}: {error.strerror}") from error
