"""Reading an uploaded adapter from a request's body: multipart, tar, or one safetensors file."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Protocol

from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from runtime.adapter_format.errors import InvalidAdapter
from runtime.adapter_format.safetensors_header import read_header
from service.errors import RequestError
from service.ingest.bundle import CONFIG, MAX_CONFIG_BYTES, WEIGHTS, Bundle, BundleFiles, too_large
from service.ingest.multipart_body import MultipartBody
from service.ingest.tar_body import TarBody
from service.ingest.throttle import PIECE_BYTES, Pace

ACCEPTED = "multipart/form-data, application/x-tar or application/vnd.safetensors"
# A client that sends less takes one of few places from those that would send more.
PATIENCE_SECONDS, LEAST_BYTES_PER_SECOND = 30.0, 16 * 1024


class Body(Protocol):
    """A container format, fed piece by piece; its methods block and may raise RequestError."""

    def feed(self, data: bytes) -> None: ...

    def finish(self) -> Bundle:
        """What was read, after the last piece."""
        ...


class SafetensorsBody:
    """The weights alone, with the configuration in the file's metadata."""

    def __init__(self, files: BundleFiles, directory: Path) -> None:
        self._files, self._weights = files, directory / WEIGHTS
        files.begin(WEIGHTS)

    def feed(self, data: bytes) -> None:
        self._files.write(data)

    def finish(self) -> Bundle:
        self._files.end()
        with self._weights.open("rb") as file:
            config = read_header(file).metadata.get("adapter_config")
        if config is None:
            raise InvalidAdapter("__metadata__", f'has no "adapter_config", expected the JSON of {CONFIG}')
        if len(config) > MAX_CONFIG_BYTES:
            raise too_large(MAX_CONFIG_BYTES, CONFIG)
        return Bundle(self._weights, config.encode())


async def read_bundle(request: Request, directory: Path, max_bytes: int, pace: Pace) -> Bundle:
    """Read a request's body into `directory`, which the caller removes whatever happens.

    Raises RequestError: 415 for another content type, 413 past `max_bytes` (counted, whatever the headers say),
    400 for a malformed container; InvalidAdapter for a safetensors body without a configuration;
    ClientDisconnect.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise too_large(max_bytes)
    files = BundleFiles(directory, max_bytes)
    try:
        body = _body(request, files, directory)
        await _feed(request, body.feed, max_bytes, pace)
        return await asyncio.to_thread(body.finish)
    finally:
        files.close()


def _body(request: Request, files: BundleFiles, directory: Path) -> Body:
    content_type, options = parse_options_header(request.headers.get("content-type"))
    if content_type == b"multipart/form-data":
        return MultipartBody(files, options.get(b"boundary", b""))
    if content_type in (b"application/x-tar", b"application/tar"):
        return TarBody(files)
    if content_type == b"application/vnd.safetensors":
        return SafetensorsBody(files, directory)
    message = f"the content type {content_type.decode('latin-1')!r} is not accepted: expected {ACCEPTED}"
    raise RequestError("unsupported_media_type", message, "Content-Type")


async def _feed(request: Request, feed: Callable[[bytes], None], max_bytes: int, pace: Pace) -> None:
    """Hand the body to a thread, a piece at a time: per chunk of the network (64 KiB) the hop would cost more."""
    received, fed = 0, 0
    pending: list[bytes] = []
    stream, started = request.stream(), time.monotonic()
    while (chunk := await _next(stream, started + PATIENCE_SECONDS + received / LEAST_BYTES_PER_SECOND)) is not None:
        received += len(chunk)
        if received > max_bytes:
            raise too_large(max_bytes)
        pending.append(chunk)
        if received - fed >= PIECE_BYTES:
            await asyncio.to_thread(_feed_all, feed, pending)
            fed, pending = received, []
            await pace.rest()
    if pending:
        await asyncio.to_thread(_feed_all, feed, pending)


def _feed_all(feed: Callable[[bytes], None], chunks: list[bytes]) -> None:
    feed(b"".join(chunks))


async def _next(stream: AsyncGenerator[bytes, None], deadline: float) -> bytes | None:
    """The next piece of a body, None after the last. Raises RequestError 408 when it does not come in time."""
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            return await anext(stream, None)
    except TimeoutError:
        message = f"the body came too slowly: expected {LEAST_BYTES_PER_SECOND} bytes a second"
        raise RequestError("upload_too_slow", message) from None
