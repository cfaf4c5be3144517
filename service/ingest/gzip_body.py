"""A body that is compressed with gzip, expanded piece by piece."""

import zlib

from service.errors import RequestError
from service.ingest.body_reader import BodyReader
from service.ingest.bundle import too_large
from service.ingest.throttle import PIECE_BYTES

_GZIP = 16 + zlib.MAX_WBITS


class GzipBody:
    """Reads what a body expands to: no more bytes than an uncompressed body may have, one piece in memory."""

    def __init__(self, body: BodyReader) -> None:
        self._body = body
        self._expander = zlib.decompressobj(_GZIP)
        self._received = memoryview(b"")  # compressed, and not expanded yet
        self._begun = False  # the member that is being expanded has bytes
        self._expanded = 0

    def read(self, max_bytes: int = PIECE_BYTES) -> memoryview:
        """The next bytes, at most `max_bytes`; none at the end. Blocks.

        Raises RequestError: `invalid_archive` for what is no gzip or is cut off, `body_too_large`, and as
        `BodyReader.read` does.
        """
        while True:
            if not self._received:
                self._received = self._next()
            ended = not self._received
            if ended and not self._begun:
                return memoryview(b"")
            self._begun = True
            try:
                expanded = self._expander.decompress(self._received, min(max_bytes, PIECE_BYTES))
            except zlib.error as error:
                raise RequestError("invalid_archive", f"the gzip data are broken: {error}") from None
            self._expanded += len(expanded)
            if self._expanded > self._body.max_bytes:
                raise too_large(self._body.max_bytes, "what the archive expands to")
            self._received = memoryview(self._expander.unconsumed_tail)
            if self._expander.eof:
                self._received = memoryview(self._expander.unused_data.lstrip(b"\0"))
                self._expander, self._begun = zlib.decompressobj(_GZIP), False
            elif ended and not expanded:
                raise RequestError("invalid_archive", "the archive is cut off: its gzip data have no end")
            if expanded:
                return memoryview(expanded)

    def _next(self) -> memoryview:
        """More compressed bytes, none at the end. Zeros between members and behind the last one are padding."""
        while received := bytes(self._body.read()):
            received = received if self._begun else received.lstrip(b"\0")
            if received:
                break
        return memoryview(received)
