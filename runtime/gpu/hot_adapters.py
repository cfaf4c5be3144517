"""Adapters whose A lies below the weights that it adapts: one product gives a projection's outputs and all shrinks."""

from collections import OrderedDict
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.gpu.adapter_table import AdapterRow
from runtime.models.layers import Linear

HOT_ADAPTERS = 8
HOT_RANK = 16  # of a module. Eight adapters of Qwen3-8B take 340 MB, 2 % of its weights, and as much time to be read
ALIGNMENT = 16  # columns of y: the kernels' vector loads need its rows to begin at a multiple of it


class HotLinear(Linear):
    """y = x Wᵀ + b, with room for rows of adapters below W."""

    def __init__(self, linear: Linear, parts: int) -> None:
        weight, bias = linear.plain(), linear.bias
        out, self.hot_ranks = len(weight), parts * HOT_RANK
        spare = -(-HOT_ADAPTERS * self.hot_ranks // ALIGNMENT) * ALIGNMENT
        self._whole = torch.zeros((out + spare, weight.shape[1]), dtype=weight.dtype, device=weight.device)
        self._whole[:out] = weight
        self._whole_bias = None if bias is None else F.pad(bias, (0, spare))
        super().__init__(self._whole[:out], bias, pack=False)

    def with_shrinks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y, and x Aᵀ for all adapters that lie here, (T, 1, ranks) in x's dtype; both are parts of one tensor."""
        both = F.linear(x, self._whole, self._whole_bias)
        y, t = both.tensor_split([self.out_features], 1)
        return y, t[:, None]

    def place(self, hot: int, a: Tensor) -> None:
        """Copy an adapter's A, (ranks, in), to its rows."""
        first = self.out_features + hot * self.hot_ranks
        self._whole[first : first + len(a)] = a


class HotAdapters:
    """Owns which adapters are hot: the ones of recent steps, as far as they are of low rank and not too many."""

    def __init__(self, linears: Mapping[int, Linear], table_slots: int, device: torch.device) -> None:
        self.by_slot = torch.zeros(table_slots, dtype=torch.int32, device=device)  # each adapter's place among the hot
        self._known = [0] * table_slots  # what is there
        self._linears = {site: linear for site, linear in linears.items() if isinstance(linear, HotLinear)}
        self._places: OrderedDict[str, int] = OrderedDict()  # by digest, the one used last at the end
        self._seen: dict[str, bool] = {}  # adapters of the last step that had any: whether each is of low rank

    def __bool__(self) -> bool:
        """Whether an adapter can be hot."""
        return bool(self._linears)

    def heat(self, adapters: Mapping[str, AdapterRow], arena: Tensor) -> bool:
        """Make the adapters of a step hot, by digest; False if they cannot all be, and then none changes.

        An adapter is copied in its second step in a row, so that a prompt that asks for one token costs no copy. Copies
        are in stream order: steps that were launched before read what was there.
        """
        seen = self._seen  # there are many sites: an adapter of every step is looked at once
        self._seen = {
            digest: seen[digest] if digest in seen else self._fits(adapter) for digest, adapter in adapters.items()
        }
        if not all(digest in self._places or digest in seen for digest in adapters):
            return False
        if not self or len(adapters) > HOT_ADAPTERS or not all(self._seen.values()):
            return False
        for digest in adapters:
            if digest in self._places:
                self._places.move_to_end(digest)
        for digest, adapter in adapters.items():
            if digest not in self._places:
                self._places[digest] = self._free_place()
                self._copy(self._places[digest], adapter, arena)
            self._tell(adapter.slot, self._places[digest])
        return True

    def _fits(self, adapter: AdapterRow) -> bool:
        sites = ((adapter.layout.sites[site], linear) for site, linear in self._linears.items())
        return all(site is None or site.rank <= linear.hot_ranks for site, linear in sites)

    def _free_place(self) -> int:
        """A place that no adapter has, or that of the one that was used longest ago."""
        return len(self._places) if len(self._places) < HOT_ADAPTERS else self._places.popitem(last=False)[1]

    def _copy(self, place: int, adapter: AdapterRow, arena: Tensor) -> None:
        for index, linear in self._linears.items():
            site = adapter.layout.sites[index]
            if site is not None and site.rank:
                a = arena[adapter.first + site.a.start : adapter.first + site.a.stop]
                linear.place(place, a[: site.rank * linear.in_features].view(site.rank, linear.in_features))

    def _tell(self, slot: int, place: int) -> None:
        if self._known[slot] != place:
            self._known[slot] = place
            self.by_slot[slot].fill_(place)
