"""A body that a thread reads while the event loop receives: back-pressure, limits, and ends in the middle."""

import asyncio
import functools
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.types import Message

from service.errors import RequestError
from service.ingest.body_reader import BodyReader
from service.ingest.imports import Imports
from service.ingest.throttle import PIECE_BYTES, Throttle
from service.ingest.upload_body import read_bundle

CHUNK = b"x" * (PIECE_BYTES // 16)
PIECES = 8


class Client:
    """Sends a body in chunks of a sixteenth of a piece; after `sends` of them it stays silent."""

    def __init__(self, chunks: int = 16 * PIECES, *, sends: int | None = None) -> None:
        self._chunks, self._sends = chunks, chunks if sends is None else sends
        self.sent = 0
        self.silent = asyncio.Event()

    async def receive(self) -> Message:
        if self.sent == self._sends:
            self.silent.set()
            await asyncio.Event().wait()
        self.sent += 1
        return {"type": "http.request", "body": CHUNK, "more_body": self.sent < self._chunks}

    def body(self, max_bytes: int = 1 << 30, content_type: bytes = b"application/x-tar") -> BodyReader:
        scope = {"type": "http", "headers": [(b"content-type", content_type)]}
        return BodyReader(Request(scope, self.receive), max_bytes, Throttle(lambda: False))


def on_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*arguments: Any, **fixtures: Any) -> None:
        asyncio.run(test(*arguments, **fixtures))

    return run


def read_all(body: BodyReader) -> int:
    size = 0
    while data := body.read(1000):
        size += len(data)
    return size


@on_a_loop
async def test_a_body_is_read_whole() -> None:
    assert await asyncio.to_thread(read_all, Client().body()) == PIECES * PIECE_BYTES


@on_a_loop
async def test_a_client_sends_no_faster_than_the_thread_reads() -> None:
    client = Client()
    body = client.body()
    for pieces in (1, 2, 3):
        for _ in range(16):
            await asyncio.to_thread(body.read, len(CHUNK))
        assert client.sent == 16 * pieces


@on_a_loop
async def test_the_rest_of_a_refused_body_is_not_received(tmp_path: Path) -> None:
    client = Client()
    with pytest.raises(RequestError, match="expected a tar archive"):
        await asyncio.to_thread(read_bundle, client.body(), tmp_path)
    assert client.sent == 16


@on_a_loop
async def test_a_body_over_the_limit_is_refused_at_the_chunk_that_exceeds_it() -> None:
    client = Client()
    with pytest.raises(RequestError) as refused:
        await asyncio.to_thread(read_all, client.body(max_bytes=2 * PIECE_BYTES + 1))
    assert refused.value.code == "body_too_large"
    assert client.sent == 33


@pytest.mark.parametrize("sends", [0, 3, 20])
@on_a_loop
async def test_a_cancelled_upload_ends_its_thread(tmp_path: Path, sends: int) -> None:
    client, imports = Client(sends=sends), Imports(1)
    body = client.body(content_type=b"application/vnd.safetensors")
    upload = asyncio.create_task(imports.on_thread(body.close, read_bundle, body, tmp_path))
    await client.silent.wait()
    upload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(upload, 10)
    assert await asyncio.wait_for(imports.on_thread(body.close, lambda: "free"), 10) == "free"
    with pytest.raises(asyncio.CancelledError):
        await asyncio.to_thread(body.read)
    await imports.close()
