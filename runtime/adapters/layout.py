"""Where each matrix of an adapter lies in its extent, packed at its own ranks, and how it is written there.

Sites follow one another in index order. A site begins with the A matrices of its parts, stacked into one block of
(sum of the parts' ranks, in). Then each part has its B matrix, transposed to (rank, out), and its bias; scales are
folded into both. The embedding's A is transposed too, so that a token reads one row. Projections that the adapter does
not adapt take no space.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from kernels.cpu.grouped_lora import PartWeights, SiteWeights
from runtime.adapter_format.canonical import AdapterConfig
from runtime.adapter_format.errors import InvalidAdapter
from runtime.adapter_format.safetensors_header import Header
from runtime.adapter_format.weight_dtypes import HELD, widened
from runtime.models.config import ModelConfig, Site

ALIGNMENT = 16  # elements: 64 bytes of float32, one cache line and one vector
Sites = list[SiteWeights | None]  # the weights of an adapter, by site index
PIECE_ELEMENTS = (1 << 15) - 1  # of one torch operation: for more elements torch uses several threads


class Layout(Protocol):
    """Where the matrices of one adapter lie in an extent, in the order that a runner's kernels read."""

    @property
    def elements(self) -> int:
        """The size of the extent, in elements of the tier's dtype."""
        ...

    def check_ranks(self, most: int) -> None:
        """Raises InvalidAdapter for the first module whose rank is over `most`, the engine's max_lora_rank."""
        ...

    def pack(
        self, config: AdapterConfig, header: Header, data: np.ndarray, extent: Tensor, pause: Callable[[], None]
    ) -> None:
        """Write a canonical file, `data` (bytes), into an extent; call `pause` before each matrix."""
        ...

    def views(self, extent: Tensor) -> Any:
        """The weights of every site, as the runner's kernels take them."""
        ...


LayOut = Callable[[ModelConfig, AdapterConfig, Header], Layout]


class PartLayout(NamedTuple):
    """One adapted projection of a site."""

    module: str
    columns: slice  # of the site's output
    ranks: slice  # its rows in the site's A
    b: slice  # elements of the extent
    bias: slice | None  # elements of the extent


class SiteLayout(NamedTuple):
    """The adapted projections of one site, which share their input."""

    in_features: int
    rank: int  # the sum of the parts' ranks
    a: slice  # elements of the extent
    embedding: bool
    parts: tuple[PartLayout, ...]

    def rows(self, part: PartLayout) -> slice:
        """The elements of a part's A; the embedding has one part, whose A is the site's."""
        if self.embedding:
            return self.a
        first, last = part.ranks.start * self.in_features, part.ranks.stop * self.in_features
        return slice(self.a.start + first, self.a.start + last)


class AdapterLayout(NamedTuple):
    """The layout of one adapter for PyTorch and Triton."""

    sites: tuple[SiteLayout | None, ...]  # by site index; None where the adapter does not adapt the site
    elements: int

    def check_ranks(self, most: int) -> None:
        """Raises InvalidAdapter for the first module whose rank is over `most`, the engine's max_lora_rank."""
        parts = (part for site in filter(None, self.sites) for part in site.parts)
        check_ranks(((part.module, part.ranks.stop - part.ranks.start) for part in parts), most)

    def pack(
        self,
        config: AdapterConfig,
        header: Header,
        data: np.ndarray,
        extent: Tensor,
        pause: Callable[[], None] = lambda: None,
    ) -> None:
        """Scale, transpose and stack a canonical file, `data` (bytes), into an extent of at least `elements`.

        Calls `pause` before each matrix.
        """
        writer = ExtentWriter(extent)
        for site in filter(None, self.sites):
            for part in site.parts:
                scale = config.scales[part.module]
                names = tensor_names(part.module, site.embedding)
                pause()
                a, dtype = stored(header, data, names.a)
                writer.write(site.rows(part), a.T if site.embedding else a, dtype)
                pause()
                b, dtype = stored(header, data, names.b)
                writer.write(part.b, b.T, dtype, scale)
                if part.bias is not None:
                    writer.write(part.bias, *stored(header, data, names.bias), scale)

    def views(self, extent: Tensor) -> Sites:
        """The weights of every site as views of the extent (at least `elements`, in the arena's dtype)."""
        with torch.inference_mode():  # makes a view in a third of the time
            return [None if site is None else _site_views(site, extent) for site in self.sites]


def check_ranks(ranks: Iterable[tuple[str, int]], most: int) -> None:
    """Raises InvalidAdapter for the first module whose rank is over `most`, the engine's max_lora_rank."""
    for module, rank in ranks:
        if rank > most:
            raise InvalidAdapter(
                module, f"has rank {rank}, and max_lora_rank is {most}", f"start the server with --max-lora-rank {rank}"
            )


class TensorNames(NamedTuple):
    """The tensors of one module in a canonical file."""

    a: str
    b: str
    bias: str


def layout_adapter(model: ModelConfig, config: AdapterConfig, header: Header) -> AdapterLayout:
    """Lay out a canonical file's tensors. Raises InvalidAdapter if they do not fit this model."""
    offsets = _Offsets()
    sites = model.sites()
    layouts = [_lay_out_site(site, i == model.embed_site, header, offsets) for i, site in enumerate(sites)]
    placed = {part.module for layout in filter(None, layouts) for part in layout.parts}
    for module in config.scales.keys() ^ placed:
        raise InvalidAdapter(module, "is not a projection of this model")
    return AdapterLayout(tuple(layouts), offsets.end)


