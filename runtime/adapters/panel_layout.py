"""Where each matrix of an adapter lies in its extent of bytes, for the compiled CPU kernels.

Sites follow one another in index order. A site begins with the A matrices of its parts, stacked into one matrix of
panels (sum of the parts' ranks, in), and a float32 scale for each rank. Then each part has its B in panels (out, rank),
and its bias in float32, scaled. The embedding's A is a row of ranks for each token. Weights keep the dtype of the file,
so nothing is rounded and they take no more memory than there; a file of several dtypes is widened to float32.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from kernels.cpu.compiled import structs
from kernels.cpu.compiled.library import load
from kernels.cpu.compiled.panels import GROUP
from kernels.cpu.compiled.structs import PANEL
from runtime.adapter_format.canonical import AdapterConfig
from runtime.adapter_format.errors import InvalidAdapter
from runtime.adapter_format.safetensors_header import Header
from runtime.adapter_format.weight_dtypes import HELD, widened
from runtime.adapters.layout import check_ranks, stored, tensor_names
from runtime.models.config import ModelConfig, Site

TYPES = {"F32": 0, "BF16": 1, "F16": 2}  # as panels.h numbers them
ALIGNMENT = 64  # bytes: one cache line
SITE: np.dtype[Any] = np.dtype(structs.LoraSite)
ADDRESSES = ("a", "scales")  # of a site; and "b" and "bias" of its parts


class PartPlace(NamedTuple):
    """One adapted projection of a site; places are bytes from the start of the extent."""

    module: str
    projection: int  # its place among the site's projections
    columns: int
    first_rank: int
    ranks: int
    b: slice
    bias: slice | None


class SitePlace(NamedTuple):
    """The adapted projections of one site, which share their input."""

    k: int
    embedding: bool
    ranks: int
    a: slice
    scales: slice
    parts: tuple[PartPlace, ...]


class PanelLayout(NamedTuple):
    """The layout of one adapter; its elements are bytes."""

    dtype: str  # as safetensors names it
    sites: tuple[SitePlace | None, ...]  # by site index; None where the adapter does not adapt the site
    table: np.ndarray  # of SITE, with places instead of addresses; 0 for none
    elements: int

    def check_ranks(self, most: int) -> None:
        """Raises InvalidAdapter for the first module whose rank is over `most`, the engine's max_lora_rank."""
        parts = (part for site in filter(None, self.sites) for part in site.parts)
        check_ranks(((part.module, part.ranks) for part in parts), most)

    def pack(
        self,
        config: AdapterConfig,
        header: Header,
        data: np.ndarray,
        extent: Tensor,
        pause: Callable[[], None] = lambda: None,
    ) -> None:
        """Write a canonical file, `data` (bytes), into an extent of at least `elements` bytes.

        Calls `pause` before each matrix.
        """
        memory = extent.numpy()
        for site in filter(None, self.sites):
            scales = memory[site.scales].view(np.float32)
            scales[:] = 0.0
            if not site.embedding:
                memory[site.a] = 0  # ranks that fill the last panel
            for part in site.parts:
                names = tensor_names(part.module, site.embedding)
                scale = np.float32(config.scales[part.module])
                scales[part.first_rank : part.first_rank + part.ranks] = scale
                pause()
                a = self._matrix(header, data, names.a)
                if site.embedding:
                    memory[site.a].view(a.dtype).reshape(site.k, part.ranks)[:] = a.T
                else:
                    self._write(a, part.first_rank, memory[site.a])
                pause()
                memory[part.b] = 0
                self._write(self._matrix(header, data, names.b), 0, memory[part.b])
                if part.bias is not None:
                    values, dtype = stored(header, data, names.bias)
                    np.multiply(widened(values, dtype), scale, out=memory[part.bias].view(np.float32))

    def views(self, extent: Tensor) -> np.ndarray:
        """The weights of every site, by index: the kernels' `LoraSite` for an extent in its place."""
        table, base = self.table.copy(), extent.data_ptr()
        for addresses in (*(table[name] for name in ADDRESSES), table["parts"]["b"], table["parts"]["bias"]):
            np.add(addresses, base, out=addresses, where=addresses != 0)
        return table

    def _matrix(self, header: Header, data: np.ndarray, name: str) -> np.ndarray:
        values, dtype = stored(header, data, name)
        return values if dtype == self.dtype else widened(values, dtype)

    def _write(self, matrix: np.ndarray, first: int, panels: np.ndarray) -> None:
        """Write a matrix (columns, k) from a column of the panels on."""
        matrix = np.ascontiguousarray(matrix)
        columns, k = matrix.shape
        source, target = matrix.ctypes.data, panels.ctypes.data
        load().panels_write(TYPES[self.dtype], source, k, 1, columns, k, first, target)


