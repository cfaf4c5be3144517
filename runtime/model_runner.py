"""The model, its K/V cache and the device they live on: a batch in, logits out."""

from pathlib import Path

import torch
from torch import Tensor

from runtime.batch import Batch
from runtime.config import EngineConfig
from runtime.kv_cache import KvCache, bytes_per_block
from runtime.models.config import ModelConfig
from runtime.models.decoder import Decoder
from runtime.models.weights import load_weights


class ModelRunner:
    """Loads the model of `config` and runs batches through it. Raises ValueError for what does not fit together."""

    def __init__(self, config: EngineConfig):
        directory = Path(config.model)
        self.model = ModelConfig.from_directory(directory)
        self.dtype = getattr(torch, self.model.dtype if config.dtype == "auto" else config.dtype)
        self.device = torch.device("cpu")
        block_bytes = bytes_per_block(self.model, config.block_size, self.dtype)
        self.num_blocks = config.kv_cache_bytes // block_bytes
        self.num_host_blocks = config.host_kv_bytes // block_bytes
        if config.host_kv_bytes and not self.num_host_blocks:
            raise ValueError(
                f"host_kv_bytes must be 0 or at least {block_bytes}, one block; it is {config.host_kv_bytes}"
            )
        self.max_model_len = self._max_model_len(config)
        self.decoder = Decoder(self.model, load_weights(self.model, directory, self.dtype, config.load_format))
        self.kv = KvCache(self.model, self.num_blocks, config.block_size, self.dtype, self.device)

    def _max_model_len(self, config: EngineConfig) -> int:
        """The model's limit, the configured one, or what the K/V cache holds of a single sequence."""
        room = (self.num_blocks - 1) * config.block_size
        wanted = config.max_model_len or min(self.model.max_position, max(room, 1))
        if wanted > self.model.max_position:
            raise ValueError(f"max_model_len is {wanted}, but the model takes at most {self.model.max_position} tokens")
        if wanted > room:
            raise ValueError(
                f"kv_cache_bytes holds {max(room, 0)} tokens, but one sequence may need {wanted}: raise kv_cache_bytes "
                "or lower max_model_len"
            )
        return wanted

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Float32 logits (n, vocab) of the batch's `logit_rows`; writes the K/V of every token."""
        return self.decoder.forward(
            batch.token_ids, batch.positions, batch.slots, self.kv.layers, batch.groups, batch.logit_rows, batch.lora
        )
