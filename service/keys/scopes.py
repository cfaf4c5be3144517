"""Which scopes a route needs: one of those that are listed; none: not even a key."""

from collections.abc import Iterable, Mapping

from starlette.middleware import Middleware
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import RequestError
from service.keys import caller
from service.keys.caller import ALL_SCOPES, ANYONE, CALLER

_OPEN: frozenset[caller.Scope] = frozenset()
_GENERATE: frozenset[caller.Scope] = frozenset({"generate"})
_MANAGE: frozenset[caller.Scope] = frozenset({"manage"})
_ADMIN: frozenset[caller.Scope] = frozenset({"admin"})
# By method and path. HEAD needs what GET does, and OPTIONS, which tells the methods of a path, any key.
SCOPES: Mapping[tuple[str, str], frozenset[caller.Scope]] = {
    ("POST", "/v1/completions"): _GENERATE,
    ("POST", "/v1/chat/completions"): _GENERATE,
    ("POST", "/v1/responses"): _GENERATE,
    ("GET", "/v1/responses/{id}"): _GENERATE,
    ("DELETE", "/v1/responses/{id}"): _GENERATE,
    ("POST", "/v1/responses/{id}/cancel"): _GENERATE,
    ("GET", "/v1/responses/{id}/input_items"): _GENERATE,
    ("POST", "/invocations"): _GENERATE,
    ("POST", "/inference/v1/generate"): _GENERATE,
    ("POST", "/tokenize"): _GENERATE,
    ("POST", "/detokenize"): _GENERATE,
    ("GET", "/tokenizer_info"): _GENERATE,
    ("POST", "/kv/prefixes"): _GENERATE,
    ("GET", "/kv/prefixes"): _GENERATE,
    ("GET", "/kv/prefixes/{id}"): _GENERATE,
    ("DELETE", "/kv/prefixes/{id}"): _GENERATE,
    ("GET", "/adapters"): _MANAGE,
    ("POST", "/adapters"): _MANAGE,
    ("PUT", "/adapters/{name:adapter}"): _MANAGE,
    ("GET", "/adapters/{name:adapter}"): _MANAGE,
    ("PATCH", "/adapters/{name:adapter}"): _MANAGE,
    ("DELETE", "/adapters/{name:adapter}"): _MANAGE,
    ("POST", "/adapters/{name:adapter}/load"): _MANAGE,
    ("POST", "/adapters/{name:adapter}/unload"): _MANAGE,
    ("POST", "/v1/load_lora_adapter"): _MANAGE,
    ("POST", "/v1/unload_lora_adapter"): _MANAGE,
    ("POST", "/load_lora_adapter"): _MANAGE,
    ("POST", "/unload_lora_adapter"): _MANAGE,
    ("GET", "/v1/loras"): _MANAGE,
    ("POST", "/v1/loras"): _MANAGE,
    ("DELETE", "/v1/loras/{name:adapter}"): _MANAGE,
    ("GET", "/kv"): _MANAGE | _ADMIN,  # without admin only the adapters that the key sees
    ("DELETE", "/kv/namespaces/{namespace:path}"): _ADMIN,
    ("POST", "/pause"): _ADMIN,
    ("POST", "/resume"): _ADMIN,
    ("GET", "/is_paused"): _ADMIN,
    ("POST", "/reset_prefix_cache"): _ADMIN,
    ("POST", "/sleep"): _ADMIN,
    ("POST", "/wake_up"): _ADMIN,
    ("GET", "/is_sleeping"): _ADMIN,
    ("GET", "/get_world_size"): _ADMIN,
    ("GET", "/routing"): _MANAGE | _ADMIN,  # only the adapters that the key sees; without admin no K/V
    ("GET", "/metrics"): _ADMIN,
    ("GET", "/config"): _ADMIN,
    ("GET", "/v1/models"): ALL_SCOPES,
    ("GET", "/v1/models/{model:path}"): ALL_SCOPES,
    ("GET", "/version"): ALL_SCOPES,
    ("GET", "/openapi.json"): ALL_SCOPES,
    ("GET", "/health"): _OPEN,
    ("GET", "/health/ready"): _OPEN,
    ("GET", "/ping"): _OPEN,
    ("GET", "/"): _OPEN,
    ("GET", "/ui"): _OPEN,
    ("GET", "/ui/{version}/{file}"): _OPEN,
}
OPEN_ROUTES = frozenset(path for (_, path), needed in SCOPES.items() if not needed)


class RequireScope:
    """Refuses requests to one route whose key has none of the scopes that it needs."""

    def __init__(self, app: ASGIApp, needed: frozenset[caller.Scope]) -> None:
        self._app, self._needed = app, needed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises RequestError `missing_scope`."""
        scopes = scope.get(CALLER, ANYONE).scopes
        if self._needed and not scopes & self._needed:
            needed = " or ".join(sorted(self._needed))
            message = f"this call needs a key with the scope {needed}, and this key has {', '.join(sorted(scopes))}"
            raise RequestError("missing_scope", message)
        await self._app(scope, receive, send)


def guarded(routes: Iterable[Route]) -> list[Route]:
    """The routes, each behind its scopes. Raises KeyError for one without any in the table."""
    return [_guarded(route) for route in routes]


def _guarded(route: Route) -> Route:
    methods = (route.methods or set()) - {"HEAD"}
    [needed] = {SCOPES[method, route.path] for method in methods}
    middleware = [Middleware(RequireScope, needed)]
    return Route(route.path, route.endpoint, methods=list(methods), middleware=middleware)