def layout_in_panels(model: ModelConfig, config: AdapterConfig, header: Header) -> PanelLayout:
    """Lay out a canonical file's tensors. Raises InvalidAdapter if they do not fit this model."""
    held = {entry.dtype for entry in header.tensors.values()}
    dtype = held.pop() if len(held) == 1 else "F32"
    places = _Places(dtype)
    sites = [_place_site(site, i == model.embed_site, header, places) for i, site in enumerate(model.sites())]
    placed = {part.module for site in filter(None, sites) for part in site.parts}
    for module in config.scales.keys() ^ placed:
        raise InvalidAdapter(module, "is not a projection of this model")
    return PanelLayout(dtype, tuple(sites), _table(model, sites, dtype), places.end)


class _Places:
    """Consecutive aligned ranges of bytes; the first begins past 0, which means none in a table."""

    def __init__(self, dtype: str) -> None:
        self._type, self._item = TYPES[dtype], HELD[dtype].itemsize
        self.end = ALIGNMENT

    def take(self, size: int) -> slice:
        start = self.end
        self.end += -(-size // ALIGNMENT) * ALIGNMENT
        return slice(start, start + size)

    def panels(self, columns: int, k: int) -> slice:
        return self.take(load().panels_bytes(self._type, columns, k, GROUP))

    def items(self, count: int) -> slice:
        return self.take(count * self._item)


def _place_site(site: Site, embedding: bool, header: Header, places: _Places) -> SitePlace | None:
    adapted = list(_adapted(site, embedding, header))
    if not adapted:
        return None
    ranks = sum(rank for _, _, _, rank in adapted)
    a = places.items(ranks * site.in_features) if embedding else places.panels(ranks, site.in_features)
    scales = places.take(-(-ranks // PANEL) * PANEL * 4)
    parts = []
    first = 0
    for module, index, columns, rank in adapted:
        b = places.panels(columns, rank)
        biased = tensor_names(module, embedding).bias in header.tensors
        bias = places.take(columns * 4) if biased else None
        parts.append(PartPlace(module, index, columns, first, rank, b, bias))
        first += rank
    return SitePlace(site.in_features, embedding, ranks, a, scales, tuple(parts))


def _adapted(site: Site, embedding: bool, header: Header) -> Iterator[tuple[str, int, int, int]]:
    """Module, place among the site's projections, columns and rank of each part that the adapter adapts."""
    for index, (module, columns) in enumerate(site.parts):
        names = tensor_names(module, embedding)
        if names.a not in header.tensors or names.b not in header.tensors:
            continue
        a, b = header.tensors[names.a].shape, header.tensors[names.b].shape
        if a != (a[0], site.in_features) or b != (columns, a[0]):
            raise InvalidAdapter(module, f"has A {list(a)} and B {list(b)}, which do not fit this model")
        yield module, index, columns, a[0]


def _table(model: ModelConfig, sites: list[SitePlace | None], dtype: str) -> np.ndarray:
    table = np.zeros(len(sites), SITE)
    for index, (row, site) in enumerate(zip(table, sites, strict=True)):
        if site is None:
            continue
        row["a"], row["scales"], row["ranks"], row["type"] = site.a.start, site.scales.start, site.ranks, TYPES[dtype]
        for part in site.parts:
            bias = 0 if part.bias is None else part.bias.start
            row["parts"][part.projection] = part.b.start, bias, part.first_rank, part.ranks
            gate = model.fused_width(index)
            if gate is not None:  # one module is both projections, whose panels follow each other
                up = part.b.start + load().panels_bytes(TYPES[dtype], gate, part.ranks, GROUP)
                row["parts"][1] = up, bias and bias + 4 * gate, part.first_rank, part.ranks
    return table
