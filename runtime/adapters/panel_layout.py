"""Where each matrix of an adapter lies in its extent of bytes, for the compiled CPU kernels.

Sites follow one another in index order, those of norms last. A site begins with the A matrices of its parts, stacked
into one matrix of panels (sum of the parts' ranks, in), and a float32 scale for each rank. Then each part has its B in
panels (out, rank), and in float32 its gains and its bias, scaled. The embedding's A is a row of ranks for each token.
Weights keep the dtype of the file, so nothing is rounded and they take no more memory than there; where A and B have
several dtypes they are widened to float32. A part's own weight (out, in) lies in panels of its own dtype, that of the
embedding row by row; single rows of it, and a norm's weight, in float32.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from kernels.cpu.compiled import structs
from kernels.cpu.compiled.library import load
from kernels.cpu.compiled.panels import GROUP
from kernels.cpu.compiled.structs import PANEL
from runtime.adapter_format.canonical import AdapterConfig
from runtime.adapter_format.safetensors_header import Header
from runtime.adapter_format.tensors import WEIGHT_LEAF
from runtime.adapter_format.weight_dtypes import HELD, widened
from runtime.adapters.layout import check_ranks
from runtime.adapters.parts import AdaptedPart, BaseWeights, PartContent, adapted_sites, stored, tensor_names
from runtime.models.config import ModelConfig

TYPES = {"F32": 0, "BF16": 1, "F16": 2}  # as panels.h numbers them
ALIGNMENT = 64  # bytes: one cache line
PIECE_BYTES = 1 << 20  # of an own weight, written between two pauses
SITE: np.dtype[Any] = np.dtype(structs.LoraSite)
SITE_ADDRESSES, PART_ADDRESSES = ("a", "scales"), ("b", "bias", "gain", "weight", "tokens", "rows")


class PartPlace(NamedTuple):
    """One changed projection of a site; places are bytes from the start of the extent, None for what it lacks."""

    part: AdaptedPart
    first_rank: int
    b: slice | None
    bias: slice | None
    gain: slice | None
    weight: slice | None
    weight_dtype: str  # as safetensors names it
    tokens: slice | None
    rows: slice | None


class SitePlace(NamedTuple):
    """The changed projections of one site, which share their input."""

    k: int
    embedding: bool
    ranks: int
    a: slice | None
    scales: slice | None
    parts: tuple[PartPlace, ...]


class PanelLayout(NamedTuple):
    """The layout of one adapter; its elements are bytes."""

    dtype: str  # of A and B, as safetensors names it
    sites: tuple[SitePlace | None, ...]  # by site index; None where the adapter changes nothing
    table: np.ndarray  # of SITE, with places instead of addresses; 0 for none
    elements: int
    base: BaseWeights | None

    def check_ranks(self, most: int) -> None:
        """Raises InvalidAdapter for the first module whose rank is over `most`, the engine's max_lora_rank."""
        parts = (place.part for site in filter(None, self.sites) for place in site.parts)
        check_ranks(((part.module, part.rank) for part in parts), most)

    def pack(
        self,
        config: AdapterConfig,
        header: Header,
        data: np.ndarray,
        extent: Tensor,
        pause: Callable[[], None] = lambda: None,
    ) -> None:
        """Write a canonical file, `data` (bytes), into an extent of at least `elements` bytes.

        Calls `pause` before each matrix. Raises InvalidAdapter for a part of DoRA without length.
        """
        memory = extent.numpy()
        for site in filter(None, self.sites):
            if site.scales is not None:
                memory[site.scales] = 0
            if site.a is not None and not site.embedding:
                memory[site.a] = 0  # ranks that fill the last panel
            for place in site.parts:
                scale = config.scales.get(place.part.module, 1.0)
                if place.b is not None:
                    self._pack_lora(site, place, scale, header, data, memory, pause)
                self._pack_replacements(place, PartContent(place.part, scale, header, data, self.base), memory, pause)

    def _pack_lora(
        self,
        site: SitePlace,
        place: PartPlace,
        scale: float,
        header: Header,
        data: np.ndarray,
        memory: np.ndarray,
        pause: Callable[[], None],
    ) -> None:
        part, first = place.part, place.first_rank
        names = tensor_names(part.module, site.embedding)
        memory[site.scales].view(np.float32)[first : first + part.rank] = scale
        pause()
        a = self._matrix(header, data, names.a)
        if site.embedding:
            memory[site.a].view(a.dtype).reshape(site.k, part.rank)[:] = a.T
        else:
            _write(self.dtype, a, first, memory[site.a])
        pause()
        memory[place.b] = 0
        _write(self.dtype, self._matrix(header, data, names.b), 0, memory[place.b])

    def _pack_replacements(
        self, place: PartPlace, content: PartContent, memory: np.ndarray, pause: Callable[[], None]
    ) -> None:
        gains = None
        if place.gain is not None:
            memory[place.gain].view(np.float32)[:] = gains = content.gains(pause)
        if place.bias is not None:
            memory[place.bias].view(np.float32)[:] = content.bias(gains)
        if place.weight is not None:
            pause()
            _pack_weight(place, content, memory[place.weight], pause)
        if place.tokens is not None and place.rows is not None:
            tokens, rows = content.rows()
            memory[place.tokens].view(np.int32)[:] = tokens
            memory[place.rows].view(np.float32).reshape(rows.shape)[:] = rows

    def views(self, extent: Tensor) -> np.ndarray:
        """The weights of every site, by index: the kernels' `LoraSite` for an extent in its place."""
        table, base = self.table.copy(), extent.data_ptr()
        of_sites = [table[name] for name in SITE_ADDRESSES]
        for addresses in (*of_sites, *(table["parts"][name] for name in PART_ADDRESSES)):
            np.add(addresses, base, out=addresses, where=addresses != 0)
        return table

    def _matrix(self, header: Header, data: np.ndarray, name: str) -> np.ndarray:
        values, dtype = stored(header, data, name)
        return values if dtype == self.dtype else widened(values, dtype)


