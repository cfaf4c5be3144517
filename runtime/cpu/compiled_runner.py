"""The model on a CPU, by the compiled kernels."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from kernels.cpu.compiled.library import instructions
from kernels.cpu.compiled.program import Pool
from kernels.cpu.compiled.structs import PANEL
from runtime.adapters.panel_layout import layout_in_panels
from runtime.config import EngineConfig
from runtime.cpu.choice import threads_of
from runtime.cpu.compiled_decoder import PADDING, CompiledDecoder
from runtime.cpu.compiled_step import CompiledStep, StepLayout
from runtime.cpu.weight_panels import WeightPanels
from runtime.models.config import MOST_PARTS
from runtime.runner import ResidentAdapters, Results, Runner
from runtime.sampler import Best, choose, with_scores
from runtime.scheduler import SCORED_ROWS, Chunk


@contextmanager
def torch_on_one_thread() -> Iterator[None]:
    """For small operations beside the kernels: after each, torch's other threads would spin on the kernels' cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class CompiledRunner(Runner):
    """Computes each step in `launch`, by one call into the kernels, before it returns.

    Sums and activations are float32; weights, K/V and adapters keep their own dtypes.
    """

    adapter_dtype = torch.uint8  # extents of bytes: each adapter has its own dtype
    packs_linears = False  # the kernels have a layout of their own
    reads_float16 = True
    keeps_quantized = True

    def __init__(self, config: EngineConfig):
        super().__init__(config, torch.device("cpu"))
        self.threads = threads_of(config)
        self.kernels = f"compiled ({instructions()})"
        self._pool = Pool(self.threads)
        rows, logits = self.sizes.max_batch_tokens, self.sizes.max_running + SCORED_ROWS
        panels = WeightPanels(config.quantization, self.weight_dtype, self.threads)
        self.decoder = CompiledDecoder(
            self.model, self.checkpoint, self.kv.layers, config.block_size, self._pool, rows, logits, panels
        )
        del self.checkpoint
        self.weights_held = self._held(panels.description)
        self.adapter_layout = partial(layout_in_panels, base=self.decoder.base)
        ranks = MOST_PARTS * config.max_lora_rank
        self._shrunk = torch.zeros(rows, -(-ranks // PANEL) * PANEL + PADDING)

    def check_model(self) -> None:
        for width in map(self.model.fused_width, range(len(self.model.sites()))):
            if width is not None and width % PANEL:
                raise ValueError(
                    f"config.json: the model has a gate and an up of {width} in one module, and kernels (--kernels) "
                    f"compiled take multiples of {PANEL}; kernels torch take any"
                )

    def start(self, adapters: ResidentAdapters) -> None:
        self._layout = StepLayout(self.model, self.block_size, self.threads, self._shrunk, adapters.lookup)

    def prepare(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        with torch_on_one_thread():
            self.prepared = self._layout.lay_out(chunks)
        return self.prepared.chunks

    def compute(self) -> torch.Tensor:
        return self.forward(self.prepared)

    def launch(self) -> tuple[Results, bool]:
        logits = self.compute()
        sampling = self.prepared.sampling
        best = self.decoder.best_of(len(sampling))
        with torch_on_one_thread():
            sampled = choose(logits, sampling, [Best(one.highest, one.index, one.log_total) for one in best])
            results = with_scores(self.prepared.chunks, sampled, logits[len(sampling) :])
        return lambda: results, False

    def forward(self, step: CompiledStep) -> torch.Tensor:
        """Float32 logits (n, vocab) of a step's rows of logits; they last until the next step."""
        self.decoder.forward(step.struct)
        return self.decoder.logits[: step.struct.logits]

    def close(self) -> None:
        super().close()
        self._pool.close()
