"""The base's weights as the compiled kernels hold them, for adapters that depend on them: DoRA and trained biases."""

import numpy as np
from torch import Tensor

from kernels.cpu.compiled.library import load
from kernels.cpu.compiled.panels import Panels
from kernels.cpu.compiled.structs import PANEL
from runtime.adapters.parts import Pause

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
PIECE_PRODUCTS = 1 << 23  # multiplied between two pauses: about a millisecond


class PanelBase:
    """The weights of the compiled kernels, also quantised ones: what they multiply with counts."""

    def __init__(self) -> None:
        self.panels: dict[str, Panels] = {}  # by module
        self.biases: dict[str, Tensor] = {}  # float32, by module

    def bias(self, module: str) -> np.ndarray | None:
        bias = self.biases.get(module)
        return None if bias is None else bias.numpy()

    def lengths(self, module: str, a: np.ndarray, b: np.ndarray, scale: float, pause: Pause) -> np.ndarray:
        panels, embedding = self.panels[module], module == EMBEDDING  # whose columns are tokens
        rows, columns = (b, a.T) if embedding else (a.T, b)
        rows, columns = np.ascontiguousarray(rows), np.ascontiguousarray(columns)
        sums = np.zeros(panels.k if embedding else panels.columns)
        step = max(1, PIECE_PRODUCTS // (panels.k * PANEL * (len(a) + 1)))
        count = -(-panels.columns // PANEL)
        for first in range(0, count, step):
            pause()
            place = panels.type, panels.address, first, min(first + step, count), panels.columns, panels.k
            factors = rows.ctypes.data, columns.ctypes.data, len(a), scale
            load().panels_squares(*place, *factors, embedding, sums.ctypes.data)
        return np.sqrt(sums).astype(np.float32)
