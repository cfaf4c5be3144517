"""The rows of a step sorted by the experts that they chose: on the device, without waiting for it."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.lora_tiles import BASE, EXPERT, FIRST_ROW, ROWS, SLOT, TILE_FIELDS, Tiles


class SortedRows(NamedTuple):
    """Pairs of a row and an expert, those of one expert side by side, and of these those under one adapter."""

    order: Tensor  # (P,) int64: the pairs in this order; pair p is of row p // chosen
    tiles: Tiles


def row_slots(tiles: Tiles, rows: int) -> Tensor:
    """Return the adapter's slot of each row of a batch, (rows,) int64, BASE for none."""
    fields = tiles.fields.long()
    places = fields[:, FIRST_ROW, None] + torch.arange(tiles.height, device=fields.device)
    inside = places < fields[:, FIRST_ROW, None] + fields[:, ROWS, None]
    slots = torch.full((rows + 1,), BASE, dtype=torch.int64, device=fields.device)  # the last takes what is in no tile
    slots[torch.where(inside, places, rows)] = fields[:, SLOT, None].expand(places.shape)
    return slots[:rows]


def sort_by_expert(chosen: Tensor, slots: Tensor | None, most_slots: int, tiles: int, height: int) -> SortedRows:
    """Sort the pairs of `chosen` (rows, experts of each), int64, and cut them into at most `tiles` tiles.

    `slots` are those of rows, below `most_slots`; None if all are BASE. The shapes of all results follow from those of
    the arguments.
    """
    per_row, radix = chosen.shape[1], most_slots + 1
    keys = chosen.flatten() * radix
    if slots is not None:
        keys = keys + (slots - BASE).repeat_interleave(per_row)
    keys, order = keys.sort(stable=True)
    places = torch.arange(len(keys), device=keys.device)
    begins = torch.ones_like(keys, dtype=torch.bool)
    begins[1:] = keys[1:] != keys[:-1]
    within = (places - torch.where(begins, places, 0).cummax(0).values) % height  # its tile
    tile = (within == 0).cumsum(0) - 1
    fields = torch.zeros((tiles, TILE_FIELDS), dtype=torch.int64, device=keys.device)
    fields[:, FIRST_ROW].scatter_(0, tile, places - within)
    fields[:, ROWS].scatter_add_(0, tile, torch.ones_like(places))
    fields[:, SLOT].scatter_(0, tile, keys % radix + BASE)
    fields[:, EXPERT].scatter_(0, tile, keys // radix)
    return SortedRows(order, Tiles(fields.int(), height))
