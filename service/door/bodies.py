"""JSON bodies in memory: the bytes of one, of all that are unfinished, and the values that one may decode to."""

from collections.abc import AsyncIterator

from service.errors import RequestError

FREE_BYTES = 64 * 1024  # of each body, which take none of the room: large bodies keep no ordinary request out
UNFINISHED = 4  # bodies of the largest size that there is room for
# What a body of 16 MB may decode to without these: 350 MB of empty lists. A comma in a text counts as well, and no
# text that fits into a context has so many.
MAX_VALUES, MAX_CONTAINERS = 2_000_000, 200_000


class Bodies:
    """Reads bodies of at most `max_bytes`; bodies that are read at the same time share room for a few of that size."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._room = UNFINISHED * max_bytes

    async def read(self, pieces: AsyncIterator[bytes]) -> bytes:
        """A body. Its bytes are counted as they arrive, because a client may announce any length, or none.

        Raises RequestError: `body_too_large`, `too_many_bodies`, `too_many_values`.
        """
        body, taken = bytearray(), 0
        try:
            async for piece in pieces:
                body += piece
                if len(body) > self._max_bytes:
                    message = (
                        f"the body has more than {self._max_bytes} bytes (--max-body-bytes): send less in one request"
                    )
                    raise RequestError("body_too_large", message)
                more = max(0, len(body) - FREE_BYTES - taken)
                if more > self._room:
                    message = "the server is receiving as many large bodies as it has room for: try again"
                    raise RequestError("too_many_bodies", message)
                self._room -= more
                taken += more
        finally:
            self._room += taken
        _check_values(body)
        return bytes(body)


def _check_values(body: bytearray) -> None:
    values, containers = body.count(b","), body.count(b"[") + body.count(b"{")
    if values > MAX_VALUES or containers > MAX_CONTAINERS:
        message = (
            f"the body has {values} commas and {containers} opening brackets, expected at most {MAX_VALUES} and "
            f"{MAX_CONTAINERS}: send less in one request"
        )
        raise RequestError("too_many_values", message)
