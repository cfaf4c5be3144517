"""The tuner's cases of the grouped LoRA kernels: the four sites of a layer, with one configuration for all."""

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels import grouped_lora
from kernels.lora_tiles import TILE_FIELDS, Tiles, lay_tiles, most_tiles
from kernels.offset_table import ALIGNMENT, PartEntry, SiteEntry, table_rows
from kernels.reference import grouped_lora as reference_lora
from kernels.tune.choosing import Case
from kernels.tune.rows import ROUNDINGS, ModelShape

# Sums in another order differ by float32's rounding: for 4096 terms with random signs, by about 64 · 2^-24 of the
# terms' size. This is four times that.
SHRINK_ROUNDING = 2**-16


class _Batch(NamedTuple):
    """A batch with the same number of rows under each adapter; every adapter adapts all parts of site 0."""

    arena: Tensor
    table: Tensor
    tiles: Tiles


class _Site(NamedTuple):
    """The stacked projections of one site."""

    inputs: int
    widths: tuple[int, ...]  # outputs of each


def _sites(model: ModelShape) -> list[_Site]:
    q, kv = model.q_heads * model.head_dim, model.kv_heads * model.head_dim
    return [
        _Site(model.hidden, (q, kv, kv)),
        _Site(q, (model.hidden,)),
        _Site(model.hidden, (model.intermediate, model.intermediate)),
        _Site(model.intermediate, (model.hidden,)),
    ]


def lora_cases(model: ModelShape, rows: int, adapters: int, rank: int, phase: str) -> list[Case]:
    """Shrink and expand of `rows` rows at all sites, in the tile height of `phase`, "decode" or "prefill"."""
    candidates = {"decode": grouped_lora.DECODE, "prefill": grouped_lora.PREFILL}[phase]
    heights = candidates.heights[:1] if phase == "decode" else candidates.heights[1:2]  # those that steps use

    def shrink_inputs(height: int, site: _Site, seed: int) -> tuple[Any, ...]:
        batch = _batch(model, rows, adapters, rank, site, height, seed)
        return model.random(seed, rows, site.inputs), 0, *batch, rank * len(site.widths)

    def expand_inputs(height: int, site: _Site, seed: int) -> tuple[Any, ...]:
        t = model.random(seed, rows, 1, rank * len(site.widths)).float()
        y = model.random(seed + 1000, rows, sum(site.widths))
        return t, y, 0, *_batch(model, rows, adapters, rank, site, height, seed), site.widths

    def case(height: int, **rest: Any) -> Case:
        shape = f"q k v, o, gate up, down of {adapters} adapters of rank {rank}, tiles of {height}"
        return Case(rows=rows, shape=shape, cold=True, **rest)

    cases = []
    for height in heights:
        shrinks = [partial(shrink_inputs, height, site) for site in _sites(model)]
        shrink = case(
            height,
            kernel=f"{phase} shrink",
            candidates=candidates.shrink,
            prepare=shrinks[0],
            others=tuple(shrinks[1:]),
            launch=_shrink,
            combine=_sum_of_splits,
            twin=_twin_shrink,
            written=(),
            rtol=SHRINK_ROUNDING,
            atol=SHRINK_ROUNDING,
        )
        expands = [partial(expand_inputs, height, site) for site in _sites(model)]
        expand = case(
            height,
            kernel=f"{phase} expand",
            candidates=candidates.expand,
            prepare=expands[0],
            others=tuple(expands[1:]),
            launch=grouped_lora.expand,
            twin=reference_lora.expand,
            written=(1,),
            rtol=ROUNDINGS[model.dtype],
            atol=ROUNDINGS[model.dtype] / 16,
        )
        cases += [shrink, expand]
    return cases


def _shrink(
    x: Tensor, site: int, arena: Tensor, table: Tensor, tiles: Tiles, ranks: int, config: grouped_lora.ShrinkConfig
) -> Tensor:
    t = torch.empty((len(x), config.split_k, ranks), device=x.device)
    return grouped_lora.shrink(x, site, arena, table, tiles, t, config)


def _sum_of_splits(t: Tensor) -> Tensor:
    return t.sum(1)


def _twin_shrink(x: Tensor, site: int, arena: Tensor, table: Tensor, tiles: Tiles, ranks: int) -> Tensor:
    t = torch.empty((len(x), 1, ranks), device=x.device)
    return reference_lora.shrink(x, site, arena, table, tiles, t).sum(1)


def _batch(model: ModelShape, rows: int, adapters: int, rank: int, of: _Site, height: int, seed: int) -> _Batch:
    ranks = rank * len(of.widths)
    sizes = [_aligned(ranks * of.inputs), *(_aligned(rank * width) for width in of.widths)]
    places = np.cumsum([0, *sizes * adapters])[:-1].reshape(adapters, len(sizes)).tolist()
    sites = [SiteEntry(a, [PartEntry(rank, b) for b in parts]) for a, *parts in places]
    slots = np.arange(rows, dtype=np.int32) * adapters // rows
    fields = np.zeros((most_tiles(rows, adapters, height), TILE_FIELDS), np.int32)
    used = lay_tiles(slots, height, fields)
    return _Batch(
        model.random(seed + 2000, sum(sizes) * adapters),
        torch.stack([table_rows([site], ranks) for site in sites]).to(model.device),
        Tiles(torch.from_numpy(fields[:used]).to(model.device), height),
    )


def _aligned(elements: int) -> int:
    return -(-elements // ALIGNMENT) * ALIGNMENT
