"""What is asked of the service itself: whether it lives, whether it can serve, what it counts, what it speaks."""

import importlib.metadata
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from service.engine_metrics import EngineMetrics
from service.metrics import CONTENT_TYPE
from service.responses import ApiError, json_response

CONTRACT = Path(__file__).parents[1] / "openapi" / "openapi.json"


async def health(request: Request) -> Response:
    """The service itself answers."""
    return json_response({"status": "ok"})


async def ready(request: Request) -> Response:
    """Requests would be served now."""
    if request.app.state.engine.ready is None:
        raise ApiError(503, "engine_unavailable", "the engine is not running", headers={"retry-after": "1"})
    return json_response({"status": "ready"})


async def version(request: Request) -> Response:
    try:
        return json_response({"version": importlib.metadata.version("rootstock")})
    except importlib.metadata.PackageNotFoundError:
        return json_response({"version": "unknown"})  # run from a checkout that is not installed


async def openapi(request: Request) -> Response:
    if not CONTRACT.is_file():
        raise ApiError(404, "not_found", "this installation came without openapi.json")
    return Response(CONTRACT.read_bytes(), media_type="application/json")


async def metrics(request: Request) -> Response:
    state = request.app.state
    stats, engine = await state.engine.latest_stats(), state.engine.ready
    snapshot = None
    if stats is not None and engine is not None:
        catalog = state.catalog
        state.metrics.looked_up(stats.namespaces, {v.digest: v.record.kind for v in catalog.list()})
        snapshot = EngineMetrics(stats, engine, state.settings.served_name, catalog.list(), catalog.disk)
    return Response(state.metrics.render(snapshot), headers={"content-type": CONTENT_TYPE})
