"""One matrix of a file after another, scaled and rounded to what an extent holds."""

import numpy as np
import torch
from torch import Tensor

from runtime.adapter_format.weight_dtypes import widened

PIECE_ELEMENTS = (1 << 15) - 1  # so few torch computes on the calling thread: for more it enlists others


class ExtentWriter:
    """Writes to an extent, float32 or bfloat16, in ordinary memory.

    A value is its product with the scale in float32, rounded once to the extent's dtype, to the nearest and then even.
    In numpy, but for what torch does in a third of the time: in pieces for which it enlists no other threads. A matrix
    is transposed in its own dtype.
    """

    def __init__(self, extent: Tensor) -> None:
        self._extent = extent
        self._bfloat16 = extent.dtype == torch.bfloat16
        self._elements = (extent.view(torch.uint16) if self._bfloat16 else extent).numpy()

    def write(self, place: slice, values: np.ndarray, dtype: str, scale: float = 1.0) -> None:
        """Fill a place with a matrix in row order; its values are held as in `weight_dtypes`, and may be a view."""
        target = self._elements[place].reshape(values.shape)
        if self._bfloat16 and dtype == "BF16":
            np.copyto(target, values)
            if scale != 1.0:
                for piece in self._extent[place].split(PIECE_ELEMENTS):
                    piece.mul_(scale)
            return
        exact = _half_widened(values) if dtype == "F16" else widened(values, dtype)
        if self._bfloat16:
            product = np.multiply(exact, np.float32(scale), order="C")
            _convert(torch.from_numpy(product).view(-1), self._extent[place])
        else:
            np.multiply(exact, np.float32(scale), out=target)


def _half_widened(values: np.ndarray) -> np.ndarray:
    """float16 as float32, in row order."""
    held = torch.from_numpy(np.array(values, order="C"))  # a copy, since torch takes nothing that it may not write to
    exact = torch.empty(held.shape)
    _convert(held.view(-1), exact.view(-1))
    return exact.numpy()


def _convert(source: Tensor, target: Tensor) -> None:
    for piece, values in zip(target.split(PIECE_ELEMENTS), source.split(PIECE_ELEMENTS), strict=True):
        piece.copy_(values)
