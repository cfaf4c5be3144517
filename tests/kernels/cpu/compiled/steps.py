"""What the tests give the compiled kernels: numbers, rows, adapters and steps."""

import ctypes
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.cpu.compiled import structs
from kernels.cpu.compiled.library import rounds_rows
from kernels.cpu.compiled.panels import Panels, pack, quantize
from kernels.cpu.compiled.program import Part
from kernels.cpu.compiled.structs import PANEL

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TYPES = (*FLOATS, torch.int8)
GROUP = 128  # weights of a column with one scale, in int8
GAP = 16  # floats between rows
TILE = 16  # tokens
SHRUNK = 336
UNIT = 2.0**-24  # the relative error of one rounding to float32


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rows_of(values: Tensor) -> Tensor:
    """The same rows with NaN between them, as a program's buffer."""
    return torch.nn.functional.pad(values.float(), (0, GAP), value=torch.nan)[:, : values.shape[1]]


def empty_rows(rows: int, width: int) -> Tensor:
    return rows_of(torch.full((rows, width), torch.nan))


def gaps_are_kept(buffer: Tensor) -> bool:
    """Whether nothing was written between the rows of a buffer."""
    assert buffer._base is not None
    return bool(buffer._base[:, buffer.shape[1] :].isnan().all())


def same_bits(left: Tensor, right: Tensor) -> bool:
    assert left.dtype == right.dtype
    bits = torch.int32 if left.dtype == torch.float32 else torch.int16
    return torch.equal(left.contiguous().view(bits), right.contiguous().view(bits))


def in_tiles(kv: Tensor) -> Tensor:
    """A cache (slots, 2, kv_heads, head_dim) in the order that kv.h describes, in its shape."""
    return _in_tiles(kv, pairs=kv.dtype == torch.bfloat16)


def from_tiles(tiles: Tensor) -> Tensor:
    """The inverse of `in_tiles`."""
    places = torch.arange(tiles.numel()).view(tiles.shape)
    kv = torch.empty_like(tiles)
    kv.view(-1)[_in_tiles(places, pairs=tiles.dtype == torch.bfloat16).flatten()] = tiles.flatten()
    return kv


def _in_tiles(kv: Tensor, *, pairs: bool) -> Tensor:
    """With `pairs`, two neighbours of each sum lie together."""
    tokens, full = kv.unflatten(0, (-1, TILE)), kv.shape[3] // PANEL * PANEL
    keys, values, rest = (
        tokens[:, :, 0],
        tokens[:, :, 1, :, :full].unflatten(-1, (-1, PANEL)),
        tokens[:, :, 1, :, full:],
    )
    if pairs:
        keys = keys.unflatten(-1, (-1, 2)).permute(0, 2, 3, 1, 4)
        values = values.unflatten(1, (-1, 2)).permute(0, 3, 4, 1, 5, 2)
    else:
        keys, values = keys.permute(0, 2, 3, 1), values.permute(0, 2, 3, 1, 4)
    parts = keys.flatten(2), values.flatten(2), rest.permute(0, 2, 1, 3).flatten(2)
    return torch.cat(parts, 2).reshape(kv.shape)


def in_panels(weight: Tensor, type: torch.dtype) -> Panels:
    return quantize(weight) if type == torch.int8 else pack(weight.to(type))


