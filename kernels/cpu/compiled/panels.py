"""Matrices in the layout that the compiled kernels read (panels.h)."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.cpu.compiled.library import load

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}  # as panels.h numbers them

LINE_BYTES = 64
PIECE_BYTES = 64 << 20  # numpy asks for huge pages from 4 MB on


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


class PanelMemory:
    """Lends memory for the panels of a model, side by side in large pieces, which the kernel backs with huge pages.

    Reading weights in small pages takes 10 to 17 % longer for one to three rows: the hardware stops to read ahead at
    the end of a page.
    """

    def __init__(self) -> None:
        self._piece = np.empty(0, np.uint8)

    def take(self, size: int) -> np.ndarray:
        """Zeros, `size` bytes, that begin at a cache line."""
        if len(self._piece) < size:
            piece = np.zeros(max(size, PIECE_BYTES) + LINE_BYTES, np.uint8)
            self._piece = piece[-piece.ctypes.data % LINE_BYTES :]
        taken, self._piece = self._piece[:size], self._piece[-(-size // LINE_BYTES) * LINE_BYTES :]
        return taken


def pack(weight: Tensor, memory: PanelMemory | None = None) -> Panels:
    """A matrix (columns, k) of float32, bfloat16 or float16, in its dtype."""
    columns, k = weight.shape
    panels = _empty(TYPES[weight.dtype], columns, k, memory)
    load().panels_write(
        panels.type, weight.data_ptr(), weight.stride(0), weight.stride(1), columns, k, 0, panels.address
    )
    return panels


def quantize(weight: Tensor, memory: PanelMemory | None = None) -> Panels:
    """A matrix (columns, k) in int8, with a scale for each column and 128 k; rounded to nearest even."""
    columns, k = weight.shape
    exact = weight.float().contiguous()
    panels = _empty(TYPES[torch.int8], columns, k, memory)
    load().panels_quantize(exact.data_ptr(), exact.stride(0), columns, k, panels.address)
    return panels


def _empty(type: int, columns: int, k: int, memory: PanelMemory | None) -> Panels:
    size = load().panels_bytes(type, columns, k)
    return Panels(np.zeros(size, np.uint8) if memory is None else memory.take(size), type, columns, k)
