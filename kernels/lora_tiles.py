"""Tiles: the units of work of grouped kernels. A tile is consecutive rows of one adapter, and of one expert if any."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

FIRST_ROW, ROWS, SLOT, EXPERT = range(4)  # the fields of a tile; SLOT is the adapter's row of the offset table
TILE_FIELDS = 4
SITES_PER_EXPERT = 2  # what lies between the entries of two experts in the offset table
BASE = -1  # the slot of a row without an adapter


class Tiles(NamedTuple):
    """The tiles of one batch.

    Kernels launch programs for all of `fields`, used or not, so that a captured CUDA graph serves any batch that is
    later written there. Outside graphs, a slice of the used tiles is enough.
    """

    fields: Tensor  # (tiles, TILE_FIELDS) int32; an unused tile has 0 rows, and the expert is 0 where there are none
    height: int  # the most rows that a tile may have


def most_tiles(rows: int, runs: int, height: int) -> int:
    """The most tiles that `rows` rows need in at most `runs` runs; a run is consecutive rows under one adapter.

    Each run wastes less than a tile: Σ ⌈nᵢ / h⌉ ≤ (Σ nᵢ + runs · (h - 1)) / h.
    """
    runs = min(runs, rows)
    return (rows + runs * (height - 1)) // height


def count_tiles(slots: npt.NDArray[np.int32], height: int) -> int:
    """How many tiles `lay_tiles` cuts a batch into."""
    starts, stops = _runs(slots)
    return int((-(-(stops - starts) // height)).sum())


def lay_tiles(slots: npt.NDArray[np.int32], height: int, out: npt.NDArray[np.int32]) -> int:
    """Cut a batch into tiles, write them to `out`, zero the rest of it, and return how many tiles there are.

    `slots` (T,) is the adapter slot of each row, BASE for none. `out` is `Tiles.fields` in host memory: the tensor
    itself on a CPU, otherwise a part of the buffer that is uploaded for the step. Asserts that the tiles fit.
    """
    starts, stops = _runs(slots)
    counts = -(-(stops - starts) // height)
    total = int(counts.sum())
    assert total <= len(out), f"{total} tiles do not fit {len(out)}"
    run = np.repeat(np.arange(len(starts)), counts)
    within = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    out[:total, FIRST_ROW] = starts[run] + within * height
    out[:total, ROWS] = np.minimum(stops[run] - out[:total, FIRST_ROW], height)
    out[:total, SLOT] = slots[starts[run]]
    out[:total, EXPERT] = 0
    out[total:] = 0
    return total


def _runs(slots: npt.NDArray[np.int32]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """The first row of each run under an adapter, and the row after its last."""
    changes = np.flatnonzero(slots[1:] != slots[:-1]) + 1
    starts = np.concatenate(([0], changes))[: len(slots)]
    stops = np.append(changes, len(slots))[: len(slots)]
    adapted = slots[starts] != BASE
    return starts[adapted], stops[adapted]
