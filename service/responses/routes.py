"""The Responses API: POST /v1/responses, and what is done with a response by its id."""

import time
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.errors import EngineError, RequestError
from service.http import encode_json, json_response, read_body, read_query, until_disconnect
from service.keys.caller import Caller, caller_of
from service.openai.chat import Chat
from service.openai.generation import Delta, FinishReason
from service.openai.known_fields import decode_request
from service.openai.schemas import TextFormat, Usage
from service.openai.streaming import EventStream, Started, started, whole_headers
from service.responses.items import items_of, new_id
from service.responses.output import Output
from service.responses.requests import chat_request, check_request, in_own_words
from service.responses.schemas import (
    DeletedResponse,
    Event,
    IncompleteDetails,
    InputTokensDetails,
    ItemList,
    ItemsQuery,
    ModelResponse,
    OutputTokensDetails,
    ResponseEvent,
    ResponseFailure,
    ResponseQuery,
    ResponsesRequest,
    ResponseUsage,
    TextOptions,
)
from service.services import Services, services_of


async def create(request: Request) -> Response:
    arrived, services = time.perf_counter(), services_of(request)
    body = decode_request(await read_body(request, services.bodies), ResponsesRequest)
    check_request(body)
    answer = Answer(services, body, caller_of(request))
    try:
        return await until_disconnect(request, _respond(request, services, answer, arrived))
    except RequestError as error:
        raise in_own_words(error) from None


class Answer:
    """One response: its chat, what the chat has given, and the bodies that tell of it."""

    def __init__(self, services: Services, body: ResponsesRequest, caller: Caller) -> None:
        self.body, self._store, self._caller = body, services.responses, caller
        self._created_at = int(time.time())
        self._previous = None
        if body.previous_response_id is not None:
            self._previous = services.responses.previous(body.previous_response_id, caller)
        if len(body.input) > services.max_model_len and not isinstance(body.input, str):
            message = f"input: {len(body.input)} items are more than the {services.max_model_len} tokens of the context"
            raise RequestError("context_length_exceeded", message, "input")
        self._items = items_of(body.input)
        earlier = [] if self._previous is None else self._previous.conversation()
        self.chat = Chat(services, chat_request(body, [*earlier, *self._items]), new_id("resp"))
        self._output = Output(self.chat)
        self._reason: FinishReason | None = None

    def push(self, delta: Delta) -> list[Event]:
        self._reason = delta.finish_reason
        return list(self._output.push(delta))

    def begin(self) -> list[Event]:
        return [
            ResponseEvent(type="response.created", sequence_number=self._output.number(), response=self._now()),
            ResponseEvent(type="response.in_progress", sequence_number=self._output.number(), response=self._now()),
        ]

    def end(self, usage: Usage) -> ModelResponse:
        """The whole response, which is stored if it is to be."""
        response = self._now(usage)
        if response.store:
            self._store.put(response, self._items, self._previous, self._caller.id)
        return response

    def last(self, response: ModelResponse) -> Event:
        return ResponseEvent(
            type="response.completed" if response.status == "completed" else "response.incomplete",
            sequence_number=self._output.number(),
            response=response,
        )

    def fail(self, error: EngineError) -> Event:
        response = self._now(failure=ResponseFailure(code="server_error", message=error.message))
        return ResponseEvent(type="response.failed", sequence_number=self._output.number(), response=response)

    def _now(self, usage: Usage | None = None, failure: ResponseFailure | None = None) -> ModelResponse:
        """The response as it is at this time; with its usage it has ended, with a failure too."""
        body, cut = self.body, self._reason == "length"
        text = body.text or TextOptions()
        ended = usage is not None
        return ModelResponse(
            id=self.chat.id,
            created_at=self._created_at,
            completed_at=int(time.time()) if ended and not cut else None,
            status="failed" if failure else "in_progress" if not ended else "incomplete" if cut else "completed",
            error=failure,
            incomplete_details=IncompleteDetails(reason="max_output_tokens") if ended and cut else None,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            model=body.model,
            output=list(self._output.items),
            parallel_tool_calls=body.parallel_tool_calls is not False,
            previous_response_id=body.previous_response_id,
            reasoning=body.reasoning,
            store=body.store is not False,
            temperature=1.0 if body.temperature is None else body.temperature,
            text=TextOptions(format=text.format or TextFormat(), verbosity=text.verbosity),
            tool_choice=body.tool_choice or "auto",
            tools=body.tools or [],
            top_logprobs=body.top_logprobs or 0,
            top_p=1.0 if body.top_p is None else body.top_p,
            usage=None if usage is None else _usage(usage, self.chat.reasoning_tokens),
            user=body.user,
        )


