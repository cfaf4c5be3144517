"""The offset table: where each resident adapter's matrices lie in the arena."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MAX_PARTS = 3  # q, k and v
ALIGNMENT = 16  # elements; the kernels' vector loads count on it

# An entry's fields: the element at which A begins; the rank at which each part begins in A, and at which the last one
# ends; the elements at which each part's B and bias begin. All zeros is a site that is not adapted.
A = 0
RANKS = 1
B = RANKS + MAX_PARTS + 1
BIAS = B + MAX_PARTS
FIELDS = BIAS + MAX_PARTS
NO_BIAS = -1


class PartEntry(NamedTuple):
    """One adapted projection: `b` and `bias` are elements of the arena."""

    rank: int
    b: int
    bias: int | None = None


class SiteEntry(NamedTuple):
    """One adapted site: `a` is an element of the arena, `parts[i]` is None where the site's part i is not adapted."""

    a: int
    parts: Sequence[PartEntry | None]


def table_rows(sites: Sequence[SiteEntry | None], width: int) -> Tensor:
    """An adapter's rows of the table, (sites, FIELDS) int64; `sites[i]` is None where it does not adapt site i.

    The table itself is (slots, sites, FIELDS) and contiguous. `width` is that of the buffer between shrink and
    expand: kernels whose grids it fixed would leave out ranks past it, so a site with more of them asserts.
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
        rank, b, bias = part or PartEntry(0, 0)
        fields[RANKS + index + 1] = fields[RANKS + index] + rank
        fields[B + index] = b
        fields[BIAS + index] = NO_BIAS if bias is None else bias
    offsets = [site.a, *fields[B:BIAS], *(max(bias, 0) for bias in fields[BIAS:])]
    assert all(offset >= 0 and offset % ALIGNMENT == 0 for offset in offsets), f"not aligned: {site}"
    return fields
