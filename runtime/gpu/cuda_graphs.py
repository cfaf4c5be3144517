"""CUDA graphs of steps: which there are, with adapters and without, and which of them a step is padded to."""

import logging
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from kernels.lora_tiles import most_tiles
from runtime.gpu.hot_adapters import HOT_ADAPTERS
from runtime.gpu.step_inputs import StepShape
from runtime.gpu.step_lora import DECODE_HEIGHT, PREFILL_HEIGHT
from runtime.parallel.group import RankGroup

log = logging.getLogger(__name__)

Replay = Callable[[], Tensor]
Capture = Callable[[Callable[[], Tensor]], Replay]

RANKS = (48, 192)  # at a site: r16 and r64 on q, k and v. The widest graphs have as many as an adapter may have
PROMPT_TOKENS = (64, 128, 256, 512)  # of all prompts in a step; what has more keeps the device busy without a graph
FEW_DECODES = 64  # beside prompts
FEW_RUNS = 8  # of rows under adapters, beside prompts
WARM_UP_RUNS = 2  # runs before a capture, in which kernels are compiled and libraries allocate their workspaces


class StepGraphs:
    """Graphs for steps of these shapes, and the choice of the graph that a step is padded to.

    `forward(shape)` runs the step in the step buffer. `lay_out_nothing(shape)` fills that buffer with padding, so that
    captures write no K/V. `capture` turns a call into a replay. Every graph reads the addresses at which a step of its
    shape is written. A graph without adapters equals that of an engine without LoRA.
    """

    def __init__(
        self,
        forward: Callable[[StepShape], Tensor],
        lay_out_nothing: Callable[[StepShape], None],
        shapes: Iterator[StepShape],
        capture: Capture,
    ) -> None:
        self._graphs: dict[StepShape, Replay] = {}
        self._shapes: dict[tuple[bool, bool], list[StepShape]] = {}
        started = time.monotonic()
        for shape in sorted(shapes, key=_rows, reverse=True):  # the largest first: the others reuse its memory
            lay_out_nothing(shape)
            self._graphs[shape] = capture(partial(forward, shape))
        for shape in sorted(self._graphs, key=_cost):
            self._shapes.setdefault(_kind(shape), []).append(shape)
        seconds = time.monotonic() - started
        log.info("captured %d CUDA graphs in %.1f s; torch holds %d MiB", len(self._graphs), seconds, _reserved_mib())

    def padded(self, shape: StepShape) -> StepShape:
        """The shape of the cheapest graph that a step fits into; the step's own shape if there is none."""
        return next((graph for graph in self._shapes.get(_kind(shape), ()) if _fits(shape, graph)), shape)

    def of(self, shape: StepShape) -> Replay | None:
        """The graph for exactly this shape, if there is one."""
        return self._graphs.get(shape)


