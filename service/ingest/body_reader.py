"""A request's body for a thread that reads it."""

import asyncio

from starlette.requests import Request

from service.ingest.bundle import too_large
from service.ingest.throttle import PIECE_BYTES, Throttle


class BodyReader:
    """Reads a request's body from one thread, which waits while the event loop receives.

    The loop receives only what the thread asks for. So a slow disk slows the client down, and the rest of a body that
    is refused early is never received. The constructor and `close` belong to the event loop.
    """

    def __init__(self, request: Request, max_bytes: int, throttle: Throttle) -> None:
        self.headers = request.headers
        self.max_bytes = max_bytes
        self._throttle = throttle
        self._loop = asyncio.get_running_loop()
        self._chunks = request.stream()
        self._received = 0  # bytes of the body
        self._piece = memoryview(b"")  # received and not read yet
        self._receiving: asyncio.Task[bytes] | None = None
        self._closed = False

    def read(self, max_bytes: int = PIECE_BYTES) -> memoryview:
        """The next bytes, at most `max_bytes` of them; none at the end of the body. Blocks.

        Raises RequestError: `body_too_large` for a body over its limit (counted, because a client may announce any
        length), or of the gate; ClientDisconnect; CancelledError (of concurrent.futures) after `close`.
        """
        if not self._piece:
            if self._received:
                self._throttle.pause()
            self._piece = memoryview(asyncio.run_coroutine_threadsafe(self._receive(), self._loop).result())
        taken, self._piece = self._piece[:max_bytes], self._piece[max_bytes:]
        return taken

    def close(self) -> None:
        """End a read that waits, and every later one."""
        self._closed = True
        if self._receiving is not None:
            self._receiving.cancel()

    async def _receive(self) -> bytes:
        """A piece of the body: a hop to the event loop for each chunk of the network (64 KiB) would cost more."""
        if self._closed:
            raise asyncio.CancelledError
        self._receiving = asyncio.current_task()
        chunks, size = [], 0
        while size < PIECE_BYTES and (chunk := await self._next_chunk()) is not None:
            chunks.append(chunk)
            size += len(chunk)
        return b"".join(chunks)

    async def _next_chunk(self) -> bytes | None:
        chunk = await anext(self._chunks, None)
        self._received += 0 if chunk is None else len(chunk)
        if self._received > self.max_bytes:
            raise too_large(self.max_bytes)
        return chunk
