"""The slots of the offset table on the device, and which adapter occupies each."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate

import torch

from kernels.offset_table import FIELDS, PartEntry, SiteEntry, table_rows
from runtime.adapters.layout import AdapterLayout, SiteLayout
from runtime.models.config import Site


class AdapterTable:
    """Owns the offset table and its assignment of slots to adapters.

    A slot's offsets depend on the adapter's content and on the arena element at which its extent begins. A slot
    therefore stays valid after the adapter is evicted, and is used again if it is loaded to the same place. New
    adapters get the least recently used slot. There must be more slots than a step can have adapters.
    """

    def __init__(self, sites: Sequence[Site], slots: int, width: int, device: torch.device) -> None:
        self.rows = torch.zeros((slots, len(sites), FIELDS), dtype=torch.int64, device=device)  # see offset_table
        self.width = width  # the most ranks at a site
        self._columns = [_first_columns(site) for site in sites]
        self._slots: OrderedDict[tuple[str, int], int] = OrderedDict()

    def slot_of(self, digest: str, layout: AdapterLayout, first: int) -> int:
        """The slot of an adapter whose extent begins at element `first` of the arena.

        A new slot's row is copied in stream order, so that kernels launched afterwards read it.
        """
        place = digest, first
        slot = self._slots.get(place)
        if slot is None:
            rows = table_rows([self._entry(*each, first) for each in enumerate(layout.sites)], self.width)
            slot = len(self._slots) if len(self._slots) < len(self.rows) else self._slots.popitem(last=False)[1]
            if self.rows.is_cuda:
                rows = rows.pin_memory()
            self.rows[slot].copy_(rows, non_blocking=True)
            self._slots[place] = slot
        self._slots.move_to_end(place)
        return slot

    def _entry(self, index: int, site: SiteLayout | None, first: int) -> SiteEntry | None:
        if site is None:
            return None
        parts: list[PartEntry | None] = [None] * len(self._columns[index])
        for part in site.parts:
            bias = None if part.bias is None else first + part.bias.start
            rank = part.ranks.stop - part.ranks.start
            parts[self._columns[index].index(part.columns.start)] = PartEntry(rank, first + part.b.start, bias)
        return SiteEntry(first + site.a.start, parts)


def _first_columns(site: Site) -> list[int]:
    return [0, *accumulate(part.out_features for part in site.parts)][:-1]


def widest(layout: AdapterLayout) -> int:
    """The most ranks of an adapter at one site."""
    return max((site.rank for site in layout.sites if site is not None), default=0)
