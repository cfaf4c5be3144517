"""Steps that together use every compiled version of the kernels that a step may use."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kernels.lora_tiles import most_tiles
from kernels.paged_attention import LEAST_SEQUENCES
from runtime.config import Sizes
from runtime.gpu.cuda_graphs import sizes as graph_sizes
from runtime.gpu.step_inputs import StepShape
from runtime.gpu.step_lora import tile_height
from runtime.scheduler import SCORED_ROWS


class Rows(NamedTuple):
    """The batches at which launch configurations change, and that of the largest step."""

    thresholds: Sequence[int]  # the batches that configurations were measured for
    chosen: int  # experts of each token: their kernels have so many rows for each

    def up_to(self, most: int) -> list[int]:
        """Batches of at most `most` rows, in rising order, among which is one for each configuration."""
        found = {1, most, *self.thresholds, *(each // self.chosen for each in self.thresholds)}
        return sorted({min(max(each, 1), most) for each in found})


def shapes(sizes: Sizes, rows: Rows, table_width: int, lora_ranks: int) -> Iterator[StepShape]:
    """Shapes of steps without adapters, with any and with hot ones, the largest step last."""
    # How many programs share a context depends on the decodes, and not on a table
    for decodes in sorted({*rows.up_to(sizes.max_running), *graph_sizes(sizes.max_running)}):
        yield from _kinds(decodes, 0, decodes, sizes, table_width, lora_ranks)
    sequences = 1
    while sequences <= sizes.max_running:
        for tokens in rows.up_to(sizes.max_batch_tokens):
            if tokens >= sequences:
                yield from _kinds(0, sequences, tokens, sizes, table_width, lora_ranks)
        sequences = max(2 * sequences, LEAST_SEQUENCES)
    yield largest(sizes, table_width, lora_ranks)


def largest(sizes: Sizes, table_width: int, lora_ranks: int) -> StepShape:
    """The step that takes the most memory."""
    *_, adapted = _kinds(0, 1, sizes.max_batch_tokens, sizes, table_width, lora_ranks)
    return adapted


def _kinds(
    decodes: int, prefills: int, tokens: int, sizes: Sizes, table_width: int, lora_ranks: int
) -> Iterator[StepShape]:
    height = tile_height(decodes, tokens)
    logits = min(tokens, sizes.max_running + SCORED_ROWS)
    tiles = most_tiles(tokens, sizes.max_running, height)
    logit_tiles = most_tiles(logits, 2 * sizes.max_running, height)
    base = StepShape(tokens, decodes, prefills, table_width, logits, 0, 0, height)
    adapted = base._replace(tiles=tiles, logit_tiles=logit_tiles, ranks=lora_ranks, embedding=True)
    yield from (base, adapted, adapted._replace(hot=True))
