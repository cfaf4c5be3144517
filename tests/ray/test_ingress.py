"""What the ingress makes of a replica's death, by when it comes. Replicas are scripted; what is sent is ASGI."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx
import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import DeploymentUnavailableError
from starlette.types import Message

from service.ray.call import ELSEWHERE, Call
from service.ray.ingress import ATTEMPTS, Ingress

START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}
STREAM = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
Script = Callable[[Call], AsyncGenerator[list[Message], None]]

pytestmark = pytest.mark.usefixtures("client")  # the actor beside an ingress needs Ray


class Answer:
    """What Ray gives for a call of a generator."""

    def __init__(self, messages: AsyncGenerator[list[Message], None]):
        self._messages = messages

    def __aiter__(self) -> AsyncGenerator[list[Message], None]:
        return self._messages

    def cancel(self) -> None:
        """The script has ended anyway."""


class Replicas:
    """A handle of replicas: each call is answered by the next script."""

    def __init__(self, *scripts: Script):
        self._scripts = iter(scripts)
        self.calls: list[Call] = []

    def options(self, *, stream: bool) -> "Replicas":
        assert stream
        return self

    @property
    def answer(self) -> "Replicas":
        return self

    def remote(self, call: Call) -> Answer:
        self.calls.append(call)
        return Answer(next(self._scripts)(call))


def body(content: bytes, *, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": more}


def gives(*batches: list[Message], then: Exception | None = None) -> Script:
    """Answers with the messages, and then dies if it is told how."""

    async def script(call: Call) -> AsyncGenerator[list[Message], None]:
        for batch in batches:
            yield batch
        if then is not None:
            raise then

    return script


def reads_and_dies() -> Script:
    async def script(call: Call) -> AsyncGenerator[list[Message], None]:
        await call.pieces.take.remote(call.id, call.attempt)
        raise ActorDiedError
        yield []

    return script


def reads(received: list[bytes]) -> Script:
    async def script(call: Call) -> AsyncGenerator[list[Message], None]:
        more = True
        while more:
            message = await call.pieces.take.remote(call.id, call.attempt)
            received.append(message["body"])
            more = message["more_body"]
        yield [START, body(b"{}")]

    return script


def call(
    replicas: Replicas, method: str = "POST", path: str = "/v1/completions", content: Any = b"{}"
) -> httpx.Response:
    async def ask() -> httpx.Response:
        app = Ingress(replicas, "tiny", 1 << 20).__serve_build_asgi_app__()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://replicas") as client:
            return await client.request(method, path, content=content)

    return asyncio.run(ask())


WHOLE = gives([START, body(b"{}")])


@pytest.mark.parametrize("error", [ActorDiedError(), ActorUnavailableError("gone", b"0" * 16)])
@pytest.mark.parametrize(("method", "content"), [("POST", b"{}"), ("POST", b""), ("GET", b""), ("DELETE", b"")])
def test_a_call_without_an_answer_is_repeated(error: Exception, method: str, content: bytes) -> None:
    replicas = Replicas(gives(then=error), gives(then=error), WHOLE)
    assert call(replicas, method, content=content).status_code == 200
    assert [each.attempt for each in replicas.calls] == [0, 1, 2]


def test_a_replica_without_an_engine_is_passed_over() -> None:
    replicas = Replicas(gives([{"type": ELSEWHERE, "replica": "first"}]), WHOLE)
    assert call(replicas).status_code == 200
    assert [(each.attempt, each.avoid) for each in replicas.calls] == [(0, ""), (1, "first")]
    received: list[bytes] = []
    replicas = Replicas(gives([{"type": ELSEWHERE, "replica": "first"}]), reads(received))
    assert call(replicas, "PUT", "/adapters/poet", b"an adapter").status_code == 200
    assert b"".join(received) == b"an adapter"


def test_a_call_that_no_replica_survives_is_refused() -> None:
    replicas = Replicas(*[gives(then=ActorDiedError())] * ATTEMPTS)
    refused = call(replicas)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_died")
    assert len(replicas.calls) == ATTEMPTS


def test_a_death_after_the_whole_answer_is_no_error() -> None:
    """A second answer would cut the connection, on which the client sends its next call."""
    replicas = Replicas(gives([START, body(b"[1,", more=True)], [body(b"2]")], then=ActorDiedError()))
    assert call(replicas).json() == [1, 2]
    assert len(replicas.calls) == 1


def test_a_death_in_the_middle_cuts_an_answer_and_ends_a_stream_with_an_event() -> None:
    with pytest.raises(ConnectionError, match="has died"):
        call(Replicas(gives([START, body(b"[1,", more=True)], then=ActorDiedError())))
    streamed = call(Replicas(gives([STREAM, body(b"data: 1\n\n", more=True)], then=ActorDiedError())))
    assert streamed.text.startswith('data: 1\n\ndata: {"error":{')
    assert "engine_died" in streamed.text


def test_an_upload_is_repeated_until_a_piece_of_it_was_read() -> None:
    received: list[bytes] = []
    replicas = Replicas(gives(then=ActorDiedError()), reads(received))
    assert call(replicas, "PUT", "/adapters/poet", b"an adapter").status_code == 200
    assert b"".join(received) == b"an adapter"
    replicas = Replicas(reads_and_dies())
    refused = call(replicas, "PUT", "/adapters/poet", b"an adapter")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_died")


def test_replicas_that_cannot_be_started_are_an_answer_of_our_own() -> None:
    error = DeploymentUnavailableError.__new__(DeploymentUnavailableError)
    refused = call(Replicas(gives(then=error)))
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unavailable")
