"""The model on a CPU, by the kernels of `kernels.cpu`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.adapters.layout import layout_adapter
from runtime.adapters.torch_base import TorchBase
from runtime.config import EngineConfig
from runtime.cpu.batch import Batch, build_batch
from runtime.models.decoder import Decoder
from runtime.parallel.group import RankGroup
from runtime.runner import ResidentAdapters, Results, Runner
from runtime.sampler import sample, with_scores
from runtime.scheduler import Chunk


class TorchRunner(Runner):
    """Computes each step in `launch`, before it returns.

    Adapters are float32 even if the model is bfloat16: the small products take half the time in float32.
    """

    kernels = "torch"
    adapter_dtype = torch.float32

    def __init__(self, config: EngineConfig, group: RankGroup | None = None):
        super().__init__(config, torch.device("cpu"), group)
        weights = self.checkpoint.weights()
        self.decoder = Decoder(self.part, weights, self.group)
        self.adapter_layout = self._lay_out(layout_adapter, TorchBase(self.part, weights))
        del self.checkpoint

    def start(self, adapters: ResidentAdapters) -> None:
        self._adapters = adapters

    def prepare(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        lookup = self._adapters.lookup
        self._batch = build_batch(chunks, self.part, self.block_size, lookup, self.dtype, self.device)
        return self._batch.chunks

    def launch(self) -> tuple[Results, bool]:
        batch, logits = self._batch, self.compute()
        sampled = sample(logits[: len(batch.sampling)], batch.sampling)
        results = with_scores(batch.chunks, sampled, logits[len(batch.sampling) :])
        return lambda: results, False

    def compute(self) -> Tensor:
        return self.forward(self._batch)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Float32 logits (n, vocab) of the batch's `logit_rows`."""
        return self.decoder.forward(
            batch.token_ids, batch.positions, batch.slots, self.kv.layers, batch.groups, batch.logit_rows, batch.lora
        )
