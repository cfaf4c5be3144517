"""What the tuner runs of the grouped LoRA kernels: the stacked q, k and v of a layer."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels import grouped_lora, lora_configs
from kernels.adapter_table import ALIGNMENT, PartEntry, SiteEntry, table_rows
from kernels.lora_tiles import TILE_FIELDS, Tiles, lay_tiles, most_tiles
from kernels.reference import grouped_lora as tiled_lora
from kernels.tune.choosing import Case
from kernels.tune.rows import ROUNDINGS, ModelShape

# Sums that are cut up in other ways differ by float32's rounding: of 4096 terms with random signs about 64 · 2^-24 of
# their size, and here four times that.
SHRINK_ROUNDING = 2**-16


class _Batch(NamedTuple):
    """Rows of some adapters side by side, as many of each; every adapter adapts site 0, all three parts."""

    arena: Tensor
    table: Tensor
    tiles: Tiles


def lora_cases(model: ModelShape, rows: int, adapters: int, rank: int, phase: str) -> list[Case]:
    """Shrink and expand of `rows` rows, for each height of tile that `phase`, "decode" or "prefill", may have."""
    candidates = {"decode": lora_configs.DECODE, "prefill": lora_configs.PREFILL}[phase]
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
            twin=tiled_lora.expand,
            written=(1,),
            rtol=ROUNDINGS[model.dtype],
            atol=ROUNDINGS[model.dtype] / 16,
        )
        cases += [shrink, expand]
    return cases


def _shrink(
    x: Tensor, site: int, arena: Tensor, table: Tensor, tiles: Tiles, ranks: int, config: lora_configs.ShrinkConfig
) -> Tensor:
    """The sum over the splits is what has to be right; in the time, it stands for the expand's reading them."""
    t = torch.empty((len(x), config.split_k, ranks), device=x.device)
    return grouped_lora.shrink(x, site, arena, table, tiles, t, config).sum(1)


def _twin_shrink(x: Tensor, site: int, arena: Tensor, table: Tensor, tiles: Tiles, ranks: int) -> Tensor:
    return tiled_lora.shrink(x, site, arena, table, tiles, torch.empty((len(x), 1, ranks), device=x.device)).sum(1)


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
