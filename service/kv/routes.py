"""The KV cache over HTTP: show it, warm and hold prefixes, drop the K/V of a model."""

from contextlib import ExitStack

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.catalog.record import AdapterVersion
from service.catalog.seen import Seen, least_generation
from service.errors import RequestError
from service.http import NoQuery, json_response, read_json, read_query, until_disconnect
from service.keys.caller import Caller, caller_of
from service.kv.prefixes import PrefixSpec
from service.kv.schemas import PrefixList, PrefixRequest, held_prefix, kv_cache, kv_of_adapters
from service.openai.invocation import Prompt, require_applicable
from service.openai.models import find_version, know
from service.openai.sampling_params import answer_length
from service.services import Services, services_of

BASE = "base"


async def get_kv(request: Request) -> Response:
    read_query(request, NoQuery)
    services = services_of(request)
    stats, engine = await services.engine.latest_stats(), services.engine.ready
    if stats is None or engine is None:
        raise RequestError("engine_unavailable", "the engine is not running, or too busy to answer: try again")
    caller, name = caller_of(request), services.settings.served_name
    shown = kv_cache if "admin" in caller.scopes else kv_of_adapters
    versions = Seen(services.catalog, caller).list()
    return json_response(shown(stats, services.engine.stats_age, engine.block_size, name, versions))


async def post_prefix(request: Request) -> Response:
    read_query(request, NoQuery)
    services = services_of(request)
    body, least = await read_json(request, PrefixRequest, services.bodies), least_generation(request.headers)
    return await until_disconnect(request, _compute(services, body, caller_of(request), least))


async def get_prefixes(request: Request) -> Response:
    read_query(request, NoQuery)
    prefixes = services_of(request).prefixes.list(caller_of(request))
    return json_response(PrefixList(prefixes=[held_prefix(prefix) for prefix in prefixes]))


async def get_prefix(request: Request) -> Response:
    read_query(request, NoQuery)
    prefix = services_of(request).prefixes.get(request.path_params["id"], caller_of(request))
    return json_response(held_prefix(prefix))


async def delete_prefix(request: Request) -> Response:
    read_query(request, NoQuery)
    services_of(request).prefixes.release(request.path_params["id"], caller_of(request))
    return Response(status_code=204)


async def delete_namespace(request: Request) -> Response:
    read_query(request, NoQuery)
    services = services_of(request)
    namespace = await _namespace(services, request.path_params["namespace"], caller_of(request))
    await services.engine.prefixes.drop_namespace(namespace)
    return Response(status_code=204)


routes = [
    Route("/kv", get_kv, methods=["GET"]),
    Route("/kv/prefixes", get_prefixes, methods=["GET"]),
    Route("/kv/prefixes", post_prefix, methods=["POST"]),
    Route("/kv/prefixes/{id}", get_prefix, methods=["GET"]),
    Route("/kv/prefixes/{id}", delete_prefix, methods=["DELETE"]),
    Route("/kv/namespaces/{namespace:path}", delete_namespace, methods=["DELETE"]),
]


async def _compute(services: Services, body: PrefixRequest, caller: Caller, least: int | None) -> Response:
    caller.usage.require_tokens()
    versions, base = Seen(services.catalog, caller), services.settings.served_name
    await know([body.model], base, versions, least)
    version = find_version(body.model, base, versions, "model")
    require_applicable(body.alora, [version])
    with ExitStack() as using:
        if version is not None:
            using.enter_context(versions.using(version))
        prompt = await _prompt(services, body, version)
        caller.usage.spend(len(prompt.token_ids))
        salt = caller.salt(body.cache_salt)
        spec = PrefixSpec(body.model, version, prompt, body.ttl_seconds, salt, caller.tenant, caller.id)
        prefix = await (services.prefixes.hold(spec) if body.pin else services.prefixes.warm(spec))
    if not body.pin:
        return json_response(held_prefix(prefix, pinned=False))
    return json_response(held_prefix(prefix), 201, {"location": f"/kv/prefixes/{prefix.id}"})


async def _prompt(services: Services, body: PrefixRequest, version: AdapterVersion | None) -> Prompt:
    """The prefix that a request asks for, as tokens. Raises RequestError, whose param is the field."""
    if (body.messages is None) == (body.prompt is None):
        raise RequestError("invalid_field", "expected either messages, for a chat, or a prompt", "messages")
    if body.messages is not None:
        prompt, param = await services.prompts.chat_prefix(body.messages, version, body.alora), "messages"
    else:
        assert body.prompt is not None
        text = body.prompt if isinstance(body.prompt, str) else list[str | int | list[int]](body.prompt)
        [prompt], param = await services.prompts.text_prompts(text, [version], body.alora), "prompt"
    answer_length(None, None, len(prompt.token_ids), services.max_model_len, param)
    return prompt


async def _namespace(services: Services, name: str, caller: Caller) -> str | None:
    """The digest of a namespace, None for the base. Raises RequestError `namespace_not_found`."""
    base, catalog = services.settings.served_name, services.catalog
    if name in (BASE, base):
        return None
    if catalog.versions.resolve(name) is None and catalog.blobs.referenced(name):
        return name
    seen = Seen(catalog, caller)
    await know([name], base, seen)
    try:
        version = find_version(name, base, seen, "namespace")
    except RequestError as error:
        raise RequestError("namespace_not_found", error.message, "namespace") from None
    return None if version is None else version.digest
