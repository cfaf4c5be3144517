"""The tensors that hold K and V: one a layer, in slots of one token."""

import torch
from torch import Tensor

from runtime.models.config import ModelConfig


def bytes_per_block(model: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    return model.num_layers * block_size * 2 * model.num_kv_heads * model.head_dim * dtype.itemsize


def allocate_kv_cache(
    model: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """A zeroed tensor (num_blocks * block_size, 2, kv_heads, head_dim) for each layer; K is index 0, V is 1.

    Block b holds slots b * block_size onwards. Block 0 stays zero: padding reads it, so that what an unrelated
    sequence left behind, a NaN above all, is never read under a mask.
    """
    shape = (num_blocks * block_size, 2, model.num_kv_heads, model.head_dim)
    return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(model.num_layers)]
