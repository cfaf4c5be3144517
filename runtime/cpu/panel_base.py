"""The base's weights as the compiled kernels hold them, for adapters that depend on them: DoRA and trained biases."""

from collections.abc import Sequence

import numpy as np

from kernels.cpu.compiled.library import load
from kernels.cpu.compiled.panels import Panels
from kernels.cpu.compiled.program import Part
from kernels.cpu.compiled.structs import PANEL
from runtime.adapters.parts import Pause

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
PIECE_PRODUCTS = 1 << 23  # multiplied between two pauses: about a millisecond


class PanelBase:
    """The weights of the compiled kernels, also quantised ones: what they multiply with counts.

    A module lies in several matrices of panels, one below the other, where it is several projections in one.
    """

    def __init__(self) -> None:
        self._parts: dict[str, list[Part]] = {}  # by module

    def add(self, module: str, parts: Sequence[Part]) -> None:
        self._parts[module] = list(parts)

    def bias(self, module: str) -> np.ndarray | None:
        biases = [part.bias.numpy() for part in self._parts.get(module, ()) if part.bias is not None]
        return np.concatenate(biases) if biases else None

    def lengths(self, module: str, a: np.ndarray, b: np.ndarray, scale: float, pause: Pause) -> np.ndarray:
        panels = [part.weight for part in self._parts[module]]
        if module == EMBEDDING:  # whose columns are tokens
            [embedding] = panels
            sums = _squares(embedding, b, a.T, scale, pause, by_k=True)
        else:
            rows = np.split(b, np.cumsum([one.columns for one in panels])[:-1])
            each = [_squares(one, _ordered(a, one).T, own, scale, pause) for one, own in zip(panels, rows, strict=True)]
            sums = np.concatenate(each)
        lengths: np.ndarray = np.sqrt(sums).astype(np.float32)
        return lengths


def _ordered(a: np.ndarray, panels: Panels) -> np.ndarray:
    """The inputs of A in the order in which those of the panels lie."""
    return a if panels.order is None else a[:, panels.order.numpy()]


def _squares(
    panels: Panels, of_k: np.ndarray, of_columns: np.ndarray, scale: float, pause: Pause, *, by_k: bool = False
) -> np.ndarray:
    """The sums of (W + scale · BA)² by column, or by k; `of_k` is (k, ranks), `of_columns` (columns, ranks)."""
    of_k, of_columns = np.ascontiguousarray(of_k), np.ascontiguousarray(of_columns)
    ranks, sums = of_k.shape[1], np.zeros(panels.k if by_k else panels.columns)
    step = max(1, PIECE_PRODUCTS // (panels.k * PANEL * (ranks + 1)))
    count = -(-panels.columns // PANEL)
    for first in range(0, count, step):
        pause()
        place = panels.type, panels.address, first, min(first + step, count), panels.columns, panels.k, panels.group
        factors = of_k.ctypes.data, of_columns.ctypes.data, ranks, scale
        load().panels_squares(*place, *factors, by_k, sums.ctypes.data)
    return sums
