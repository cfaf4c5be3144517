"""The offset table: for each resident adapter and site, the arena elements at which its LoRA matrices begin."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MAX_PARTS = 3  # q, k and v
ALIGNMENT = 16  # elements of the arena: the kernels' vector loads need every matrix to begin at a multiple of it

# The fields of an entry, which describes one adapter at one site. An entry of zeros: the adapter does not adapt it. No
# bias and no gain begins at element 0, so that 0 means none, as NO_BIAS does.
A = 0  # the element at which A begins
RANKS = 1  # MAX_PARTS + 1 fields: the row of A at which each part begins, and last the number of rows of A
B = RANKS + MAX_PARTS + 1  # MAX_PARTS fields: the element at which each part's B begins
BIAS = B + MAX_PARTS  # MAX_PARTS fields: the element at which each part's bias begins, or NO_BIAS
GAIN = BIAS + MAX_PARTS  # MAX_PARTS fields: the element at which each part's gains begin, or NO_BIAS
FIELDS = GAIN + MAX_PARTS
NO_BIAS = -1


class PartEntry(NamedTuple):
    """One adapted projection of a site."""

    rank: int  # 0: it has a bias or gains only
    b: int  # the arena element at which B begins
    bias: int | None = None  # the arena element at which the bias begins
    gain: int | None = None  # the arena element at which the gains begin: DoRA multiplies the outputs by them


class SiteEntry(NamedTuple):
    """One adapted site."""

    a: int  # the arena element at which A begins; the rows of its parts follow each other
    parts: Sequence[PartEntry | None]  # by the site's parts; None for a part that the adapter does not adapt


def table_rows(sites: Sequence[SiteEntry | None], width: int) -> Tensor:
    """An adapter's rows of the table, (sites, FIELDS) int64; `sites[i]` is None if it does not adapt site i.

    The table itself is (slots, sites, FIELDS) and contiguous. `width` is the number of columns of the buffer between
    shrink and expand. Kernel grids are fixed by it and skip ranks beyond it, so a site with more ranks asserts.
    """
    rows = [[0] * FIELDS if site is None else _fields(site) for site in sites]
    widest = max((row[RANKS + MAX_PARTS] for row in rows), default=0)
    assert widest <= width, f"a site has {widest} ranks, and there is room for {width}"
    return torch.tensor(rows, dtype=torch.int64).view(-1, FIELDS)


def _fields(site: SiteEntry) -> list[int]:
    assert len(site.parts) <= MAX_PARTS, f"a site has {len(site.parts)} parts"
    fields = [0] * FIELDS
    fields[A] = site.a
    for index in range(MAX_PARTS):
        part = site.parts[index] if index < len(site.parts) else None
        rank, b, bias, gain = part or PartEntry(0, 0)
        fields[RANKS + index + 1] = fields[RANKS + index] + rank
        fields[B + index] = b
        fields[BIAS + index] = NO_BIAS if bias is None else bias
        fields[GAIN + index] = NO_BIAS if gain is None else gain
        assert bias != 0, "a bias begins at element 0, which means none"
        assert gain != 0, "gains begin at element 0, which means none"
    offsets = [site.a, *fields[B:BIAS], *(max(place, 0) for place in fields[BIAS:])]
    assert all(offset >= 0 and offset % ALIGNMENT == 0 for offset in offsets), f"not aligned: {site}"
    return fields
