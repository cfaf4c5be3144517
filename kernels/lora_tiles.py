"""Tiles: consecutive rows of a batch under one adapter, cut to a height, as the grouped kernels take them."""

from typing import NamedTuple

import numpy as np
from torch import Tensor

FIRST_ROW, ROWS, SLOT = range(3)
TILE_FIELDS = 3
BASE = -1  # the slot of a row without an adapter


class Tiles(NamedTuple):
    """`fields` is (tiles, TILE_FIELDS) int32: first row, rows and slot of each; unused tiles have no rows.

    No tile has more than `height` rows. Kernels launch programs for all of `fields`, used or not, so that a graph
    captured with it replays whatever it then holds; outside graphs a slice of the used ones is enough.
    """

    fields: Tensor
    height: int


def most_tiles(rows: int, runs: int, height: int) -> int:
    """The most tiles that `rows` rows take in at most `runs` runs; a run is consecutive rows under one adapter.

    Each run wastes less than a tile: Σ ⌈nᵢ / h⌉ ≤ (Σ nᵢ + runs · (h - 1)) / h.
    """
    runs = min(runs, rows)
    return (rows + runs * (height - 1)) // height


def lay_tiles(slots: np.ndarray, height: int, out: np.ndarray) -> int:
    """Cut a batch into tiles: fill `out` and zero the rest of it. Gives the number of tiles; too many assert.

    `slots` (T,) int32 is each row's adapter, BASE for none. `out` is `Tiles.fields` as the host sees it: on a CPU the
    same memory, else part of what is copied to the device for a step.
    """
    changes = np.flatnonzero(slots[1:] != slots[:-1]) + 1
    starts = np.concatenate(([0], changes))[: len(slots)]
    stops = np.append(changes, len(slots))[: len(slots)]
    adapted = slots[starts] != BASE
    starts, stops = starts[adapted], stops[adapted]
    counts = -(-(stops - starts) // height)
    total = int(counts.sum())
    assert total <= len(out), f"{total} tiles do not fit {len(out)}"
    run = np.repeat(np.arange(len(starts)), counts)
    within = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    out[:total, FIRST_ROW] = starts[run] + within * height
    out[:total, ROWS] = np.minimum(stops[run] - out[:total, FIRST_ROW], height)
    out[:total, SLOT] = slots[starts[run]]
    out[total:] = 0
    return total