def graph_shapes(
    most: int, most_tokens: int, table_width: int, lora_ranks: int, hot: bool = True
) -> Iterator[StepShape]:
    """The shapes of graphs for steps of up to `most` requests and `most_tokens` tokens, besides padding.

    `lora_ranks` are the most that an adapter may have at a site; `hot`: adapters of low rank can be. With adapters
    there are several of each size, as even idle programs cost time. None has programs for the head: it has so many
    columns that a step with an adapter of the head runs without a graph.
    """
    for size in sizes(most):
        base = StepShape(size, size, 0, table_width, size, 0, 0, DECODE_HEIGHT)
        yield base
        yield from _adapted(base, _tile_counts(size), lora_ranks, hot)
    buckets = [tokens for tokens in PROMPT_TOKENS if tokens < most_tokens] + [min(PROMPT_TOKENS[-1], most_tokens)]
    for tokens in dict.fromkeys(buckets):
        for decodes in sorted({0, min(FEW_DECODES, most), most}):
            prefills = min(most, max(tokens // 2, 1))  # each has two rows at least
            logits = min(most, decodes + prefills)
            base = StepShape(decodes + tokens, decodes, prefills, table_width, logits, 0, 0, PREFILL_HEIGHT)
            yield base
            counts = {most_tiles(base.tokens, min(runs, most), PREFILL_HEIGHT) for runs in (FEW_RUNS, most)}
            yield from _adapted(base, sorted(counts), lora_ranks, hot)


def sizes(most: int) -> Iterator[int]:
    """Batch sizes of graphs: powers of two, from 16 on the sizes half-way between two of them, and `most`."""
    size = 1
    while size < most:
        yield size
        if size >= 16 and size * 3 // 2 < most:
            yield size * 3 // 2
        size *= 2
    yield most


def _tile_counts(size: int) -> list[int]:
    """Tiles of graphs of `size` decodes: as few as their rows need, four times as many and so on, and one for each."""
    counts = [most_tiles(size, 1, DECODE_HEIGHT)]
    while counts[-1] * 4 < size:
        counts.append(counts[-1] * 4)
    return sorted({*counts, size})


def _adapted(base: StepShape, counts: list[int], lora_ranks: int, hot: bool) -> Iterator[StepShape]:
    """The shapes with adapters: for counts of tiles, and for ranks at a site.

    Where adapters can be hot, those of few ranks that are not are many, and those that are need no more tiles than so
    many do. Only the last shape has programs for the embedding, which few adapters adapt.
    """
    few, *others = sorted({min(ranks, lora_ranks) for ranks in RANKS})
    if hot:
        most = most_tiles(base.tokens, HOT_ADAPTERS, base.height)
        for tiles in sorted({min(tiles, most) for tiles in counts}):
            yield base._replace(tiles=tiles, ranks=few, hot=True)
    for tiles in counts:
        if not hot or tiles > HOT_ADAPTERS or tiles == counts[-1]:
            yield base._replace(tiles=tiles, ranks=few)
    yield from (base._replace(tiles=tiles, ranks=ranks) for ranks in others for tiles in counts)
    if lora_ranks > RANKS[-1]:
        yield base._replace(tiles=counts[-1], ranks=lora_ranks)
    yield base._replace(tiles=counts[-1], ranks=lora_ranks, embedding=True)


def _kind(shape: StepShape) -> tuple[bool, bool]:
    return shape.prefills > 0, shape.tiles > 0


def _rows(shape: StepShape) -> tuple[int, int]:
    return shape.tokens, shape.logits


def _cost(shape: StepShape) -> tuple[int, bool, int, bool]:
    return shape.tokens, not shape.hot, shape.tiles * shape.ranks, shape.embedding


def _fits(step: StepShape, graph: StepShape) -> bool:
    """Whether a step of the same kind can be padded to a graph."""
    return (
        step.decodes <= graph.decodes
        and step.prompt_tokens <= graph.prompt_tokens
        and step.prefills <= graph.prefills
        and step.logits <= graph.logits
        and step.tiles <= graph.tiles
        and step.ranks <= graph.ranks
        and step.embedding <= graph.embedding
        and graph.hot <= step.hot
        and not step.logit_tiles
    )


def _reserved_mib() -> int:
    return torch.cuda.memory_reserved() >> 20 if torch.cuda.is_available() else 0


def capture_on_cuda(device: torch.device, group: RankGroup) -> Capture:
    """Captures that share a stream, a memory pool and a tensor of logits; one of their graphs runs at a time.

    What a graph gives to calls of `group` is counted at each replay.
    """
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
    results: list[Tensor] = []

    def capture(call: Callable[[], Tensor]) -> Replay:
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                logits = call()
            if not results or len(results[-1]) < len(logits):
                results.append(torch.empty_like(logits))
        torch.cuda.current_stream(device).wait_stream(stream)
        graph, out = torch.cuda.CUDAGraph(), results[-1][: len(logits)]
        before = group.bytes_sent
        # Of this thread alone: others of the process may copy adapters meanwhile
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            out.copy_(call())
        sent = group.bytes_sent - before

        def replay() -> Tensor:
            graph.replay()
            group.bytes_sent += sent
            return out

        return replay

    return capture
