"""What a step computes of one request."""

from typing import NamedTuple

from runtime.request import Request


class Chunk(NamedTuple):
    """Tokens `start` to `start + length` of a request, computed in one step; `samples` if that reaches its end."""

    request: Request
    start: int
    length: int
    samples: bool