def _write(dtype: str, matrix: np.ndarray, first: int, panels: np.ndarray) -> None:
    """Write a matrix (columns, k) from a column of the panels on."""
    matrix = np.ascontiguousarray(matrix)
    columns, k = matrix.shape
    source, target = matrix.ctypes.data, panels.ctypes.data
    load().panels_write(TYPES[dtype], source, k, 1, columns, k, first, 1, target)


def _pack_weight(place: PartPlace, content: PartContent, target: np.ndarray, pause: Callable[[], None]) -> None:
    """Write a part's own weight in pieces, because a head has hundreds of megabytes."""
    if place.part.is_norm:
        target.view(np.float32)[:] = content.norm_weight()
        return
    values, dtype = stored(content.header, content.data, f"{place.part.module}.{WEIGHT_LEAF}")
    rows, columns = values.shape
    step = -(-PIECE_BYTES // (columns * values.itemsize) // PANEL) * PANEL
    panel = _panels_bytes(TYPES[dtype], PANEL, columns)
    for first in range(0, rows, step):
        pause()
        piece = values[first : first + step]
        if place.part.embedding:
            target.view(values.dtype).reshape(rows, columns)[first : first + step] = piece
        else:
            written = target[first // PANEL * panel :][: -(-len(piece) // PANEL) * panel]
            written[:] = 0
            _write(dtype, piece, 0, written)


def layout_in_panels(
    model: ModelConfig, config: AdapterConfig, header: Header, base: BaseWeights | None = None
) -> PanelLayout:
    """Lay out a canonical file's tensors. Raises InvalidAdapter if they do not fit this model."""
    held = {
        entry.dtype for name, entry in header.tensors.items() if name.rpartition(".lora_")[2][:1] in ("A", "B", "e")
    }
    dtype = held.pop() if len(held) == 1 else "F32"
    places = _Places(dtype)
    sites = [_place_site(parts, header, base, places) for parts in adapted_sites(model, config, header)]
    return PanelLayout(dtype, tuple(sites), _table(model, sites, dtype), places.end, base)


def _panels_bytes(type: int, columns: int, k: int) -> int:
    size: int = load().panels_bytes(type, columns, k, GROUP)
    return size


class _Places:
    """Consecutive aligned ranges of bytes; the first begins past 0, which means none in a table."""

    def __init__(self, dtype: str) -> None:
        self._type, self._item = TYPES[dtype], HELD[dtype].itemsize
        self.end = ALIGNMENT

    def take(self, size: int) -> slice:
        start = self.end
        self.end += -(-size // ALIGNMENT) * ALIGNMENT
        return slice(start, start + size)

    def floats(self, count: int) -> slice:
        return self.take(count * 4)

    def panels(self, columns: int, k: int, dtype: str | None = None) -> slice:
        return self.take(_panels_bytes(self._type if dtype is None else TYPES[dtype], columns, k))

    def items(self, count: int) -> slice:
        return self.take(count * self._item)


def _place_site(
    parts: list[AdaptedPart], header: Header, base: BaseWeights | None, places: _Places
) -> SitePlace | None:
    if not parts:
        return None
    k, embedding, ranks = parts[0].inputs, parts[0].embedding, sum(part.rank for part in parts)
    a = scales = None
    if ranks:
        a = places.items(ranks * k) if embedding else places.panels(ranks, k)
        scales = places.floats(-(-ranks // PANEL) * PANEL)
    placed = []
    first = 0
    for part in parts:
        placed.append(_place_part(part, first, header, base, places))
        first += part.rank
    return SitePlace(k, embedding, ranks, a, scales, tuple(placed))


def _place_part(
    part: AdaptedPart, first_rank: int, header: Header, base: BaseWeights | None, places: _Places
) -> PartPlace:
    dtype = header.tensors[f"{part.module}.{WEIGHT_LEAF}"].dtype if part.own_weight else "F32"
    weight = None
    if part.own_weight and part.embedding:
        weight = places.take(part.inputs * part.width * HELD[dtype].itemsize)
    elif part.own_weight:
        weight = places.panels(part.width, part.inputs, dtype) if part.inputs else places.floats(part.width)
    return PartPlace(
        part=part,
        first_rank=first_rank,
        b=places.panels(part.width, part.rank) if part.rank else None,
        bias=places.floats(part.width) if part.has_bias(base) else None,
        gain=places.floats(part.width) if part.gains else None,
        weight=weight,
        weight_dtype=dtype,
        tokens=places.floats(len(part.tokens)) if part.tokens else None,
        rows=places.floats(len(part.tokens) * (part.width if part.embedding else part.inputs)) if part.tokens else None,
    )


def _table(model: ModelConfig, sites: list[SitePlace | None], dtype: str) -> np.ndarray:
    table = np.zeros(len(sites), SITE)
    for index, (row, site) in enumerate(zip(table, sites, strict=True)):
        if site is None:
            continue
        row["ranks"], row["type"] = site.ranks, TYPES[dtype]
        _set(row, site, SITE_ADDRESSES)
        for place in site.parts:
            entry = row["parts"][place.part.place]
            _set(entry, place, PART_ADDRESSES)
            entry["first_rank"], entry["ranks"] = place.first_rank, place.part.rank
            entry["type"], entry["count"] = TYPES[place.weight_dtype], len(place.part.tokens)
            gate = model.fused_width(index)
            if gate is not None:  # one module is both projections, whose panels follow each other
                row["parts"][1] = entry
                _pass_over_gate(row["parts"][1], place.part, gate, TYPES[dtype])
    return table


def _pass_over_gate(entry: Any, part: AdaptedPart, gate: int, type: int) -> None:
    sizes = {
        "b": _panels_bytes(type, gate, part.rank),
        "weight": _panels_bytes(int(entry["type"]), gate, part.inputs),
        "bias": 4 * gate,
        "gain": 4 * gate,
    }
    for name, size in sizes.items():
        if entry[name]:
            entry[name] += size


def _set(entry: Any, places: SitePlace | PartPlace, names: tuple[str, ...]) -> None:
    for name in names:
        place = getattr(places, name)
        entry[name] = 0 if place is None else place.start
