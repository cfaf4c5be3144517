"""The KV cache over HTTP: look at it, warm and hold prefixes, drop what a model has in it."""

from contextlib import ExitStack

from starlette.datastructures import State
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.adapters.queries import NoQuery, read_query
from service.bodies import read_json
from service.catalog.record import AdapterVersion
from service.engine.adapters import RequestFailed
from service.kv.prefixes import Prefixes, Wanted
from service.kv.resource import PrefixList, PrefixRequest, held_prefix, kv_cache
from service.openai.invocation import Prompt, require_applicable
from service.openai.models import find_version
from service.openai.prompts import chat_prefix, text_prompts
from service.openai.sampling import answer_length
from service.openai.streaming import api_error, until_disconnect
from service.responses import ApiError, json_response

BASE = "base"


async def get_kv(request: Request) -> Response:
    read_query(request, NoQuery)
    state = request.app.state
    stats, engine = await state.engine.latest_stats(), state.engine.ready
    if stats is None or engine is None:
        message = "the engine is not running, or too busy to say"
        raise ApiError(503, "engine_unavailable", message, headers={"retry-after": "1"})
    name, versions = state.settings.served_name, state.catalog.list()
    return json_response(kv_cache(stats, state.engine.stats_age, engine.block_size, name, versions))


async def post_prefix(request: Request) -> Response:
    read_query(request, NoQuery)
    body = await read_json(request, PrefixRequest, request.app.state.settings.max_body_bytes)
    return await until_disconnect(request, _compute(request.app.state, body))


async def get_prefixes(request: Request) -> Response:
    read_query(request, NoQuery)
    prefixes: Prefixes = request.app.state.prefixes
    return json_response(PrefixList(prefixes=[held_prefix(prefix) for prefix in prefixes.list()]))


async def get_prefix(request: Request) -> Response:
    read_query(request, NoQuery)
    return json_response(held_prefix(request.app.state.prefixes.get(request.path_params["id"])))


async def delete_prefix(request: Request) -> Response:
    read_query(request, NoQuery)
    request.app.state.prefixes.release(request.path_params["id"])
    return Response(status_code=204)


async def delete_namespace(request: Request) -> Response:
    read_query(request, NoQuery)
    namespace = _namespace(request.app.state, request.path_params["namespace"])
    try:
        await request.app.state.engine.drop_namespace(namespace)
    except RequestFailed as error:
        raise api_error(error) from None
    return Response(status_code=204)


routes = [
    Route("/kv", get_kv, methods=["GET"]),
    Route("/kv/prefixes", get_prefixes, methods=["GET"]),
    Route("/kv/prefixes", post_prefix, methods=["POST"]),
    Route("/kv/prefixes/{id}", get_prefix, methods=["GET"]),
    Route("/kv/prefixes/{id}", delete_prefix, methods=["DELETE"]),
    Route("/kv/namespaces/{namespace:path}", delete_namespace, methods=["DELETE"]),
]


async def _compute(state: State, body: PrefixRequest) -> Response:
    version: AdapterVersion | None = find_version(body.model, state.settings.served_name, state.catalog, "model")
    require_applicable(body.alora, version)
    with ExitStack() as using:
        if version is not None:
            using.enter_context(state.catalog.using(version))
        prompt = await _prompt(state, body, version)
        wanted = Wanted(body.model, version, prompt, body.ttl_seconds, body.cache_salt or "")
        try:
            prefix = await (state.prefixes.hold(wanted) if body.pin else state.prefixes.warm(wanted))
        except RequestFailed as error:
            raise api_error(error) from None
    if not body.pin:
        return json_response(held_prefix(prefix, pinned=False))
    return json_response(held_prefix(prefix), 201, {"location": f"/kv/prefixes/{prefix.id}"})


async def _prompt(state: State, body: PrefixRequest, version: AdapterVersion | None) -> Prompt:
    """The one prefix that a request has. Raises ApiError 400 naming the field."""
    if (body.messages is None) == (body.prompt is None):
        raise ApiError(400, "invalid_field", "expected either messages, for a chat, or a prompt", "messages")
    if body.messages is not None:
        prompt, param = await chat_prefix(state, body.messages, version, body.alora), "messages"
    else:
        assert body.prompt is not None
        text = body.prompt if isinstance(body.prompt, str) else list[str | int | list[int]](body.prompt)
        [prompt], param = await text_prompts(state, text, version, body.alora), "prompt"
    answer_length(None, None, len(prompt.token_ids), state.max_model_len, param)
    return prompt


def _namespace(state: State, name: str) -> str | None:
    """The digest of a namespace, None for the base's. Raises ApiError 404."""
    if name in (BASE, state.settings.served_name):
        return None
    if state.catalog.resolve(name) is None and state.catalog.counted(name):
        return name
    try:
        version = find_version(name, state.settings.served_name, state.catalog, "namespace")
    except ApiError as error:
        raise ApiError(404, "namespace_not_found", error.message, "namespace") from None
    return None if version is None else version.digest
