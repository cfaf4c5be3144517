"""Where each matrix of an adapter lies in its extent, packed at its own ranks, and how it is written there.

Sites follow one another in index order. A site begins with the A matrices of its parts, stacked into one block of
(sum of the parts' ranks, in). Then each part has its B matrix, transposed to (rank, out), and its bias; scales are
folded into both. The embedding's A is transposed too, so that a token reads one row. What the adapter changes besides
LoRA follows: own weights, rows of the vocabulary, gains, biases. What the adapter leaves as it is takes no space.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from kernels.cpu.grouped_lora import PartWeights, SiteWeights
from kernels.cpu.replacements import Changes
from runtime.adapter_format.canonical import AdapterConfig
from runtime.adapter_format.errors import InvalidAdapter
from runtime.adapter_format.safetensors_header import Header
from runtime.adapter_format.tensors import WEIGHT_LEAF
from runtime.adapter_format.weight_dtypes import widened
from runtime.adapters.parts import AdaptedPart, BaseWeights, PartContent, adapted_sites, stored, tensor_names
from runtime.models.config import ModelConfig

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
    """One projection of a site with A and B."""

    part: AdaptedPart
    ranks: slice  # its rows in the site's A
    b: slice  # elements of the extent
    bias: slice | None  # elements of the extent

    @property
    def module(self) -> str:
        return self.part.module

    @property
    def columns(self) -> slice:
        """The columns of the site's output."""
        return self.part.columns


class ChangesLayout(NamedTuple):
    """What one part changes besides LoRA; elements of the extent, None for what it leaves as it is."""

    part: AdaptedPart
    weight: slice | None
    rows: slice | None
    gain: slice | None
    bias: slice | None


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
    changes: tuple[tuple[ChangesLayout, ...], ...]  # besides LoRA, by site index; also of the norms' sites
    elements: int
    base: BaseWeights | None

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

        def content(part: AdaptedPart) -> PartContent:
            return PartContent(part, config.scales.get(part.module, 1.0), header, data, self.base)

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
                    writer.write(part.bias, content(part.part).bias(None), "F32")
        for layout in chain.from_iterable(self.changes):
            _write_changes(writer, layout, content(layout.part), pause)

    def can_pack_on_device(self) -> bool:
        """Whether `pack_on_device` writes all of it: nothing but A and B."""
        biased = any(part.bias is not None for site in filter(None, self.sites) for part in site.parts)
        return not biased and not any(self.changes)

    @torch.inference_mode()
    def pack_on_device(self, config: AdapterConfig, tensors: Mapping[str, Tensor], extent: Tensor) -> None:
        """As `pack`, from tensors on the extent's own device, by their names in the canonical file."""
        for site in filter(None, self.sites):
            for part in site.parts:
                names = tensor_names(part.module, site.embedding)
                a, b = tensors[names.a], tensors[names.b].t()
                a = a.t() if site.embedding else a
                extent[site.rows(part)].view(a.shape).copy_(a)
                scale = config.scales[part.module]
                extent[part.b].view(b.shape).copy_(b if scale == 1.0 else b.float() * scale)

    def views(self, extent: Tensor) -> Sites:
        """The weights of every site as views of the extent (at least `elements`, in the arena's dtype)."""
        with torch.inference_mode():  # makes a view in a third of the time
            found: Sites = [None if site is None else _site_views(site, extent) for site in self.sites]
            found += [None] * (len(self.changes) - len(found))
            for index, layouts in enumerate(self.changes):
                if layouts:
                    weights = found[index] or SiteWeights(extent[:0], ())
                    found[index] = weights._replace(changes=_changes_views(layouts, extent))
            return found


def check_ranks(ranks: Iterable[tuple[str, int]], most: int) -> None:
    """Raises InvalidAdapter for the first module whose rank is over `most`, the engine's max_lora_rank."""
    for module, rank in ranks:
        if rank > most:
            raise InvalidAdapter(
                module, f"has rank {rank}, and max_lora_rank is {most}", f"start the server with --max-lora-rank {rank}"
            )


def layout_adapter(
    model: ModelConfig, config: AdapterConfig, header: Header, base: BaseWeights | None = None
) -> AdapterLayout:
    """Lay out a canonical file's tensors. Raises InvalidAdapter if they do not fit this model."""
    offsets = _Offsets()
    parts = adapted_sites(model, config, header)
    sites = tuple(_lay_out_site(each, base, offsets) for each in parts[: len(model.sites())])
    changes = tuple(tuple(_lay_out_changes(each, base, offsets)) for each in parts)
    return AdapterLayout(sites, changes, offsets.end, base)


