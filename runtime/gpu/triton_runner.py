"""The model on Triton kernels: on a CUDA device, or in Triton's interpreter for tests."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.interpreter import can_run_on
from kernels.lora_tiles import BASE, most_tiles
from kernels.paged_attention import LEAST_SEQUENCES
from runtime.adapters.layout import AdapterLayout, layout_without_weights
from runtime.adapters.pool import AdapterPool
from runtime.adapters.torch_base import TorchBase
from runtime.config import EngineConfig
from runtime.gpu.adapter_table import AdapterTable, widest
from runtime.gpu.cuda_graphs import Capture, DecodeGraphs, Replay, capture_on_cuda, sizes
from runtime.gpu.device_sampler import DeviceSamples, warm_up_sampling
from runtime.gpu.fused_decoder import FusedDecoder
from runtime.gpu.packed_linear import DeviceWeights
from runtime.gpu.step_inputs import StepBuffer, StepShape, step_shape, write_step
from runtime.gpu.step_lora import DECODE_HEIGHT, LoraMemory, StepLora, tile_height
from runtime.request import Request
from runtime.runner import Results, Runner
from runtime.sampler import with_scores
from runtime.scheduler import SCORED_ROWS, Chunk

STACKED = 3  # modules of one site, q, k and v: the ranks of a site are up to this many times those of a module


class PreparedStep(NamedTuple):
    """The step in the step buffer."""

    shape: StepShape
    width: int  # the most ranks of its adapters at a site
    sampling: list[Request]  # the requests whose next token it samples, in the order of its logits
    chunks: list[Chunk]
    scored: int  # rows of logits after those, which score prompts


class TritonRunner(Runner):
    """Runs the model with the Triton kernels; decode steps replay CUDA graphs if any fit."""

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
        self.graphs: DecodeGraphs | None = None
        self._max_running, self._max_tokens = config.max_running, config.max_batch_tokens
        self._lora_width = STACKED * config.max_lora_rank
        self._table_width = -(-self.max_model_len // config.block_size)
        largest = StepShape.largest(self._max_tokens, self._max_running, self._table_width, DECODE_HEIGHT, SCORED_ROWS)
        self._buffer = StepBuffer(largest.total, device)
        self._tokens = torch.zeros(config.max_running, dtype=torch.int64, device=device)  # sampled by the last step
        self._carried: dict[Request, int] = {}  # the row of each request in `_tokens`
        self._samples: DeviceSamples | None = None  # of the last step
        self._overlap = config.overlap
        self._wants_graphs = config.cuda_graphs and device.type == "cuda"

    def start(self, adapters: AdapterPool) -> None:
        """Reserve device memory for the adapters of a step, compile kernels and capture graphs."""
        self._adapters = adapters
        self._table = AdapterTable(self.model.sites(), 2 * self._max_running, self._lora_width, self.device)
        chosen = 1 if self.model.experts is None else self.model.experts.chosen
        self._memory = LoraMemory.of(
            adapters.arena, self._table.rows, self._max_tokens, self._max_running, self._lora_width, chosen
        )
        if self.device.type == "cuda":
            self.warm_up()
        if self._wants_graphs:
            self.graphs = self.decode_graphs(capture_on_cuda(self.device))

    def warm_up(self) -> None:
        """Compile every kernel that a step may launch, so that no request waits for the compiler."""
        for (decodes, prefills), adapted in product(self._steps_to_compile(), (False, True)):
            rows = decodes + prefills
            height = tile_height(decodes, rows)
            tiles = most_tiles(rows, rows, height) if adapted else 0
            shape = StepShape(rows, decodes, prefills, self._table_width, rows, tiles, tiles, height)
            self._lay_out([], shape, [])
            logits = self.forward(shape, self._lora_width)
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

    def decode_graphs(self, capture: Capture) -> DecodeGraphs:
        """Graphs of `forward` for decode steps."""

        def lay_out_nothing(shape: StepShape) -> None:
            self._lay_out([], shape, [])

        return DecodeGraphs(
            self.forward, lay_out_nothing, self._max_running, self._table_width, self._lora_width, capture
        )

    def prepare(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        ordered = sorted(chunks, key=lambda chunk: (chunk.length > 1, chunk.request.adapter or "", len(chunk.request)))
        slots, width, of_head = self._adapter_slots(ordered)
        decodes, tokens = sum(chunk.length == 1 for chunk in ordered), sum(chunk.length for chunk in ordered)
        height = tile_height(decodes, tokens)
        adapted = sum(slot != BASE for slot in slots)
        sampled, scored = (sum(chunk.samples for chunk in ordered), sum(len(chunk.scored) for chunk in ordered))
        tiles = most_tiles(tokens, adapted, height) if adapted else 0
        # Sampled rows and scored ones lie apart: an adapter may have a run of each
        logit_tiles = most_tiles(sampled + scored, 2 * adapted, height) if of_head else 0
        shape = step_shape(ordered, self.block_size, tiles, logit_tiles, height)
        if self.graphs is not None:
            shape = self.graphs.padded(shape, width)
        self._lay_out(ordered, shape, slots)
        sampling = [chunk.request for chunk in ordered if chunk.samples]
        self.prepared = PreparedStep(shape, width, sampling, ordered, scored)
        return ordered

    def _lay_out(self, chunks: Sequence[Chunk], shape: StepShape, slots: Sequence[int]) -> None:
        write_step(chunks, shape, self.block_size, slots, self._buffer.on_host(shape), self._carried)
        self._buffer.upload(shape)

    def _adapter_slots(self, chunks: Sequence[Chunk]) -> tuple[list[int], int, bool]:
        """Each chunk's adapter slot, BASE for none; the most ranks at a site; whether any adapter adapts the head."""
        slots, width, of_head = [], 0, False
        for request, start, length, _ in chunks:
            if request.adapter is None or start + length <= request.invocation_start:
                slots.append(BASE)
                continue
            layout, first = self._adapters.placement(request.adapter)
            assert isinstance(layout, AdapterLayout)
            slots.append(self._table.slot_of(request.adapter, layout, first))
            width = max(width, widest(layout))
            of_head = of_head or layout.sites[self.model.lm_head_site] is not None
        return slots, width, of_head

    @torch.inference_mode()
    def launch(self) -> tuple[Results, bool]:
        _, _, sampling, chunks, scored = self.prepared
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
        shape, width, *_ = self.prepared
        graph = None if self.graphs is None else self.graphs.of(shape, width)
        return graph or partial(self.forward, shape, width)

    @torch.inference_mode()
    def forward(self, shape: StepShape, width: int) -> Tensor:
        """The logits of the step in the buffer, of this shape, under adapters of at most `width` ranks at a site."""
        step = self._buffer.on_device(shape)
        carried = self._tokens[(-1 - step.token_ids).clamp(min=0)]  # see StepInputs.token_ids
        step = step._replace(token_ids=torch.where(step.token_ids < 0, carried, step.token_ids))
        lora = StepLora(self.model, self._memory, step, width, self.gpu) if shape.tiles else None
        return self.decoder.forward(step, self.kv.layers, lora)
