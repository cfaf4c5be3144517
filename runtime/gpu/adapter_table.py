"""The slots of the offset table on the device, and which adapter occupies each."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from kernels.offset_table import FIELDS, PartEntry, SiteEntry, table_rows
from runtime.adapters.layout import AdapterLayout, ChangesLayout, SiteLayout
from runtime.models.sites import Site


class AdapterRow(NamedTuple):
    """What a step needs to know of an adapter in the table."""

    slot: int
    ranks: int  # the most at a site, or 1: IA³ has none, and a launch has at least one program
    sites: frozenset[int]  # that it adapts
    layout: AdapterLayout
    first: int  # element of the arena at which its extent begins


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
        self._rows: OrderedDict[tuple[str, int], AdapterRow] = OrderedDict()

    def row_of(self, digest: str, layout: AdapterLayout, first: int) -> AdapterRow:
        """The row of an adapter whose extent begins at element `first` of the arena.

        A new slot's row is copied in stream order, so that kernels launched afterwards read it.
        """
        place = digest, first
        row = self._rows.get(place)
        if row is None:
            # The changes of norms, which are none, come last
            places = zip(range(len(self._columns)), layout.sites, layout.changes, strict=False)
            entries = [self._entry(*each, first) for each in places]
            fields = table_rows(entries, self.width)
            slot = len(self._rows) if len(self._rows) < len(self.rows) else self._rows.popitem(last=False)[1].slot
            self.rows[slot].copy_(fields.pin_memory() if self.rows.is_cuda else fields, non_blocking=True)
            adapted = frozenset(site for site, entry in enumerate(entries) if entry is not None)
            row = self._rows[place] = AdapterRow(slot, _most_ranks(layout), adapted, layout, first)
        self._rows.move_to_end(place)
        return row

    def _entry(
        self, index: int, site: SiteLayout | None, changes: Sequence[ChangesLayout], first: int
    ) -> SiteEntry | None:
        """The gains and biases of changed parts are in `changes`, but for the biases of parts with LoRA alone."""
        if site is None and not changes:
            return None

        def at(place: slice | None) -> int | None:
            return None if place is None else first + place.start

        parts: list[PartEntry | None] = [None] * len(self._columns[index])
        for part in () if site is None else site.parts:
            rank = part.ranks.stop - part.ranks.start
            place = self._columns[index].index(part.columns.start)
            parts[place] = PartEntry(rank, first + part.b.start, at(part.bias))
        for change in changes:
            place = self._columns[index].index(change.part.columns.start)
            entry = parts[place] or PartEntry(0, first)
            parts[place] = entry._replace(bias=at(change.bias) or entry.bias, gain=at(change.gain))
        return SiteEntry(first if site is None else first + site.a.start, parts)


def _first_columns(site: Site) -> list[int]:
    return [0, *accumulate(part.out_features for part in site.parts)][:-1]


def _most_ranks(layout: AdapterLayout) -> int:
    return max((site.rank for site in layout.sites if site is not None), default=1)
