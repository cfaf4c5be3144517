"""The block tables of running requests as arrays, which are written on from step to step."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from runtime.request import Request
from runtime.scheduler import Chunk


class _Table(NamedTuple):
    blocks: list[int]  # the request's own, as it was
    array: npt.NDArray[np.int32]
    start: int  # of the request's chunk in the last step
    before: int  # and in the step before that


class BlockTables:
    """Keeps the arrays of the requests in the last step.

    A block that became full may be exchanged for an equal one when its step is committed. That is done before the step
    after the next is laid out: of a table, what that step wrote or filled is read again.
    """

    def __init__(self, width: int, block_size: int) -> None:
        self._width, self._block_size = width, block_size
        self._tables: dict[Request, _Table] = {}

    def of(self, chunks: Sequence[Chunk]) -> list[npt.NDArray[np.int32]]:
        """The blocks of each chunk's request, up to the chunk's end. Valid until the next call."""
        self._tables = {chunk.request: self._table(chunk) for chunk in chunks}
        size = self._block_size
        return [
            table.array[: -(-(chunk.start + chunk.length) // size)]
            for chunk, table in zip(chunks, self._tables.values(), strict=True)
        ]

    def _table(self, chunk: Chunk) -> _Table:
        request, start, length, _ = chunk
        known = self._tables.get(request)
        if known is None or known.blocks is not request.blocks:  # a preempted request gets another list
            known = _Table(request.blocks, np.empty(self._width, np.int32), 0, 0)
        first, stop = known.before // self._block_size, -(-(start + length) // self._block_size)
        known.array[first:stop] = request.blocks[first:stop]
        return _Table(request.blocks, known.array, start, known.start)