def _usage(usage: Usage, reasoning_tokens: int) -> ResponseUsage:
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=reasoning_tokens),
        total_tokens=usage.total_tokens,
    )


async def _respond(request: Request, services: Services, answer: Answer, arrived: float) -> Response:
    async with started(request, services, answer.chat, arrived) as running:
        generation, deltas, headers, source = running
        if answer.body.stream:
            first = await anext(deltas)  # before the status goes out, so that a refusal has a status of its own
            headers |= generation.headers
            return EventStream(_events(answer, running, first), source.pop_all(), headers)
        async for delta in deltas:
            answer.push(delta)
        return json_response(answer.end(generation.usage), 200, headers | whole_headers(generation))


async def _events(answer: Answer, running: Started, first: Delta) -> AsyncIterator[bytes]:
    for event in (*answer.begin(), *answer.push(first)):
        yield _named(event)
    try:
        async for delta in running.deltas:
            for event in answer.push(delta):
                yield _named(event)
    except EngineError as error:
        yield _named(answer.fail(error))
        return
    # Stored before the client hears of the end, so that it can go on at once
    yield _named(answer.last(answer.end(running.generation.usage)))


def _named(event: Event) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (event.type.encode(), encode_json(event))


async def get(request: Request) -> Response:
    if read_query(request, ResponseQuery).stream:
        message = "stream: only a background response could be streamed again, and there are none: leave it out"
        raise RequestError("unsupported_parameter", message, "stream")
    stored = services_of(request).responses.get(request.path_params["id"], caller_of(request))
    return json_response(stored.response)


async def delete(request: Request) -> Response:
    id = request.path_params["id"]
    services_of(request).responses.delete(id, caller_of(request))
    return json_response(DeletedResponse(id=id))


async def cancel(request: Request) -> Response:
    services_of(request).responses.get(request.path_params["id"], caller_of(request))
    message = (
        "only a background response can be cancelled, and background is not supported: close the connection instead"
    )
    raise RequestError("unsupported_parameter", message, "background")


async def input_items(request: Request) -> Response:
    """The input of this response alone; that of the ones before it is theirs."""
    query = read_query(request, ItemsQuery)
    items = services_of(request).responses.get(request.path_params["id"], caller_of(request)).items
    if query.order == "desc":
        items.reverse()
    if query.after is not None:
        ids = [item.id for item in items]
        if query.after not in ids:
            raise RequestError("invalid_query", f"after: {query.after!r} is no item of this response's input", "after")
        items = items[ids.index(query.after) + 1 :]
    shown = items[: query.limit]
    return json_response(
        ItemList(
            data=shown,
            first_id=shown[0].id if shown else None,
            last_id=shown[-1].id if shown else None,
            has_more=len(items) > len(shown),
        )
    )


routes = [
    Route("/v1/responses", create, methods=["POST"]),
    Route("/v1/responses/{id}", get),
    Route("/v1/responses/{id}", delete, methods=["DELETE"]),
    Route("/v1/responses/{id}/cancel", cancel, methods=["POST"]),
    Route("/v1/responses/{id}/input_items", input_items),
]
