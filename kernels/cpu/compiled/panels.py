"""Matrices in the layout that the compiled kernels read (panels.h)."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.cpu.compiled.library import load

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}  # as panels.h numbers them
INT8, INT4, NF4, FLOAT8 = 3, 4, 5, 6
GROUP = 128  # panels.h

LINE_BYTES = 64
PIECE_BYTES = 64 << 20  # numpy asks for huge pages from 4 MB on


class Panels(NamedTuple):
    """A matrix (columns, k) in panels of 16 columns."""

    memory: np.ndarray  # bytes
    type: int
    columns: int
    k: int
    group: int = GROUP  # k with one scale, of quantised weights
    order: Tensor | None = None  # (k,) int32: which number of a row meets each k; None: its own

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


def pack(weight: Tensor, memory: PanelMemory | None = None, threads: int = 1) -> Panels:
    """A matrix (columns, k) of float32, bfloat16 or float16, in its dtype."""
    columns, k = weight.shape
    panels = _empty(TYPES[weight.dtype], columns, k, memory)
    source = weight.data_ptr(), weight.stride(0), weight.stride(1)
    load().panels_write(panels.type, *source, columns, k, 0, threads, panels.address)
    return panels


def quantize(
    weight: Tensor, memory: PanelMemory | None = None, type: int = INT8, group: int = GROUP, threads: int = 1
) -> Panels:
    """A matrix (columns, k) of float32, bfloat16 or float16 in INT8, INT4 or NF4, rounded to nearest.

    Each column and `group` k have a scale, and INT4 a zero point: its codes go from the smallest weight to the largest.
    """
    columns, k = weight.shape
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    panels = _empty(type, columns, k, memory, group)
    source = TYPES[weight.dtype], weight.data_ptr(), weight.stride(0)
    load().panels_quantize(type, *source, columns, k, group, threads, panels.address)
    return panels


def pack_codes(
    type: int,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group: int,
    memory: PanelMemory | None = None,
    order: Tensor | None = None,
    threads: int = 1,
) -> Panels:
    """A matrix (columns, k) that is quantised: (code − zero) · scale.

    `codes` are int8 of INT8, float8_e4m3fn of FLOAT8, else uint8 below 16: integers of INT4, places in a table of NF4.
    Floats are never NaN. `scales` are float32 and
    `zeros`, of INT4, int8, both (columns, groups). `group` divides 128; `order` is that of Panels.
    """
    columns, k = codes.shape
    assert GROUP % group == 0, group
    assert scales.shape == (columns, -(-k // group)), (scales.shape, codes.shape, group)
    assert (zeros is not None) == (type == INT4)
    panels = _empty(type, columns, k, memory, group)._replace(order=order)
    held = [None if one is None else one.contiguous() for one in (codes, scales.float(), zeros)]
    addresses = [None if one is None else one.data_ptr() for one in held]
    load().panels_write_codes(type, *addresses, columns, k, group, threads, panels.address)
    return panels


def _empty(type: int, columns: int, k: int, memory: PanelMemory | None, group: int = GROUP) -> Panels:
    size = load().panels_bytes(type, columns, k, group)
    return Panels(np.zeros(size, np.uint8) if memory is None else memory.take(size), type, columns, k, group)
