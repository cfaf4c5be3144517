"""What the tests give the compiled kernels: numbers, rows, adapters and steps."""

import ctypes
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.cpu.compiled import structs
from kernels.cpu.compiled.library import looks_up_bytes, rounds_rows
from kernels.cpu.compiled.panels import FLOAT8, INT4, NF4, Panels, pack, pack_codes, quantize
from kernels.cpu.compiled.program import Part
from kernels.cpu.compiled.structs import PANEL

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EMBEDDED = (*FLOATS, torch.int8)
TYPES = (*EMBEDDED, "int4", "nf4", "float8")  # as panels.h numbers them
Type = torch.dtype | str
GROUP = 128  # numbers of a row with one scale; weights of a column with one scale, in int8
GROUPS = {"int4": 32, "nf4": 64, "float8": 128}
NEGATIVE = (-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036)
POSITIVE = (0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)
BOOK = np.array([*NEGATIVE, 0.0, *POSITIVE], np.float32)  # of nf4
NF4_ONE = 31753  # what 1 is in two bytes
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


def in_panels(weight: Tensor, type: Type) -> Panels:
    if isinstance(type, str):
        return in_groups(weight, type, GROUPS[type])
    return quantize(weight) if type == torch.int8 else pack(weight.to(type))


def in_groups(weight: Tensor, type: str, group: int, order: Tensor | None = None) -> Panels:
    """Near the weights, whose k are in `order`; zero points from 0 to 16, as checkpoints have them."""
    columns, k = weight.shape
    wide = torch.nn.functional.pad(weight if order is None else weight[:, order.long()], (0, -k % group))
    wide = wide.unflatten(1, (-1, group))
    largest = wide.abs().amax(2, keepdim=True).clamp(min=1e-9)
    if type == "float8":
        floats = (wide / largest * 448).to(torch.float8_e4m3fn).flatten(1)[:, :k].contiguous()
        return pack_codes(FLOAT8, floats, largest[..., 0] / 448, None, group, order=order)
    if type == "nf4":
        codes = ((wide / largest)[..., None] - torch.from_numpy(BOOK)).abs().argmin(-1)
        held = codes.flatten(1)[:, :k].to(torch.uint8).contiguous()
        return pack_codes(NF4, held, largest[..., 0], None, group, order=order)
    zeros = (torch.arange(columns)[:, None, None] + torch.arange(wide.shape[1])[None, :, None]) % 17
    scales = largest / 8
    codes = (wide / scales + zeros).round().clamp(0, 15).flatten(1)[:, :k].to(torch.uint8)
    return pack_codes(
        INT4, codes.contiguous(), scales[..., 0], zeros[..., 0].to(torch.int8).contiguous(), group, order=order
    )


def unpacked(panels: Panels, book: np.ndarray = BOOK) -> np.ndarray:
    """All columns of the panels, those that fill the last one included, as float32 (columns, k).

    `book` has the numbers of nf4.
    """
    dtype = TYPES[panels.type]
    k, count = panels.k, -(-panels.columns // PANEL)
    memory = panels.memory.reshape(count, -1)
    if isinstance(dtype, str):
        exact = _in_groups(panels, book)
    elif dtype == torch.int8:
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


def _in_groups(panels: Panels, book: np.ndarray) -> np.ndarray:
    """Weights (panels, k, 16), by the documented layout."""
    k, whole = panels.k, -(-panels.k // 8) * 8
    memory = panels.memory.reshape(-(-panels.columns // PANEL), -1)
    size = k * PANEL if panels.type == FLOAT8 else whole * PANEL // 2
    weights, rest = memory[:, :size], memory[:, size:]
    groups = -(-k // panels.group)
    scales = rest[:, : groups * PANEL * 4].copy().view(np.float32).reshape(len(memory), groups, PANEL)
    of_k = np.arange(k) // panels.group
    if panels.type == FLOAT8:
        floats = torch.from_numpy(weights.copy()).view(torch.float8_e4m3fn).float().numpy()
        return floats.reshape(len(memory), k, PANEL) * scales[:, of_k]
    words = weights.reshape(len(memory), -1, PANEL, 4)
    codes = np.concatenate((words & 15, words >> 4), -1).swapaxes(2, 3).reshape(len(memory), whole, PANEL)[:, :k]
    if panels.type == NF4:
        return book[codes] * scales[:, of_k]
    zeros = rest[:, groups * PANEL * 4 :].view(np.int8).reshape(len(memory), groups, PANEL)
    return (codes.astype(np.float32) - zeros[:, of_k]) * scales[:, of_k]


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


def base_product(x: Tensor, weight: Panels, *, magnitude: bool = False) -> Tensor:
    """x Wᵀ of the rows and the weights that the kernels multiply, in float64; with `magnitude`, of absolute values."""

    def wide(values: Tensor) -> Tensor:
        return values.double().abs() if magnitude else values.double()

    x = x if weight.order is None else x[:, weight.order.long()]
    if weight.type == NF4 and looks_up_bytes():
        integers, scales = _in_integers(x, 127 * 257)
        book = np.rint(BOOK.astype(np.float64) * NF4_ONE)
        numbers, low = (torch.from_numpy(unpacked(weight, one)[: weight.columns]) for one in (book, _low(book)))
        products = wide(integers * scales) @ wide(numbers).t()
        without = wide(torch.from_numpy(_low(integers.numpy())) * scales) @ wide(low).t()
        return (products if magnitude else products - without) / NF4_ONE
    exact = wide(exact_weight(weight)).t()
    if weight.type in (TYPES.index(torch.int8), INT4):
        integers, scales = _in_integers(x, 127 * 257 if weight.type == INT4 else 32767)
        return wide(integers * scales) @ exact
    rounds = weight.type == TYPES.index(torch.bfloat16) and rounds_rows()
    return wide(x.bfloat16().float() if rounds else x) @ exact


def _in_integers(x: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Rows as integers, and what each is multiplied by: of 128 numbers, the largest becomes `largest`; in float64."""
    groups = torch.nn.functional.pad(x, (0, -x.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    most = groups.abs().amax(-1, keepdim=True)
    inverse = torch.tensor(float(largest)) / most  # a number / a tensor is a product with a reciprocal
    rounded = torch.where(most > 0, (groups.double() * inverse.double()).round(), 0)
    scales = (most / largest).double().expand_as(groups)
    return rounded.flatten(1)[:, : x.shape[1]], scales.flatten(1)[:, : x.shape[1]]


def _low(integers: np.ndarray) -> np.ndarray:
    """The low byte of each, with a sign."""
    return (integers + 128) % 256 - 128


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
        y = base_product(x, weight, magnitude=magnitude) + (0 if bias is None else wide(bias))
        for owner in dict.fromkeys(owners):
            part = None if owner is None else owner.sites[site][index]
            if part is not None:
                rows = [row for row, other in enumerate(owners) if other is owner]
                y[rows] += part.scale * (wide(x[rows]) @ wide(part.a).t() @ wide(part.b).t())
                y[rows] += 0 if part.bias is None else wide(part.bias)
        parts.append(y)
    return parts
