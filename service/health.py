"""What is asked of the service itself: whether it lives and serves, what it counts, how it is set, what it speaks."""

import importlib.metadata
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from service.door.gate import Gate
from service.engine_metrics import EngineMetrics, InFlightMetrics
from service.errors import RequestError
from service.http import json_response
from service.keys.keys import Keys
from service.keys.metrics import KeyMetrics
from service.metrics import CONTENT_TYPE
from service.options.in_force import config_in_force
from service.services import services_of

VLLM_API = "0.12.0"  # whose clients send structured_outputs instead of guided_json


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """What runs. While the engine is not running, only the server's version is known."""

    version: str
    vllm_api: Annotated[str, Meta(description="the release of vLLM whose fields and calls this server follows")] = (
        VLLM_API
    )
    dtype: str | None = None
    kernels: str | None = None
    weights: Annotated[
        str | None, Meta(description="how the base's weights are held: a dtype, or how they are quantised")
    ] = None
    timings_ms: dict[str, float] = {}  # of one projection of the model, by the kernels that were candidates


CONTRACT = Path(__file__).parents[1] / "openapi" / "openapi.json"


async def health(request: Request) -> Response:
    """The service itself answers."""
    return json_response({"status": "ok"})


async def ready(request: Request) -> Response:
    """Requests would be served now."""
    gate: Gate = request.app.state.gate
    if gate.closed:
        raise RequestError("shutting_down", "the service is shutting down")
    if services_of(request).engine.ready is None:
        raise RequestError("engine_unavailable", "the engine is not running")
    return json_response({"status": "ready"})


async def version(request: Request) -> Response:
    """What runs: the server's version, and what the engine computes with."""
    try:
        number = importlib.metadata.version("rootstock")
    except importlib.metadata.PackageNotFoundError:
        number = "unknown"  # run from a checkout that is not installed
    engine = services_of(request).engine.ready
    if engine is None:
        return json_response(Version(version=number))
    return json_response(
        Version(
            version=number,
            dtype=engine.dtype,
            kernels=engine.kernels,
            weights=engine.weights,
            timings_ms=engine.timings,
        )
    )


async def config(request: Request) -> Response:
    """The options in force, without secrets, and what the engine decided."""
    services = services_of(request)
    return json_response(config_in_force(services.settings, services.engine.ready))


async def openapi(request: Request) -> Response:
    if not CONTRACT.is_file():
        raise RequestError("not_found", "this installation came without openapi.json")
    return Response(CONTRACT.read_bytes(), media_type="application/json")


async def metrics(request: Request) -> Response:
    services = services_of(request)
    stats, engine = await services.engine.latest_stats(), services.engine.ready
    services.metrics.engine_up.set(services.engine.answers)
    name = services.settings.served_name
    keys: Keys = request.app.state.keys
    shown: list[Collector] = [InFlightMetrics(*services.engine.in_flight(), name)]
    if keys.needed:
        shown.append(KeyMetrics(keys.usage, keys.unknown, services.catalog.quotas.used()))
    if stats is not None and engine is not None:
        named = services.catalog.versions.list()
        services.metrics.looked_up(stats.namespaces, {version.digest: version.record.kind for version in named})
        shown.append(EngineMetrics(stats, engine, name, named, services.catalog.disk))
    return Response(services.metrics.render(*shown), headers={"content-type": CONTENT_TYPE})
