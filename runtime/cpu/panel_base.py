"""The base's weights as the compiled kernels hold them, for adapters that depend on them: DoRA and trained biases."""

import numpy as np
from torch import Tensor

from kernels.cpu.compiled.library import load
from kernels.cpu.compiled.panels import Panels
from runtime.adapters.parts import Pause

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
PIECE_PRODUCTS = 1 << 22  # multiplied between two pauses: one or two milliseconds


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
        if embedding:
            a, b = np.ascontiguousarray(b.T), np.ascontiguousarray(a.T)
        sums = np.zeros(panels.k if embedding else panels.columns)
        step = max(1, PIECE_PRODUCTS // (panels.k * (len(a) + 1)))
        for first in range(0, panels.columns, step):
            pause()
            last = min(first + step, panels.columns)
            place = panels.type, panels.address, first, last, panels.k
            load().panels_squares(*place, a.ctypes.data, b.ctypes.data, len(a), scale, embedding, sums.ctypes.data)
        return np.sqrt(sums).astype(np.float32)
