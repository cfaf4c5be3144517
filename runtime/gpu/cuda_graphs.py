"""CUDA graphs of decode steps: one for each size of batch, with adapters and without."""

import logging
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernels.lora_tiles import most_tiles
from runtime.gpu.step_inputs import StepShape
from runtime.gpu.tiled_lora import DECODE_HEIGHT

log = logging.getLogger(__name__)

Replay = Callable[[], Tensor]
Capture = Callable[[Callable[[], Tensor]], Replay]

MOST_RANKS = 192  # at a site, which a graph has programs for: r64 on q, k and v. Wider adapters run without a graph.
WARM_UP_RUNS = 2  # that compile what is captured, and let libraries take their workspaces


class DecodeGraphs:
    """Graphs for decode steps of up to `most` requests, and which of them a step fits into when it is padded.

    `forward(shape, width)` runs what lies in the step's buffer, and `lay_out_nothing(shape)` has it hold padding alone,
    so that captures write no K/V; `capture` makes a replay of a call. Every graph reads the buffer where a step of its
    shape is written. A graph without adapters is that of an engine without LoRA; those with them have no programs for
    the head, whose columns are so many that even idle ones cost: a step with an adapter of it runs without a graph.
    """

    def __init__(
        self,
        forward: Callable[[StepShape, int], Tensor],
        lay_out_nothing: Callable[[StepShape], None],
        most: int,
        table_width: int,
        lora_width: int,
        capture: Capture,
    ) -> None:
        self._table_width, self.width = table_width, min(lora_width, MOST_RANKS)
        self._sizes = list(sizes(most))
        self._graphs: dict[StepShape, Replay] = {}
        started = time.monotonic()
        for size in reversed(self._sizes):  # the largest first: the others find room in its memory
            for adapted in (False, True):
                shape = self._shape(size, adapted=adapted)
                lay_out_nothing(shape)
                self._graphs[shape] = capture(lambda shape=shape: forward(shape, self.width))  # type: ignore[misc]
        seconds = time.monotonic() - started
        log.info("captured %d CUDA graphs in %.1f s; torch holds %d MiB", len(self._graphs), seconds, _reserved_mib())

    def padded(self, shape: StepShape, width: int) -> StepShape:
        """The shape of the smallest graph that a step fits into; its own if there is none."""
        fits = shape.decodes <= self._sizes[-1] and not shape.prefills and not shape.logit_tiles
        if not fits or self._too_wide(shape, width):
            return shape
        return self._shape(next(size for size in self._sizes if shape.decodes <= size), adapted=shape.tiles > 0)

    def of(self, shape: StepShape, width: int) -> Replay | None:
        """The graph for exactly this shape, if there is one and it has programs for all `width` ranks."""
        return None if self._too_wide(shape, width) else self._graphs.get(shape)

    def _too_wide(self, shape: StepShape, width: int) -> bool:
        return shape.tiles > 0 and width > self.width

    def _shape(self, size: int, *, adapted: bool) -> StepShape:
        tiles = most_tiles(size, size, DECODE_HEIGHT) if adapted else 0
        return StepShape(size, size, 0, self._table_width, size, tiles, 0, DECODE_HEIGHT)


def sizes(most: int) -> Iterator[int]:
    """Batch sizes that graphs are captured for: powers of two and, from 16 on, what lies half-way between two."""
    size = 1
    while size < most:
        yield size
        if size >= 16 and size * 3 // 2 < most:
            yield size * 3 // 2
        size *= 2
    yield most


def _reserved_mib() -> int:
    return torch.cuda.memory_reserved() >> 20 if torch.cuda.is_available() else 0


def capture_on_cuda(device: torch.device) -> Capture:
    """Captures share a stream, a pool of memory and the tensor of their logits: one of their graphs runs at a time.

    The first one is the largest.
    """
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
    results: list[Tensor] = []

    def capture(call: Callable[[], Tensor]) -> Replay:
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                logits = call()
            if not results:
                results.append(torch.empty_like(logits))
        torch.cuda.current_stream(device).wait_stream(stream)
        graph, out = torch.cuda.CUDAGraph(), results[0][: len(logits)]
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            out.copy_(call())

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    return capture
