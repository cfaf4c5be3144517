"""A generation as an HTTP answer: whole or streamed, ended when the client goes away."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, aclosing, suppress
from typing import Any, NamedTuple, Protocol
from uuid import uuid4

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Send

from runtime.messages import SamplingParams
from service.catalog.record import AdapterVersion
from service.engine.adapters import RequestFailed
from service.openai.generation import Delta, Generation, Plan
from service.openai.invocation import Prompt, alora_headers, require_applicable
from service.openai.models import resolve
from service.openai.sampling import refuse_unbuilt, stop_strings
from service.openai.schemas import GenerationRequest, Usage
from service.responses import ApiError, encode_json, error_body, json_response

DONE = b"data: [DONE]\n\n"

# Why the engine ended a request, and the status that tells the client so
STATUS = {
    "queue_full": 429,
    "prefixes_full": 409,
    "prefix_dropped": 409,  # its namespace was dropped while it was computed
    "prefix_cache_off": 409,
    "engine_died": 503,
    "engine_unavailable": 503,
    "shutting_down": 503,
    "adapter_failed": 503,
    "adapter_deleted": 404,
    "context_length_exceeded": 400,
    "empty_prompt": 400,
    "invalid_token_id": 400,
    "invalid_max_tokens": 400,
    "non_finite_logits": 422,  # an adapter's weights overflowed
}
RETRY_SECONDS = 1


class Shape(Protocol):
    """How one of the two calls words its answer."""

    def chunk(self, delta: Delta) -> msgspec.Struct | None:
        """One server-sent event; None for nothing to say."""

    def usage_chunk(self, usage: Usage) -> msgspec.Struct:
        """The event without choices that ends a stream which asked for its usage."""

    def whole(self, choices: list[list[Delta]], usage: Usage) -> msgspec.Struct:
        """The answer that is not streamed, from all deltas of each choice."""


class Inputs(NamedTuple):
    """What a call makes of its own fields: prompts for its model, sampling, the shape of its answer."""

    prompts: list[Prompt]
    params: SamplingParams
    shape: Shape


Prepare = Callable[[AdapterVersion | None, str], Awaitable[Inputs]]  # given the model, and the answer's id


class EventStream(StreamingResponse):
    """Server-sent events; when they end, or the client goes away, what they came from is closed at once."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], source: AsyncExitStack, headers: dict[str, str]):
        super().__init__(events, headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        self._source = source

    async def stream_response(self, send: Send) -> None:
        # Starlette leaves a cancelled iterator to the garbage collector: the abort would come late
        async with self._source:
            await super().stream_response(send)


async def until_disconnect(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """Do the work of a request whose body has been read; cancel it when the client goes away."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else Response(status_code=499)  # which nobody will read
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    with suppress(ClientDisconnect):
        while (await request.receive())["type"] != "http.disconnect":
            pass


async def answer(request: Request, body: GenerationRequest, kind: str, prepare: Prepare, arrived: float) -> Response:
    """Generate what a decoded body asks for; `arrived` is when the request came."""
    return await until_disconnect(request, _answer(request, body, f"{kind}-{uuid4().hex}", prepare, arrived))


async def _answer(
    request: Request, body: GenerationRequest, identity: str, prepare: Prepare, arrived: float
) -> Response:
    state = request.app.state
    async with AsyncExitStack() as source:
        version = resolve(body, state.settings.served_name, state.catalog)
        if version is not None:  # held from here on, also where its name is meanwhile given to another
            source.enter_context(state.catalog.using(version))
        refuse_unbuilt(body)
        require_applicable(body.alora, version)
        inputs = await prepare(version, identity)
        plan = Plan(
            request_id=identity,
            prompts=inputs.prompts,
            params=inputs.params,
            choices=body.n or 1,
            stops=stop_strings(body),
            cache_salt=body.cache_salt or "",
        )
        series = state.metrics.series(None if version is None else version.name)
        generation = Generation(plan, state.engine, state.tokenizer, series, arrived)
        headers = {} if version is None else {"x-adapter-digest": version.digest, **alora_headers(inputs.prompts)}
        return await _respond(body, generation, inputs.shape, headers, source)


async def _respond(
    body: GenerationRequest, generation: Generation, shape: Shape, headers: dict[str, str], source: AsyncExitStack
) -> Response:
    deltas = await source.enter_async_context(aclosing(generation.deltas()))
    try:
        if not body.stream:
            return await _whole(generation, deltas, shape, body.n or 1, headers)
        first = await anext(deltas)  # before the status goes out: a refusal still has one of its own
    except RequestFailed as error:
        raise api_error(error) from None
    headers |= generation.headers
    with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return EventStream(_events(generation, first, deltas, shape, with_usage), source.pop_all(), headers)


async def _whole(
    generation: Generation, deltas: AsyncGenerator[Delta, None], shape: Shape, choices: int, headers: dict[str, str]
) -> Response:
    found: dict[int, list[Delta]] = {}
    async for delta in deltas:
        found.setdefault(delta.choice, []).append(delta)
    headers |= generation.headers
    headers["x-time-to-first-token-ms"] = f"{(generation.first_token_seconds or 0.0) * 1000:.1f}"
    return json_response(shape.whole([found[index] for index in sorted(found)], generation.usage), 200, headers)


async def _events(
    generation: Generation, first: Delta, deltas: AsyncGenerator[Delta, None], shape: Shape, with_usage: bool
) -> AsyncIterator[bytes]:
    try:
        if (chunk := shape.chunk(first)) is not None:
            yield _event(chunk)
        async for delta in deltas:
            if (chunk := shape.chunk(delta)) is not None:
                yield _event(chunk)
    except RequestFailed as error:
        yield _event(error_body(api_error(error)))
        return
    if with_usage:
        yield _event(shape.usage_chunk(generation.usage))
    yield DONE


def _event(content: Any) -> bytes:
    return b"data: %b\n\n" % encode_json(content)


def api_error(error: RequestFailed) -> ApiError:
    """What the engine's refusal or failure is to the client."""
    status = STATUS.get(error.code, 500)
    headers = {"retry-after": str(RETRY_SECONDS)} if status in (429, 503) else None
    return ApiError(status, error.code, error.message, headers=headers)
