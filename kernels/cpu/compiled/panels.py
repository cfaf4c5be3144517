"""Matrices in the layout that the compiled kernels read (panels.h)."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.cpu.compiled.library import load

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}  # as panels.h numbers them


class Panels(NamedTuple):
    """A matrix (columns, k) in panels of 16 columns."""

    memory: np.ndarray  # bytes
    type: int
    columns: int
    k: int

    @property
    def address(self) -> int:
        address: int = self.memory.ctypes.data
        return address


def pack(weight: Tensor) -> Panels:
    """A matrix (columns, k) of float32, bfloat16 or float16, in its dtype."""
    columns, k = weight.shape
    panels = _empty(TYPES[weight.dtype], columns, k)
    load().panels_write(
        panels.type, weight.data_ptr(), weight.stride(0), weight.stride(1), columns, k, 0, panels.address
    )
    return panels


def quantize(weight: Tensor) -> Panels:
    """A matrix (columns, k) in int8, with a scale for each column and 128 k; rounded to nearest even."""
    columns, k = weight.shape
    exact = weight.float().contiguous()
    panels = _empty(TYPES[torch.int8], columns, k)
    load().panels_quantize(exact.data_ptr(), exact.stride(0), columns, k, panels.address)
    return panels


def _empty(type: int, columns: int, k: int) -> Panels:
    return Panels(np.zeros(load().panels_bytes(type, columns, k), np.uint8), type, columns, k)
