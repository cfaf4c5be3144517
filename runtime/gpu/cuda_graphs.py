"""CUDA graphs of decode steps: one for each batch size, with adapters and without."""

import logging
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from kernels.lora_tiles import most_tiles
from runtime.gpu.step_inputs import StepShape
from runtime.gpu.step_lora import DECODE_HEIGHT

log = logging.getLogger(__name__)

Replay = Callable[[], Tensor]
Capture = Callable[[Callable[[], Tensor]], Replay]

MOST_RANKS = 192  # ranks at a site that a graph has programs for: r64 on q, k and v. Wider adapters run without graphs.
WARM_UP_RUNS = 2  # runs before a capture, in which kernels are compiled and libraries allocate their workspaces


class DecodeGraphs:
    """Graphs for decode steps of up to `most` requests, and the choice of the graph that a step is padded to.

    `forward(shape, width)` runs the step in the step buffer. `lay_out_nothing(shape)` fills that buffer with padding,
    so that captures write no K/V. `capture` turns a call into a replay. Every graph reads the addresses at which a
    step of its shape is written. A graph without adapters equals that of an engine without LoRA. Graphs with adapters
    have no programs for the head: it has so many columns that even idle programs cost time, so a step with an adapter
    of the head runs without a graph.
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
        self._table_width = table_width
        self.width = min(lora_width, MOST_RANKS)  # ranks at a site that the graphs have programs for
        self._sizes = list(sizes(most))
        self._graphs: dict[StepShape, Replay] = {}
        started = time.monotonic()
        for size in reversed(self._sizes):  # the largest first: the others reuse its memory
            for adapted in (False, True):
                shape = self._shape(size, adapted=adapted)
                lay_out_nothing(shape)
                self._graphs[shape] = capture(partial(forward, shape, self.width))
        seconds = time.monotonic() - started
        log.info("captured %d CUDA graphs in %.1f s; torch holds %d MiB", len(self._graphs), seconds, _reserved_mib())

    def padded(self, shape: StepShape, width: int) -> StepShape:
        """The shape of the smallest graph that a step fits into; the step's own shape if there is none."""
        fits = shape.decodes <= self._sizes[-1] and not shape.prefills and not shape.logit_tiles
        if not fits or self._too_wide(shape, width):
            return shape
        return self._shape(next(size for size in self._sizes if shape.decodes <= size), adapted=shape.tiles > 0)

    def of(self, shape: StepShape, width: int) -> Replay | None:
        """The graph for exactly this shape, if there is one and it has programs for `width` ranks."""
        return None if self._too_wide(shape, width) else self._graphs.get(shape)

    def _too_wide(self, shape: StepShape, width: int) -> bool:
        return shape.tiles > 0 and width > self.width

    def _shape(self, size: int, *, adapted: bool) -> StepShape:
        tiles = most_tiles(size, size, DECODE_HEIGHT) if adapted else 0
        return StepShape(size, size, 0, self._table_width, size, tiles, 0, DECODE_HEIGHT)


def sizes(most: int) -> Iterator[int]:
    """Batch sizes of graphs: powers of two, from 16 on the sizes half-way between two of them, and `most`."""
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
    """Captures that share a stream, a memory pool and the tensor of their logits; one of their graphs runs at a time.

    The first capture must be the largest.
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
