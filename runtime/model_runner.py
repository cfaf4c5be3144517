"""The model, its K/V cache and the device they live on: a step's chunks in, sampled tokens out."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from runtime.adapters.pool import AdapterPool
from runtime.batch import Batch, build_batch
from runtime.chunk import Chunk
from runtime.config import EngineConfig
from runtime.kv.cache import KvCache, bytes_per_block
from runtime.models.config import ModelConfig
from runtime.models.decoder import Decoder
from runtime.models.weights import Weights, load_weights
from runtime.sampler import Sampled, sample

Results = Callable[[], list[Sampled]]  # a choice for each chunk of a step that samples


class Runner(Protocol):
    """What an engine asks of the model, wherever it runs. `adapter_dtype` is what adapters are kept in for it."""

    model: ModelConfig
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    device: torch.device
    num_blocks: int
    num_host_blocks: int
    max_model_len: int
    kv: KvCache

    def start(self, adapters: AdapterPool) -> None:
        """Get ready for steps with adapters of a pool."""
        ...

    def prepare(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Lay out a step, and return its chunks in the order of its rows."""
        ...

    def launch(self) -> tuple[Results, bool]:
        """Start to compute the step that was laid out, which writes the K/V of every token.

        What waits for its results, and whether the next step may be laid out and launched before.
        """
        ...


class LoadedModel:
    """What every runner has: the model of `config` on a device, and K/V for it.

    Raises ValueError for what does not fit together.
    """

    def __init__(self, config: EngineConfig, device: torch.device):
        directory = Path(config.model)
        self.model = ModelConfig.from_directory(directory)
        self.dtype: torch.dtype = getattr(torch, self.model.dtype if config.dtype == "auto" else config.dtype)
        self.device = device
        self.block_size = config.block_size
        block_bytes = bytes_per_block(self.model, config.block_size, self.dtype)
        self.num_blocks = config.kv_cache_bytes // block_bytes
        self.num_host_blocks = config.host_kv_bytes // block_bytes
        if config.host_kv_bytes and not self.num_host_blocks:
            given = config.host_kv_bytes
            raise ValueError(f"host_kv_bytes must be 0 or at least {block_bytes}, one block; it is {given}")
        self.max_model_len = self._max_model_len(config)
        self.weights: Weights = load_weights(self.model, directory, self.dtype, config.load_format, device)
        self.kv = KvCache(self.model, self.num_blocks, config.block_size, self.dtype, device)

    def _max_model_len(self, config: EngineConfig) -> int:
        """The model's limit, the configured one, or what the K/V cache holds of a single request."""
        room = (self.num_blocks - 1) * config.block_size
        wanted = config.max_model_len or min(self.model.max_position, max(room, 1))
        if wanted > self.model.max_position:
            raise ValueError(f"max_model_len is {wanted}, but the model takes at most {self.model.max_position} tokens")
        if wanted > room:
            raise ValueError(
                f"kv_cache_bytes holds {max(room, 0)} tokens, but one request may need {wanted}: raise kv_cache_bytes "
                "or lower max_model_len"
            )
        return wanted


class ReferenceRunner(LoadedModel):
    """Runs the model on the CPU, with the reference kernels.

    Adapters are float32 there whatever the model is: the small products take half the time in it.
    """

    adapter_dtype = torch.float32

    def __init__(self, config: EngineConfig):
        super().__init__(config, torch.device("cpu"))
        self.decoder = Decoder(self.model, self.weights)

    def start(self, adapters: AdapterPool) -> None:
        self._adapters = adapters

    def prepare(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        lookup = self._adapters.lookup
        self._batch = build_batch(chunks, self.model, self.block_size, lookup, self.dtype, self.device)
        return self._batch.chunks

    def launch(self) -> tuple[Results, bool]:
        sampled = sample(self.forward(self._batch), self._batch.sampling)
        return lambda: sampled, False

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Float32 logits (n, vocab) of the batch's `logit_rows`."""
        return self.decoder.forward(
            batch.token_ids, batch.positions, batch.slots, self.kv.layers, batch.groups, batch.logit_rows, batch.lora
        )
