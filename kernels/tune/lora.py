"""The tuner's cases of the grouped LoRA kernels: the stacked q, k and v of a layer."""

from collections.abc import Sequence
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
    """A batch with the same number of rows under each adapter; every adapter adapts all three parts of site 0."""

    arena: Tensor
    table: Tensor
    tiles: Tiles


def lora_cases(model: ModelShape, rows: int, adapters: int, rank: int, phase: str) -> list[Case]:
    """Shrink and expand of `rows` rows, for each tile height that `phase`, "decode" or "prefill", may have."""
    candidates = {"decode": grouped_lora.DECODE, "prefill": grouped_lora.PREFILL}[phase]
    widths = (model.q_heads * model.head_dim, model.kv_heads * model.head_dim, model.kv_heads * model.head_dim)
    ranks = 3 * rank

    def shrink_inputs(height: int, seed: int) -> tuple[Any, ...]:
        batch = _batch(model, rows, adapters, rank, widths, height, seed)
        return model.random(seed, rows, model.hidden), 0, *batch, ranks

    def expand_inputs(height: int, seed: int) -> tuple[Any, ...]:
        t, y = model.random(seed, rows, 1, ranks).float(), model.random(seed + 1000, rows, sum(widths))
        return t, y, 0, *_batch(model, rows, adapters, rank, widths, height, seed), widths

    def case(height: int, **rest: Any) -> Case:
        shape = f"in {model.hidden}, {adapters} adapters of 3 parts of rank {rank}, tiles of {height}"
        return Case(rows=rows, shape=shape, **rest)

    cases = []
    for height in candidates.heights:
        shrink = case(
            height,
            kernel=f"{phase} shrink",
            candidates=candidates.shrink,
            prepare=partial(shrink_inputs, height),
            launch=_shrink,
            twin=_twin_shrink,
            written=(),
            rtol=SHRINK_ROUNDING,
            atol=SHRINK_ROUNDING,
        )
        expand = case(
            height,
            kernel=f"{phase} expand",
            candidates=candidates.expand,
            prepare=partial(expand_inputs, height),
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
    """Shrink and add up the splits: the sum must be right, and its time stands for the expand's reads of the splits."""
    t = torch.empty((len(x), config.split_k, ranks), device=x.device)
    return grouped_lora.shrink(x, site, arena, table, tiles, t, config).sum(1)


def _twin_shrink(x: Tensor, site: int, arena: Tensor, table: Tensor, tiles: Tiles, ranks: int) -> Tensor:
    t = torch.empty((len(x), 1, ranks), device=x.device)
    return reference_lora.shrink(x, site, arena, table, tiles, t).sum(1)


def _batch(
    model: ModelShape, rows: int, adapters: int, rank: int, widths: Sequence[int], height: int, seed: int
) -> _Batch:
    sizes = [_aligned(3 * rank * model.hidden), *(_aligned(rank * width) for width in widths)]
    places = np.cumsum([0, *sizes * adapters])[:-1].reshape(adapters, 4).tolist()
    sites = [SiteEntry(a, [PartEntry(rank, b) for b in parts]) for a, *parts in places]
    slots = np.arange(rows, dtype=np.int32) * adapters // rows
    fields = np.zeros((most_tiles(rows, adapters, height), TILE_FIELDS), np.int32)
    used = lay_tiles(slots, height, fields)
    return _Batch(
        model.random(seed + 2000, sum(sizes) * adapters),
        torch.stack([table_rows([site], 3 * rank) for site in sites]).to(model.device),
        Tiles(torch.from_numpy(fields[:used]).to(model.device), height),
    )


def _aligned(elements: int) -> int:
    return -(-elements // ALIGNMENT) * ALIGNMENT
