"""The model on Triton kernels: on a CUDA device, or in Triton's interpreter for tests."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels import tuned
from kernels.interpreter import can_run_on
from kernels.lora_tiles import BASE, count_tiles, most_tiles
from runtime.adapters.cut_layout import CutLayout
from runtime.adapters.layout import AdapterLayout, layout_without_weights
from runtime.adapters.torch_base import TorchBase
from runtime.config import EngineConfig, gib
from runtime.gpu import card as cards
from runtime.gpu import warm_up
from runtime.gpu.adapter_table import AdapterRow, AdapterTable
from runtime.gpu.block_tables import BlockTables
from runtime.gpu.card import Card
from runtime.gpu.cuda_graphs import Capture, Replay, StepGraphs, capture_on_cuda, graph_shapes
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
from runtime.parallel.group import RankGroup
from runtime.request import Request
from runtime.runner import ResidentAdapters, Results, Runner
from runtime.sampler import with_scores
from runtime.scheduler import SCORED_ROWS, Chunk

_log = logging.getLogger(__name__)

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

    def __init__(
        self,
        config: EngineConfig,
        device: torch.device,
        group: RankGroup | None = None,
        card: Card | None = None,
    ):
        """Sizes that are not set are those for a CPU, or follow from the memory of `card`."""
        if not can_run_on(device):
            raise ValueError(
                "kernels (--kernels) triton need a CUDA device; TRITON_INTERPRET=1 interprets them on a CPU"
            )
        super().__init__(config, device, group, sized=card is None)
        self.adapter_dtype = self.dtype
        self.gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self._placed = DeviceWeights(self.weight_dtype, device, self.gpu)
        try:
            weights = self._placed.load(self.checkpoint)
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"the GPU has too little memory for the model's weights: {reason}") from None
        self.weights_held = self._held(self._placed.description)
        self.adapter_layout = self._lay_out(layout_without_weights, TorchBase(self.part, weights))
        del self.checkpoint
        length = self.max_model_len
        self.decoder = FusedDecoder(self.part, weights, config.block_size, length, self.gpu, self.group)
        self.graphs: StepGraphs | None = None
        self._lora_width = STACKED * config.max_lora_rank
        self._chosen = 1 if self.model.experts is None else self.model.experts.chosen
        self._carried: dict[Request, int] = {}  # the row of each request in `_tokens`
        self._samples: DeviceSamples | None = None  # of the last step
        self._overlap = config.overlap and self.group.size == 1  # other ranks have no tokens but those they are told
        self._wants_graphs = config.cuda_graphs and device.type == "cuda"
        self._card, self._stream = card, torch.cuda.current_stream(device) if device.type == "cuda" else None
        if card is not None:
            self._size_by(card, config)
            self.allocate_kv()

    def _size_by(self, card: Card, config: EngineConfig) -> None:
        """Choose the sizes that are not set by the memory that the weights and the largest step leave."""
        self.sizes, token_bytes = cards.most_sizes(config), self.block_bytes // self.block_size
        if not cards.is_sized_by_card(config):
            self.size(cards.with_requests(self.sizes, config, token_bytes))
            return
        cards.allowed_bytes(config, card)
        self.num_blocks = 1  # of zeros, which padding reads
        self.allocate_kv()
        self._reserve(torch.zeros(1, dtype=self.adapter_dtype, device=self.device))
        running = self.sizes.max_running
        decodes = StepShape(running, running, 0, self._table_width, running, 0, 0, DECODE_HEIGHT)
        with self.allocating():
            step = card.peak_bytes(self._run_largest)
            graphs = card.peak_bytes(lambda: self._run(decodes)) + cards.GRAPH_BYTES if self._wants_graphs else 0
        needs = cards.Needs(card.taken_bytes(), step, graphs)
        least = (config.max_model_len or 1) + self.block_size  # and the block of zeros
        self.size(cards.sizes_of(config, card, needs, token_bytes, least))
        _log.info("%s", cards.account(config, card, needs, self.sizes, token_bytes))

    def _reserve(self, arena: Tensor) -> None:
        """Allocate what steps of these sizes read and write besides weights and K/V."""
        _, _, running, tokens = self.sizes
        rows = tokens + running  # graphs of prompts pad decodes and prompts apart
        self.decoder.longest = self.max_model_len
        self._table_width = -(-self.max_model_len // self.block_size)
        largest = StepShape.largest(rows, running, self._table_width, DECODE_HEIGHT, SCORED_ROWS)
        self._buffer = StepBuffer(largest.total, self.device)
        self._block_tables = BlockTables(self._table_width, self.block_size)
        self._tokens = torch.zeros(running, dtype=torch.int64, device=self.device)  # sampled by the last step
        self._table = AdapterTable(self.part.sites(), 2 * running, self._lora_width, self.device)
        self._hot = HotAdapters(self.decoder.linears, len(self._table.rows), self.device)
        self._memory = LoraMemory.of(
            self.part, arena, self._table.rows, self._hot.by_slot, rows, running, self._lora_width
        )

    def start(self, adapters: ResidentAdapters) -> None:
        """Reserve device memory for the adapters of a step, compile kernels and capture graphs."""
        self._adapters = adapters
        with self.allocating():
            self._reserve(adapters.arena)
            if self.device.type == "cuda":
                self.warm_up()
            if self._wants_graphs:
                self.graphs = self.step_graphs(capture_on_cuda(self.device, self.group))
        if self._card is not None:
            _log.info("the engine has taken %s of the GPU's memory", gib(self._card.taken_bytes()))

    def warm_up(self) -> None:
        """Compile every kernel that a step may launch, in each configuration, so that no request waits for that.

        The last step is the largest: what it needs of libraries and memory is there when the first long prompt comes.
        """
        rows = warm_up.Rows(tuned.thresholds(self.gpu), self._chosen)
        for shape in warm_up.shapes(self.sizes, rows, self._table_width, self._lora_width):
            logits = self._run(shape)
        self._placed.warm_up()
        for count in rows.up_to(self.sizes.max_running):
            warm_up_sampling(logits[:count], self.gpu)

    def _run_largest(self) -> None:
        logits = self._run(warm_up.largest(self.sizes, self._table_width, self._lora_width))
        warm_up_sampling(logits[: self.sizes.max_running], self.gpu)

    def _run(self, shape: StepShape) -> Tensor:
        """The logits of a step of padding, which writes no K/V."""
        self._write_step([], shape, NO_ROWS)
        return self.forward(shape)

    def step_graphs(self, capture: Capture) -> StepGraphs:
        """Graphs of `forward`."""

        def lay_out_nothing(shape: StepShape) -> None:
            self._write_step([], shape, NO_ROWS)

        _, _, running, tokens = self.sizes
        shapes = graph_shapes(running, tokens, self._table_width, self._lora_width, bool(self._hot))
        return StepGraphs(self.forward, lay_out_nothing, shapes, capture)

    def prepare(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        self._refuse_other_streams()
        ordered = sorted(chunks, key=lambda chunk: (chunk.length > 1, chunk.request.adapter or "", len(chunk.request)))
        names = [_adapter_of(chunk) for chunk in ordered]
        adapters = {name: self._row_of(name) for name in dict.fromkeys(names) if name is not None}
        slots = slots_of_rows(ordered, [BASE if name is None else adapters[name].slot for name in names])
        shape = self._shape(ordered, adapters, slots)
        self._write_step(ordered, shape, slots)
        sampling = [chunk.request for chunk in ordered if chunk.samples]
        self.prepared = PreparedStep(shape, sampling, ordered, sum(len(chunk.scored) for chunk in ordered))
        return ordered

    def _refuse_other_streams(self) -> None:
        """Steps, graphs and the events that copies wait for have an order on one stream only."""
        if self._stream is not None and torch.cuda.current_stream(self.device) != self._stream:
            raise RuntimeError("the engine was started under another torch.cuda.stream than it is called under now")

    def _row_of(self, adapter: str) -> AdapterRow:
        layout, first = self._adapters.placement(adapter)
        layout = layout.part if isinstance(layout, CutLayout) else layout
        assert isinstance(layout, AdapterLayout)
        return self._table.row_of(adapter, layout, first)

    def _shape(self, chunks: Sequence[Chunk], adapters: Mapping[str, AdapterRow], slots: IntArray) -> StepShape:
        """The shape of a step, or that of the graph that it is padded to."""
        decodes = count_decodes(chunks)
        height = tile_height(decodes, len(slots))
        # A graph pads decodes, and so no tile has rows of both kinds
        kinds = (slots[:decodes], slots[decodes:]) if adapters else ()
        tiles = sum(count_tiles(rows, height) for rows in kinds if len(rows))
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

    def _write_step(self, chunks: Sequence[Chunk], shape: StepShape, slots: IntArray) -> None:
        tables, out = self._block_tables.of(chunks), self._buffer.on_host(shape)
        write_step(chunks, shape, self.block_size, tables, slots, out, self._carried)
        self._buffer.upload(shape, longest_table(chunks, self.block_size))

    @torch.inference_mode()
    def compute(self) -> Tensor:
        return self.forward_pass()()

    @torch.inference_mode()
    def launch(self) -> tuple[Results, bool]:
        _, sampling, chunks, scored = self.prepared
        logits = self.compute()
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
        lora = StepLora(self.part, self._memory, step, shape, self.gpu) if shape.tiles else None
        return self.decoder.forward(step, self.kv.layers, lora)


def _adapter_of(chunk: Chunk) -> str | None:
    """The adapter that a chunk has rows under, by digest."""
    request, start, length, _ = chunk
    return request.adapter if start + length > request.invocation_start else None
