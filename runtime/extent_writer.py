"""One matrix of a file after another, scaled and rounded to what an extent holds."""

import numpy as np
import torch
from torch import Tensor

from runtime.weight_dtypes import widened

PIECE_ELEMENTS = (1 << 15) - 1  # so few torch computes on the calling thread: it enlists others for more


class ExtentWriter:
    """Writes to an extent, float32 or bfloat16, in ordinary memory.

    A value is its product with the scale in float32, rounded once to the extent's dtype, to the nearest and then even.
    In numpy, but for the rounding, which torch does in a third of the time; a matrix is transposed in its own dtype.
    """

    def __init__(self, extent: Tensor) -> None:
        self._extent = extent
        self._bfloat16 = extent.dtype == torch.bfloat16
        self._elements = (extent.view(torch.uint16) if self._bfloat16 else extent).numpy()

    def write(self, place: slice, values: np.ndarray, dtype: str, scale: float = 1.0) -> None:
        """Fill a place with a matrix in row order; its values are held as in `weight_dtypes`, and may be a view."""
        target = self._elements[place].reshape(values.shape)
        if not self._bfloat16:
            np.multiply(widened(values, dtype), np.float32(scale), out=target)
        elif dtype == "BF16":
            np.copyto(target, values)
            if scale != 1.0:
                for piece in self._extent[place].split(PIECE_ELEMENTS):
                    piece.mul_(scale)
        else:
            product = np.multiply(widened(values, dtype), np.float32(scale), order="C").reshape(-1)
            pieces = torch.from_numpy(product).split(PIECE_ELEMENTS)
            for piece, exact in zip(self._extent[place].split(PIECE_ELEMENTS), pieces, strict=True):
                piece.copy_(exact)
