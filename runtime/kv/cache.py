"""The K/V tensors on the device: blocks of slots, one slot for each token."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.host_to_device import page_locked
from runtime.models.config import ModelConfig


class KvCopy(NamedTuple):
    """A copy of block `source` to block `target`, due before `target` is written to."""

    source: int
    target: int


def bytes_per_block(model: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    return model.num_layers * block_size * 2 * model.num_kv_heads * model.head_dim * dtype.itemsize


class KvCache:
    """`layers` has (num_blocks * block_size, 2, kv_heads, head_dim) for each layer; K is index 0, V is 1.

    Block b has the `block_size` slots from b * block_size on. The compiled CPU kernels order the numbers within a block
    in another way (kernels/cpu/compiled/kv.h), so all others treat a block as a whole. Block 0 stays zero: padding
    reads it, so that no mask has to hide what another request left behind, least of all a NaN.
    """

    def __init__(
        self, model: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.block_size, self.device = block_size, device
        shape = (model.num_layers, num_blocks * block_size, 2, model.num_kv_heads, model.head_dim)
        self._whole = torch.zeros(shape, dtype=dtype, device=device)
        self.layers: list[Tensor] = list(self._whole)

    def block(self, block: int) -> Tensor:
        """A view of one block on all layers, (layers, block_size, 2, kv_heads, head_dim)."""
        return self._whole[:, block * self.block_size : (block + 1) * self.block_size]

    def empty_blocks(self, count: int) -> Tensor:
        """Host memory for `count` blocks, each contiguous and shaped as `block`; page-locked for a CUDA device."""
        block, dtype = self.block(0), self._whole.dtype
        if self.device.type != "cuda":
            return torch.empty((count, *block.shape), dtype=dtype)
        return page_locked(count * block.numel(), dtype).view(count, *block.shape)

    @torch.inference_mode()
    def copy(self, copies: Sequence[KvCopy]) -> None:
        """Copy blocks to others, on all layers. No block may be both a source and a target."""
        for source, target in copies:
            self.block(target).copy_(self.block(source))