def unpacked(panels: Panels) -> np.ndarray:
    """All columns of the panels, those that fill the last one included, as float32 (columns, k)."""
    dtype = TYPES[panels.type]
    k, count = panels.k, -(-panels.columns // PANEL)
    memory = panels.memory.reshape(count, -1)
    if dtype == torch.int8:
        pairs = memory[:, : (k + k % 2) * PANEL].view(np.int8).reshape(count, -1, PANEL, 2)
        weights = pairs.swapaxes(2, 3).reshape(count, -1, PANEL)
        assert not weights[:, k:].any()
        weights = weights[:, :k]
        exact = weights * np.repeat(_scales(panels), GROUP, 1)[:, :k]
    elif dtype == torch.bfloat16:
        pairs = memory.view(np.uint16).reshape(count, -1, PANEL, 2)
        wide = (pairs.astype(np.uint32) << 16).view(np.float32)
        assert not wide.swapaxes(2, 3).reshape(count, -1, PANEL)[:, k:].any()
        exact = wide.swapaxes(2, 3).reshape(count, -1, PANEL)[:, :k]
    else:
        held = np.float32 if dtype == torch.float32 else np.float16
        exact = memory.view(held).reshape(count, k, PANEL).astype(np.float32)
    return exact.swapaxes(1, 2).reshape(count * PANEL, k)


def scales_of(panels: Panels) -> np.ndarray:
    """The scale of each weight of int8 panels, (columns, k)."""
    scales = np.repeat(_scales(panels), GROUP, 1)[:, : panels.k]
    return scales.swapaxes(1, 2).reshape(-1, panels.k)[: panels.columns]


def _scales(panels: Panels) -> np.ndarray:
    memory = panels.memory.reshape(-(-panels.columns // PANEL), -1)
    return memory[:, (panels.k + panels.k % 2) * PANEL :].copy().view(np.float32).reshape(len(memory), -1, PANEL)


def exact_weight(panels: Panels) -> Tensor:
    """The weights that the kernels compute with, float32 (columns, k)."""
    return torch.from_numpy(unpacked(panels)[: panels.columns].copy())


def multiplied(x: Tensor, weight: Panels) -> Tensor:
    """The rows that the kernels multiply with a base's weights."""
    if weight.type == TYPES.index(torch.int8):
        groups = torch.nn.functional.pad(x, (0, -x.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
        most = groups.abs().amax(-1, keepdim=True)
        inverse = torch.tensor(32767.0) / most  # a number / a tensor is a product with a reciprocal
        rounded = torch.where(most > 0, (groups.double() * inverse.double()).round(), 0)
        return (rounded * (most / 32767).double()).flatten(1)[:, : x.shape[1]]
    return x.bfloat16().float() if weight.type == TYPES.index(torch.bfloat16) and rounds_rows() else x


class Adapted(NamedTuple):
    """One adapted projection: y += scale · (x Aᵀ) Bᵀ + bias."""

    a: Tensor  # (ranks, k)
    b: Tensor  # (columns, ranks)
    scale: float = 1.0
    bias: Tensor | None = None


class Adapter:
    """One adapter's weights at each site, as the kernels read them."""

    def __init__(self, *sites: Sequence[Adapted | None], embedding: bool = False) -> None:
        self.sites = sites
        self._kept: list[object] = []
        self.structs = (structs.LoraSite * len(sites))(*[self._lay_out(site, embedding) for site in sites])

    def _lay_out(self, site: Sequence[Adapted | None], embedding: bool) -> structs.LoraSite:
        adapted = [part for part in site if part is not None]
        if not adapted:
            return structs.LoraSite()
        a = torch.cat([part.a for part in adapted])
        scales = torch.zeros(-(-len(a) // PANEL) * PANEL)
        scales[: len(a)] = torch.cat([torch.full((len(part.a),), part.scale) for part in adapted])
        by_token, panels = a.t().contiguous(), pack(a)
        self._kept += [by_token, panels, scales]
        laid_out = structs.LoraSite(
            by_token.data_ptr() if embedding else panels.address, scales.data_ptr(), len(a), panels.type
        )
        first = 0
        for index, part in enumerate(site):
            if part is not None:
                b = pack(part.b)
                self._kept += [b, part.bias]
                bias = None if part.bias is None else part.bias.data_ptr()
                laid_out.parts[index] = structs.LoraPart(b.address, bias, first, len(part.a))
                first += len(part.a)
        return laid_out


def random_part(k: int, columns: int, ranks: int, seed: int, dtype: torch.dtype, *, bias: bool = False) -> Adapted:
    a, b = random(ranks, k, seed=seed) / k**0.5, random(columns, ranks, seed=seed + 1) / ranks**0.5
    return Adapted(a.to(dtype), b.to(dtype), 0.25 + seed % 5, random(columns, seed=seed + 2) if bias else None)


def runs_of(owners: Sequence[Adapter | None]) -> list[structs.Run]:
    """Consecutive rows under one adapter."""
    runs, row = [], 0
    for owner, group in itertools.groupby(owners):
        count = len(list(group))
        if owner is not None:
            runs.append(structs.Run(row, row + count, ctypes.addressof(owner.structs)))
        row += count
    return runs


def step_of(
    rows: int,
    owners: Sequence[Adapter | None] = (),
    *,
    logit_rows: Sequence[int] = (),
    logit_owners: Sequence[Adapter | None] = (),
    token_ids: Sequence[int] = (),
    slots: Sequence[int] = (),
    angles: tuple[Tensor, Tensor] | None = None,
    queries: Sequence[structs.Queries] = (),
) -> structs.Step:
    """A step that keeps alive what it points to; the room for shrinks is full of NaN."""
    runs, logit_runs = runs_of(owners), runs_of(logit_owners)
    each = [(structs.Run * len(runs))(*runs), (structs.Run * len(logit_runs))(*logit_runs)]
    each.append((structs.Queries * len(queries))(*queries))
    integers = [torch.tensor(list(values), dtype=torch.int32) for values in (token_ids, slots, logit_rows)]
    cosines, sines = (torch.empty(0), torch.empty(0)) if angles is None else angles
    shrunk = torch.full((max(rows, 1), SHRUNK), torch.nan)
    step = structs.Step(
        rows, len(logit_rows), len(runs), len(logit_runs), len(queries),
        integers[0].data_ptr(), integers[1].data_ptr(), cosines.data_ptr(), sines.data_ptr(), integers[2].data_ptr(),
        *map(ctypes.addressof, each),
        structs.Rows(shrunk.data_ptr(), shrunk.stride(0)),
    )  # fmt: skip
    step.kept = (integers, each, cosines, sines, shrunk, owners, logit_owners, queries)
    return step


def projected(
    x: Tensor,
    base: Sequence[Part],
    owners: Sequence[Adapter | None] = (),
    site: int = 0,
    *,
    magnitude: bool = False,
) -> list[Tensor]:
    """Each part's x Wᵀ + bias with the adapters of its rows, in float64.

    With `magnitude`, of absolute values: the error of each sum is a few roundings of that.
    """

    def wide(values: Tensor) -> Tensor:
        return values.double().abs() if magnitude else values.double()

    parts = []
    for index, (weight, bias) in enumerate(base):
        y = wide(multiplied(x, weight)) @ wide(exact_weight(weight)).t() + (0 if bias is None else wide(bias))
        for owner in dict.fromkeys(owners):
            part = None if owner is None else owner.sites[site][index]
            if part is not None:
                rows = [row for row, other in enumerate(owners) if other is owner]
                y[rows] += part.scale * (wide(x[rows]) @ wide(part.a).t() @ wide(part.b).t())
                y[rows] += 0 if part.bias is None else wide(part.bias)
        parts.append(y)
    return parts