def layout_without_weights(
    model: ModelConfig, config: AdapterConfig, header: Header, base: BaseWeights | None = None
) -> AdapterLayout:
    """Lay out an adapter as `layout_adapter` does, for Triton's kernels.

    Raises InvalidAdapter for weights of its own, which those kernels lack.
    """
    layout = layout_adapter(model, config, header, base)
    for change in chain.from_iterable(layout.changes):
        if change.weight is not None or change.rows is not None:
            own = "weights of the adapter's own (modules_to_save, trainable_token_indices)"
            step = "set kernels (--kernels) to compiled or torch"
            raise InvalidAdapter(change.part.module, f"has {own}, which the triton kernels lack", step)
    return layout


class _Offsets:
    """Consecutive aligned ranges of elements."""

    def __init__(self) -> None:
        self.end = 0

    def take(self, count: int) -> slice:
        start = self.end
        self.end += -(-count // ALIGNMENT) * ALIGNMENT
        return slice(start, start + count)


def _lay_out_site(parts: list[AdaptedPart], base: BaseWeights | None, offsets: _Offsets) -> SiteLayout | None:
    adapted = [part for part in parts if part.rank]
    if not adapted:
        return None
    inputs, rank = adapted[0].inputs, sum(part.rank for part in adapted)
    a = offsets.take(rank * inputs)
    layouts = []
    first = 0
    for part in adapted:
        b = offsets.take(part.rank * part.width)
        bias = offsets.take(part.width) if part.has_bias(base) and not part.gains else None
        layouts.append(PartLayout(part, slice(first, first + part.rank), b, bias))
        first += part.rank
    return SiteLayout(inputs, rank, a, adapted[0].embedding, tuple(layouts))


def _lay_out_changes(parts: list[AdaptedPart], base: BaseWeights | None, offsets: _Offsets) -> Iterator[ChangesLayout]:
    """What each part changes besides LoRA; a bias beside LoRA without gains is LoRA's."""
    for part in parts:
        biased = part.has_bias(base) and (part.gains or not part.rank)
        if not (part.own_weight or part.tokens or part.gains or biased):
            continue
        hidden = part.width if part.embedding else part.inputs
        yield ChangesLayout(
            part=part,
            weight=offsets.take(part.width * max(part.inputs, 1)) if part.own_weight else None,
            rows=offsets.take(len(part.tokens) * hidden) if part.tokens else None,
            gain=offsets.take(part.width) if part.gains else None,
            bias=offsets.take(part.width) if biased else None,
        )


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


def _changes_views(layouts: Sequence[ChangesLayout], extent: Tensor) -> tuple[Changes, ...]:
    def view(place: slice | None, *shape: int) -> Tensor | None:
        return None if place is None else extent[place].view(shape)

    found = []
    for part, weight, rows, gain, bias in layouts:
        matrix = (part.inputs, part.width) if part.embedding else (part.width, part.inputs)
        tokens = torch.from_numpy(part.ordered_tokens()[0]).long() if part.tokens else None
        found.append(
            Changes(
                columns=part.columns,
                weight=view(weight, *(matrix if part.inputs else (part.width,))),
                tokens=tokens,
                rows=view(rows, len(part.tokens), part.width if part.embedding else part.inputs),
                gain=view(gain, part.width),
                bias=view(bias, part.width),
            )
        )
    return tuple(found)


def _write_changes(
    writer: "ExtentWriter", layout: ChangesLayout, content: PartContent, pause: Callable[[], None]
) -> None:
    pause()
    gains = None
    if layout.gain is not None:
        gains = content.gains(pause)
        writer.write(layout.gain, gains, "F32")
    if layout.bias is not None:
        writer.write(layout.bias, content.bias(gains), "F32")
    if layout.weight is not None and content.part.is_norm:
        writer.write(layout.weight, content.norm_weight(), "F32")
    elif layout.weight is not None:
        writer.write(layout.weight, *stored(content.header, content.data, f"{content.part.module}.{WEIGHT_LEAF}"))
    if layout.rows is not None:
        writer.write(layout.rows, content.rows()[1], "F32")


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