class _Offsets:
    """Consecutive aligned ranges of elements."""

    def __init__(self) -> None:
        self.end = 0

    def take(self, count: int) -> slice:
        start = self.end
        self.end += -(-count // ALIGNMENT) * ALIGNMENT
        return slice(start, start + count)


def _lay_out_site(site: Site, embedding: bool, header: Header, offsets: _Offsets) -> SiteLayout | None:
    adapted = list(_adapted_parts(site, embedding, header))
    if not adapted:
        return None
    rank = sum(part_rank for _, _, part_rank in adapted)
    a = offsets.take(rank * site.in_features)
    parts = []
    first = 0
    for module, columns, part_rank in adapted:
        out_features = columns.stop - columns.start
        b = offsets.take(part_rank * out_features)
        biased = tensor_names(module, embedding).bias in header.tensors
        bias = offsets.take(out_features) if biased else None
        parts.append(PartLayout(module, columns, slice(first, first + part_rank), b, bias))
        first += part_rank
    return SiteLayout(site.in_features, rank, a, embedding, tuple(parts))


def _adapted_parts(site: Site, embedding: bool, header: Header) -> Iterator[tuple[str, slice, int]]:
    """Module, output columns and rank of each part that the adapter adapts."""
    column = 0
    for module, out_features in site.parts:
        columns = slice(column, column + out_features)
        column += out_features
        names = tensor_names(module, embedding)
        if names.a not in header.tensors or names.b not in header.tensors:
            continue
        a, b = header.tensors[names.a].shape, header.tensors[names.b].shape
        if a != (a[0], site.in_features) or b != (out_features, a[0]):
            raise InvalidAdapter(module, f"has A {list(a)} and B {list(b)}, which do not fit this model")
        yield module, columns, a[0]


def tensor_names(module: str, embedding: bool) -> TensorNames:
    """Return the names of a module's tensors; an embedding's A and B have names of their own."""
    a, b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    return TensorNames(f"{module}.{a}", f"{module}.{b}", f"{module}.lora_B.bias")


def stored(header: Header, data: np.ndarray, name: str) -> tuple[np.ndarray, str]:
    """Return a tensor as the file holds it, and its dtype there."""
    dtype, shape, start, stop = header.tensors[name]
    held = data[header.data_offset + start : header.data_offset + stop].view(HELD[dtype])
    return held.reshape(shape), dtype


def _site_views(site: SiteLayout, extent: Tensor) -> SiteWeights:
    """One operation a matrix: an adapter has hundreds, and the first step that uses it waits for all of them."""
    start = extent.storage_offset()
    strides = (site.rank, 1) if site.embedding else (1, site.in_features)
    a = extent.as_strided((site.in_features, site.rank), strides, start + site.a.start)
    parts = []
    for part in site.parts:
        rank, width = part.ranks.stop - part.ranks.start, part.columns.stop - part.columns.start
        b = extent.as_strided((rank, width), (width, 1), start + part.b.start)
        bias = None if part.bias is None else extent.as_strided((width,), (1,), start + part.bias.start)
        parts.append(PartWeights(b, part.columns, part.ranks, bias))
    weights = SiteWeights(a, tuple(parts))
    on_host = extent.dtype == torch.float32 and extent.device.type == "cpu"
    return weights.on_host() if on_host else weights


class ExtentWriter:
    """Writes matrices to an extent of float32 or bfloat16 in host memory.

    A weight is multiplied by its scale in float32 and rounded once to the extent's dtype, to nearest even. numpy does
    the work, except for conversions that torch does in a third of the time, in pieces that stay on this thread.
    """

    def __init__(self, extent: Tensor) -> None:
        self._extent = extent
        self._bfloat16 = extent.dtype == torch.bfloat16
        self._elements = (extent.view(torch.uint16) if self._bfloat16 else extent).numpy()

    def write(self, place: slice, values: np.ndarray, dtype: str, scale: float = 1.0) -> None:
        """Fill a place with a matrix in row order, given as `weight_dtypes` holds it; `values` may be a view."""
        target = self._elements[place].reshape(values.shape)
        if self._bfloat16 and dtype == "BF16":
            np.copyto(target, values)
            if scale != 1.0:
                for piece in torch.split(self._extent[place], PIECE_ELEMENTS):
                    piece.mul_(scale)
            return
        exact = _half_widened(values) if dtype == "F16" else widened(values, dtype)
        if self._bfloat16:
            product = np.multiply(exact, np.float32(scale), order="C")
            _convert(torch.from_numpy(product).view(-1), self._extent[place])
        else:
            np.multiply(exact, np.float32(scale), out=target)


def _half_widened(values: np.ndarray) -> np.ndarray:
    """float16 as float32, in row order."""
    held = torch.from_numpy(np.array(values, order="C"))  # a copy: torch refuses read-only arrays
    exact = torch.empty(held.shape)
    _convert(held.view(-1), exact.view(-1))
    return exact.numpy()


def _convert(source: Tensor, target: Tensor) -> None:
    for piece, values in zip(torch.split(target, PIECE_ELEMENTS), torch.split(source, PIECE_ELEMENTS), strict=True):
        piece.copy_(values)
