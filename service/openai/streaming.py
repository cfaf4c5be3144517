"""A generation as an HTTP answer: whole or streamed, aborted when the client goes away."""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any, NamedTuple, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Send

from runtime.messages import SamplingParams
from service.access import access_record
from service.catalog.seen import Seen, least_generation
from service.errors import EngineError, error_body
from service.http import encode_json, json_response, until_disconnect
from service.keys.caller import caller_of
from service.openai.generation import Counted, Delta, Generation, Plan
from service.openai.invocation import Prompt, alora_headers, require_applicable
from service.openai.models import Adapters, adapters_in_use
from service.openai.sampling_params import refuse_unbuilt, stop_strings
from service.openai.schemas import GenerationRequest, Usage
from service.routing.heads import heads_of
from service.services import Services
from service.traces.stages import Stage

DONE = b"data: [DONE]\n\n"


class Inputs(NamedTuple):
    """The prompts of a request, encoded for its model, and how to sample after each."""

    prompts: list[Prompt]
    params: SamplingParams
    special: bool  # whether the text has the special tokens too
    choices: int | None = None  # sequences for each prompt; None: as many as are given out


class Call(Protocol):
    """What a chat and a completion do each in their own way: read their fields, and format their answer."""

    id: str
    built: Sequence[str]  # fields of the call that are refused in others

    @property
    def body(self) -> GenerationRequest: ...

    async def inputs(self, adapters: Adapters) -> Inputs:
        """Check the call's own fields and encode its prompts. Raises RequestError naming the field."""

    def chunk(self, delta: Delta) -> msgspec.Struct | None:
        """One server-sent event; None if there is nothing to say."""

    def usage_chunk(self, usage: Usage) -> msgspec.Struct:
        """The event without choices that ends a stream whose client asked for its usage."""

    def whole(self, choices: list[list[Delta]], usage: Usage) -> msgspec.Struct | Sequence[msgspec.Struct]:
        """The answer that is not streamed, from all deltas of each choice."""


class EventStream(StreamingResponse):
    """Server-sent events; when they end, or the client goes away, their source is closed at once."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], source: AsyncExitStack, headers: dict[str, str]):
        super().__init__(events, headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        self._source = source

    async def stream_response(self, send: Send) -> None:
        # Starlette leaves a cancelled iterator to the garbage collector: the abort would come late
        async with self._source:
            await super().stream_response(send)


class Started(NamedTuple):
    """A generation that runs until its source is closed."""

    generation: Generation
    deltas: AsyncGenerator[Delta, None]
    headers: dict[str, str]  # of the answer
    source: AsyncExitStack


async def answer(request: Request, services: Services, call: Call, arrived: float) -> Response:
    """Generate what a call asks for; `arrived` is time.perf_counter() when the request came."""
    return await until_disconnect(request, _answer(request, services, call, arrived))


@asynccontextmanager
async def started(request: Request, services: Services, call: Call, arrived: float) -> AsyncIterator[Started]:
    """Check and begin what a call asks for; it is aborted at the end, unless its source has been taken over.

    Raises RequestError naming the field.
    """
    body, record, caller = call.body, access_record(request), caller_of(request)
    record.id, record.model = call.id, body.model
    caller.usage.require_tokens()
    async with AsyncExitStack() as source:
        seen, mixes = Seen(services.catalog, caller), services.catalog.mixes
        least = least_generation(request.headers)
        in_use = adapters_in_use(body, services.settings.served_name, seen, mixes, least)
        adapters = await source.enter_async_context(in_use)
        refuse_unbuilt(body, built=call.built)
        require_applicable(body.alora, adapters.versions)
        began = time.monotonic()
        prompts, params, special, choices = await call.inputs(adapters)
        if record.stages is not None:
            record.stages.append(Stage("tokenize", began, time.monotonic(), {}))
        record.adapter = adapters.digests
        plan = Plan(
            request_id=call.id,
            prompts=prompts,
            params=params,
            choices=choices or body.n or 1,
            stops=stop_strings(body),
            cache_salt=caller.salt(body.cache_salt),
            tenant=caller.tenant,
            special=special,
            include_stop=bool(body.include_stop_str_in_output),
            seconds=_shortest(body.timeout, services.settings.request_timeout_seconds),
        )
        tenant = plan.tenant or plan.cache_salt
        services.engine.refuse_long_wait(tenant, {prompt.adapter for prompt in prompts})
        if services.heads is not None and len(prompts) == 1 and prompts[0].adapter is None:
            heads = heads_of(getattr(body, "messages", None), getattr(body, "prompt", None))
            services.heads.note(heads, prompts[0].token_ids, plan.cache_salt)
        caller.usage.spend(sum(len(prompt.token_ids) for prompt in prompts))
        counted = Counted(services.metrics.series(adapters.label), services.metrics.vllm, record, caller.usage)
        generation = Generation(plan, services.engine, services.tokenizer, counted, arrived)
        deltas = await source.enter_async_context(aclosing(generation.deltas()))
        headers = adapters.headers | alora_headers(prompts)
        yield Started(generation, deltas, headers, source)


def _shortest(*limits: float | None) -> float | None:
    """The shortest of the time limits that are given; 0 is none."""
    return min(filter(None, limits), default=None)


async def _answer(request: Request, services: Services, call: Call, arrived: float) -> Response:
    async with started(request, services, call, arrived) as (generation, deltas, headers, source):
        if not call.body.stream:
            return await _whole(call, generation, deltas, headers)
        first = await anext(deltas)  # before the status goes out, so that a refusal has a status of its own
        headers |= generation.headers
        return EventStream(_events(call, generation, first, deltas), source.pop_all(), headers)


async def _whole(
    call: Call, generation: Generation, deltas: AsyncGenerator[Delta, None], headers: dict[str, str]
) -> Response:
    choices: dict[int, list[Delta]] = {}
    async for delta in deltas:
        choices.setdefault(delta.choice, []).append(delta)
    headers |= whole_headers(generation)
    return json_response(call.whole([choices[index] for index in sorted(choices)], generation.usage), 200, headers)


def whole_headers(generation: Generation) -> dict[str, str]:
    """What is known of a generation once it has ended."""
    seconds = generation.first_token_seconds or 0.0
    return {**generation.headers, "x-time-to-first-token-ms": f"{seconds * 1000:.1f}"}


async def _events(
    call: Call, generation: Generation, first: Delta, deltas: AsyncGenerator[Delta, None]
) -> AsyncIterator[bytes]:
    try:
        if (chunk := call.chunk(first)) is not None:
            yield _event(chunk)
        async for delta in deltas:
            if (chunk := call.chunk(delta)) is not None:
                yield _event(chunk)
    except EngineError as error:
        yield _event(error_body(error))
        return
    if call.body.stream_options is not None and call.body.stream_options.include_usage:
        yield _event(call.usage_chunk(generation.usage))
    yield DONE


def _event(content: Any) -> bytes:
    return b"data: %b\n\n" % encode_json(content)
