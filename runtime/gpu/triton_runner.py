"""The model on Triton kernels: on a CUDA device, or in Triton's interpreter for tests."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.interpreter import can_run_on
from kernels.lora_tiles import BASE, count_tiles, most_tiles
from kernels.paged_attention import LEAST_SEQUENCES
from runtime.adapters.layout import AdapterLayout, layout_without_weights
from runtime.adapters.pool import AdapterPool
from runtime.adapters.torch_base import TorchBase
from runtime.config import EngineConfig
from runtime.gpu.adapter_table import AdapterRow, AdapterTable
from runtime.gpu.block_tables import BlockTables
from runtime.gpu.cuda_graphs import Capture, Replay, StepGraphs, capture_on_cuda, graph_shapes, sizes
from runtime.gpu.device_sampler import DeviceSamples, warm_up_sampling
from runtime.gpu.fused_decoder import FusedDecoder
from runtime.gpu.hot_adapters import HotAdapters
from runtime.gpu.packed_linear import DeviceWeights
from runtime.gpu.step_inputs import (
    IntArray,
    StepBuffer,
    StepShape,
    count_decodes,
    longest_table,
    slots_of_rows,
    step_shape,
    write_step,
)
from runtime.gpu.step_lora import DECODE_HEIGHT, LoraMemory, StepLora, tile_height
from runtime.request import Request
from runtime.runner import Results, Runner
from runtime.sampler import with_scores
from runtime.scheduler import SCORED_ROWS, Chunk

NO_ROWS = np.empty(0, np.int32)
STACKED = 3  # modules of one site, q, k and v: the ranks of a site are up to this many times those of a module


class PreparedStep(NamedTuple):
    """The step in the step buffer."""

    shape: StepShape
    sampling: list[Request]  # the requests whose next token it samples, in the order of its logits
    chunks: list[Chunk]
    scored: int  # rows of logits after those, which score prompts


class TritonRunner(Runner):
    """Runs the model with the Triton kernels; steps replay CUDA graphs if any fit."""

    kernels = "triton"
    keeps_quantized = True

    def __init__(self, config: EngineConfig, device: torch.device):
        if not can_run_on(device):
            raise ValueError(
                "kernels (--kernels) triton need a CUDA device; TRITON_INTERPRET=1 interprets them on a CPU"
            )
        super().__init__(config, device)
        self.adapter_dtype = self.dtype
        self.gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self._placed = DeviceWeights(self.weight_dtype, device, self.gpu)
        weights = self._placed.load(self.checkpoint)
        del self.checkpoint
        self.weights_held = self._held(self._placed.description)
        self.adapter_layout = partial(layout_without_weights, base=TorchBase(self.model, weights))
        self.decoder = FusedDecoder(self.model, weights, config.block_size, self.max_model_len, self.gpu)
        self.graphs: StepGraphs | None = None
        self._max_running, self._max_tokens = config.max_running, config.max_batch_tokens
        self._lora_width = STACKED * config.max_lora_rank
        self._table_width = -(-self.max_model_len // config.block_size)
        rows = self._max_tokens + self._max_running  # graphs of prompts pad decodes and prompts apart
        largest = StepShape.largest(rows, self._max_running, self._table_width, DECODE_HEIGHT, SCORED_ROWS)
        self._buffer = StepBuffer(largest.total, device)
        self._block_tables = BlockTables(self._table_width, config.block_size)
        self._tokens = torch.zeros(config.max_running, dtype=torch.int64, device=device)  # sampled by the last step
        self._carried: dict[Request, int] = {}  # the row of each request in `_tokens`
        self._samples: DeviceSamples | None = None  # of the last step
        self._overlap = config.overlap
        self._wants_graphs = config.cuda_graphs and device.type == "cuda"

    def start(self, adapters: AdapterPool) -> None:
        """Reserve device memory for the adapters of a step, compile kernels and capture graphs."""
        self._adapters = adapters
        self._table = AdapterTable(self.model.sites(), 2 * self._max_running, self._lora_width, self.device)
        rows = self._max_tokens + self._max_running
        self._hot = HotAdapters(self.decoder.linears, len(self._table.rows), self.device)
        self._memory = LoraMemory.of(
            self.model, adapters.arena, self._table.rows, self._hot.by_slot, rows, self._max_running, self._lora_width
        )
        if self.device.type == "cuda":
            self.warm_up()
        if self._wants_graphs:
            self.graphs = self.step_graphs(capture_on_cuda(self.device))

    def warm_up(self) -> None:
        """Compile every kernel that a step may launch, so that no request waits for the compiler."""
        for decodes, prefills in self._steps_to_compile():
            rows = decodes + prefills
            height = tile_height(decodes, rows)
            base = StepShape(rows, decodes, prefills, self._table_width, rows, 0, 0, height)
            tiles = most_tiles(rows, rows, height)
            adapted = base._replace(tiles=tiles, logit_tiles=tiles, ranks=self._lora_width, embedding=True)
            for shape in (base, adapted, adapted._replace(hot=True)):
                self._lay_out([], shape, NO_ROWS)
                logits = self.forward(shape)
        self._placed.warm_up()
        warm_up_sampling(logits, self.gpu)

    def _steps_to_compile(self) -> Iterator[tuple[int, int]]:
        """(decodes, prefills) of steps that together use every compiled version of the kernels."""
        yield from ((size, 0) for size in sizes(self._max_running))
        yield 0, 1
        prefills = LEAST_SEQUENCES
        while prefills <= min(self._max_running, self._max_tokens):
            yield 0, prefills
            prefills *= 2

    def step_graphs(self, capture: Capture) -> StepGraphs:
        """Graphs of `forward`."""

        def lay_out_nothing(shape: StepShape) -> None:
            self._lay_out([], shape, NO_ROWS)

        shapes = graph_shapes(self._max_running, self._max_tokens, self._table_width, self._lora_width, bool(self._hot))
        return StepGraphs(self.forward, lay_out_nothing, shapes, capture)

    def prepare(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        ordered = sorted(chunks, key=lambda chunk: (chunk.length > 1, chunk.request.adapter or "", len(chunk.request)))
        names = [_adapter_of(chunk) for chunk in ordered]
        adapters = {name: self._row_of(name) for name in dict.fromkeys(names) if name is not None}
        slots = slots_of_rows(ordered, [BASE if name is None else adapters[name].slot for name in names])
        shape = self._shape(ordered, adapters, slots)
        self._lay_out(ordered, shape, slots)
        sampling = [chunk.request for chunk in ordered if chunk.samples]
        self.prepared = PreparedStep(shape, sampling, ordered, sum(len(chunk.scored) for chunk in ordered))
        return ordered

    def _row_of(self, adapter: str) -> AdapterRow:
        layout, first = self._adapters.placement(adapter)
        assert isinstance(layout, AdapterLayout)
        return self._table.row_of(adapter, layout, first)

    def _shape(self, chunks: Sequence[Chunk], adapters: Mapping[str, AdapterRow], slots: IntArray) -> StepShape:
        """The shape of a step, or that of the graph that it is padded to."""
        decodes = count_decodes(chunks)
        height = tile_height(decodes, len(slots))
        # A graph pads decodes, and so no tile has rows of both kinds
        tiles = count_tiles(slots[:decodes], height) + count_tiles(slots[decodes:], height)
        shape = step_shape(chunks, self.block_size, tiles, height)
        if adapters:
            shape = self._with_adapters(shape, adapters)
        return shape if self.graphs is None else self.graphs.padded(shape)

    def _with_adapters(self, shape: StepShape, adapters: Mapping[str, AdapterRow]) -> StepShape:
        of_head, embedding = (
            any(site in adapter.sites for adapter in adapters.values())
            for site in (self.model.lm_head_site, self.model.embed_site)
        )
        # Sampled rows and scored ones lie apart, and a request may have a run of each
        runs = 2 * (shape.decodes + shape.prefills)
        return shape._replace(
            logit_tiles=most_tiles(shape.logits, runs, shape.height) if of_head else 0,
            ranks=max(adapter.ranks for adapter in adapters.values()),
            embedding=embedding,
            hot=not of_head and not embedding and self._hot.heat(adapters, self._memory.arena),
        )

    def _lay_out(self, chunks: Sequence[Chunk], shape: StepShape, slots: IntArray) -> None:
        tables, out = self._block_tables.of(chunks), self._buffer.on_host(shape)
        write_step(chunks, shape, self.block_size, tables, slots, out, self._carried)
        self._buffer.upload(shape, longest_table(chunks, self.block_size))

    @torch.inference_mode()
    def launch(self) -> tuple[Results, bool]:
        _, sampling, chunks, scored = self.prepared
        logits = self.forward_pass()()
        with self._told(sampling):
            samples = DeviceSamples(logits[: len(sampling)], sampling, self.gpu)
        self._tokens[: len(sampling)] = samples.chosen.clamp(min=0)
        self._samples, self._carried = samples, {request: index for index, request in enumerate(sampling)}
        if not scored:
            return samples.wait, self._overlap
        of_prompts = logits[len(sampling) : len(sampling) + scored]
        return lambda: with_scores(chunks, samples.wait(), of_prompts), False

    @contextmanager
    def _told(self, requests: Sequence[Request]) -> Iterator[None]:
        """Let requests whose next token depends on all others know that of the last step, which is not committed.

        The host waits for that step while the device computes the next one. Of a request that the token ends, the step
        is in vain: it is sampled from as before.
        """
        pending = [request for request in requests if request.pending and request.needs_tokens]
        token_ids = self._samples.token_ids if self._samples is not None and pending else []
        told = []
        for request in pending:
            token_id = max(token_ids[self._carried[request]], 0)
            if token_id not in request.stop_ids:
                request.tell(token_id)
                told.append(request)
        try:
            yield
        finally:
            for request in told:
                request.untell()

    def forward_pass(self) -> Replay:
        """The forward pass of the prepared step: its CUDA graph, or a call of `forward`.

        Another run writes K/V to the same slots.
        """
        shape = self.prepared.shape
        graph = None if self.graphs is None else self.graphs.of(shape)
        return graph or partial(self.forward, shape)

    @torch.inference_mode()
    def forward(self, shape: StepShape) -> Tensor:
        """The logits of the step in the buffer, of this shape."""
        step = self._buffer.on_device(shape)
        carried = self._tokens[(-1 - step.token_ids).clamp(min=0)]  # see StepInputs.token_ids
        step = step._replace(token_ids=torch.where(step.token_ids < 0, carried, step.token_ids))
        lora = StepLora(self.model, self._memory, step, shape, self.gpu) if shape.tiles else None
        return self.decoder.forward(step, self.kv.layers, lora)


def _adapter_of(chunk: Chunk) -> str | None:
    """The adapter that a chunk has rows under, by digest."""
    request, start, length, _ = chunk
    return request.adapter if start + length > request.invocation_start else None
