"""Runs a Decoder over sequences with a paged cache, as the engine does, in chunks of the caller's choosing."""

import torch
from torch import Tensor

from kernels.cpu.paged_attention import AttentionGroup
from runtime.models.config import ModelConfig
from runtime.models.decoder import Decoder, Lora

BLOCK = 4


class PagedDriver:
    """Holds a cache for `sequences` sequences of up to `limit` tokens, their blocks interleaved and out of order."""

    def __init__(self, config: ModelConfig, decoder: Decoder, dtype: torch.dtype, sequences: int = 1, limit: int = 64):
        self.decoder, self.dtype = decoder, dtype
        blocks = sequences * limit // BLOCK
        order = torch.randperm(blocks, generator=torch.Generator().manual_seed(1)) + 1  # block 0 is the null block
        self.slots = (order.view(sequences, -1, 1) * BLOCK + torch.arange(BLOCK)).flatten(1)
        shape = ((blocks + 1) * BLOCK, 2, config.num_kv_heads, config.head_dim)
        self.kv = [torch.full(shape, float("nan"), dtype=dtype) for _ in range(config.num_layers)]
        for layer in self.kv:
            layer[:BLOCK] = 0

    def step(self, chunks: list[tuple[int, list[int], int]], lora: Lora | None = None) -> list[Tensor]:
        """The logits of every row of each chunk (sequence, its new tokens, position of the first).

        One-token chunks must come first; they share one attention group.
        """
        ids = [token for _, tokens, _ in chunks for token in tokens]
        positions = [start + i for _, tokens, start in chunks for i in range(len(tokens))]
        written = [self.slots[sequence, start : start + len(tokens)] for sequence, tokens, start in chunks]
        with torch.inference_mode():
            logits = self.decoder.forward(
                torch.tensor(ids),
                torch.tensor(positions),
                torch.cat(written),
                self.kv,
                {window: self.groups(chunks, window) for window in {*self.decoder.config.windows, 0}},
                torch.arange(len(ids)),
                lora,
            )
        return list(logits.split([len(tokens) for _, tokens, _ in chunks]))

    def groups(self, chunks: list[tuple[int, list[int], int]], window: int = 0) -> list[AttentionGroup]:
        """All keys of a context under one mask, which hides those outside of a window, 0 for none, too."""
        groups = []
        decodes = [chunk for chunk in chunks if len(chunk[1]) == 1]
        if decodes:
            lengths = torch.tensor([start + 1 for _, _, start in decodes])
            keys = torch.arange(int(lengths.max()))
            visible = self._visible(keys, lengths[:, None] - 1, window)
            slots = self.slots[[chunk[0] for chunk in decodes], : visible.shape[1]].where(visible, 0)
            mask = None if bool(visible.all()) else self._additive(visible)[:, None, None]
            groups.append(AttentionGroup(slice(0, len(decodes)), len(decodes), 1, slots, mask))
        row = len(decodes)
        for sequence, tokens, start in chunks[len(decodes) :]:
            keys = torch.arange(start + len(tokens))
            mask = self._additive(self._visible(keys, keys[start:, None], window))[None, None]
            slots = self.slots[sequence : sequence + 1, : len(keys)]
            groups.append(AttentionGroup(slice(row, row + len(tokens)), 1, len(tokens), slots, mask, window > 0))
            row += len(tokens)
        return groups

    def _visible(self, keys: Tensor, queries: Tensor, window: int) -> Tensor:
        return (keys <= queries) & (keys > queries - window if window else keys >= 0)

    def _additive(self, visible: Tensor) -> Tensor:
        return torch.zeros(visible.shape, dtype=self.dtype).masked_fill_(~visible, float("-inf"))
