"""Which rows of a step carry an adapter; the same for all kernels on a CPU."""

from collections.abc import Sequence
from typing import NamedTuple

from runtime.scheduler import Chunk


class AdaptedRows(NamedTuple):
    """Consecutive rows, or consecutive rows of logits, under one adapter."""

    first: int
    last: int  # exclusive
    adapter: str  # digest


def adapted_rows(chunks: Sequence[Chunk]) -> list[AdaptedRows]:
    """The rows of chunks that lie one after another; an aLoRA adapts those from its invocation on."""
    runs: list[AdaptedRows] = []
    row = 0
    for request, start, length, _ in chunks:
        first = row + min(max(request.invocation_start - start, 0), length)
        row += length
        if request.adapter is None or first == row:
            continue
        if runs and runs[-1].last == first and runs[-1].adapter == request.adapter:
            first = runs.pop().first
        runs.append(AdaptedRows(first, row, request.adapter))
    return runs


def adapted_logits(runs: Sequence[AdaptedRows], logit_rows: Sequence[int]) -> list[AdaptedRows]:
    """The same of the rows whose logits are computed, given in order."""
    found = []
    for first, last, adapter in runs:
        covered = [index for index, row in enumerate(logit_rows) if first <= row < last]
        if covered:
            found.append(AdaptedRows(covered[0], covered[-1] + 1, adapter))
    return found


class LogitRows(NamedTuple):
    """The rows of a step whose logits are computed: first those that are sampled, then those that score a prompt."""

    sampled: list[int]
    scored: list[int]

    @property
    def all(self) -> list[int]:
        return self.sampled + self.scored

    def adapted(self, runs: Sequence[AdaptedRows]) -> list[AdaptedRows]:
        """The runs of `all` under each adapter."""
        shift = len(self.sampled)
        scored = adapted_logits(runs, self.scored)
        return adapted_logits(runs, self.sampled) + [
            AdaptedRows(first + shift, last + shift, adapter) for first, last, adapter in scored
        ]


def logit_rows(chunks: Sequence[Chunk]) -> LogitRows:
    """The rows whose logits the chunks need, which lie one after another."""
    found, row = LogitRows([], []), 0
    for chunk in chunks:
        found.scored.extend(row + scored for scored in chunk.scored)
        row += chunk.length
        if chunk.samples:
            found.sampled.append(row - 1)
    return found


def base_and_adapted(chunk: Chunk) -> list[int]:
    """The bounds of the parts of a chunk that attend separately: the base's tokens, and the adapted ones.

    Under one mask the base's part would read the adapted one: an infinity there, though masked, would become NaN in K/V
    that other requests share.
    """
    start, stop, invocation_start = chunk.start, chunk.start + chunk.length, chunk.request.invocation_start
    if chunk.request.adapter is not None and start < invocation_start < stop:
        return [start, invocation_start, stop]
    return [start, stop]
