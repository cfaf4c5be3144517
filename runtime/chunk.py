"""What a step computes of one sequence."""

from typing import NamedTuple

from runtime.request import Sequence


class Chunk(NamedTuple):
    """Tokens `start` to `start + length` of a sequence, computed in one step; `samples` if that reaches its end."""

    sequence: Sequence
    start: int
    length: int
    samples: bool
