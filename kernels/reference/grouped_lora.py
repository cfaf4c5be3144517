"""The specification of kernels.grouped_lora: LoRA products over tiles."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kernels.lora_tiles import SITES_PER_EXPERT, Tiles
from kernels.offset_table import BIAS, GAIN, MAX_PARTS, RANKS, A, B


def shrink(x: Tensor, site: int, arena: Tensor, table: Tensor, tiles: Tiles, t: Tensor) -> Tensor:
    """Σₛ t[rows, s, :rank] = x[rows] Aᵀ for every tile whose adapter adapts the site, in float32.

    x is (T, in), `t` (T, splits, width) float32. Returns the splits of `t` that the expand adds up: here `t[:, :1]`.
    Other rows of `t`, and columns beyond the adapter's ranks, are not written.
    """
    for rows, _, fields in _adapted(site, table, tiles):
        rank, features = fields[RANKS + MAX_PARTS], x.shape[1]
        a = _matrix(arena, fields[A], rank, features)
        t[rows, 0, :rank] = x[rows].float() @ a.t()
    return t[:, :1]


def embedding_shrink(token_ids: Tensor, site: int, arena: Tensor, table: Tensor, tiles: Tiles, t: Tensor) -> Tensor:
    """The shrink of one-hot rows: t[rows, 0, :rank] = A[token_ids[rows]], for A stored as (vocab, rank).

    token_ids is (T,) int64. Returns `t[:, :1]`, the input of the expand.
    """
    for rows, _, fields in _adapted(site, table, tiles):
        rank = fields[RANKS + MAX_PARTS]
        ranks = torch.arange(rank, device=arena.device)
        t[rows, 0, :rank] = arena[fields[A] + token_ids[rows, None] * rank + ranks].to(t.dtype)
    return t[:, :1]


def expand(
    t: Tensor,
    y: Tensor,
    site: int,
    arena: Tensor,
    table: Tensor,
    tiles: Tiles,
    widths: Sequence[int],
    hots: Tensor | None = None,
    hot_ranks: int = 0,
) -> None:
    """y[rows, columns] = (y + Σₛ t[rows, s, ranks] B) · gain + bias, in place, for every tile and adapted part.

    `t` is the result of the shrink. y is (T, out); the site's parts fill its columns side by side, `widths[i]` columns
    for part i. Computed in float32 and rounded to y's dtype once. Rows of no tile, and columns of parts that are not
    adapted, keep their bits.

    With `hots`, int32 by slot, t has the products with the A of several adapters side by side, (T, 1, columns) of y's
    dtype: those of the adapter in slot s begin at column hots[s] · hot_ranks.
    """
    for rows, slot, fields in _adapted(site, table, tiles):
        stop, column = 0, 0 if hots is None else int(hots[slot]) * hot_ranks
        for part, width in enumerate(widths):
            start, stop = stop, stop + width
            first, last = fields[RANKS + part : RANKS + part + 2]
            bias, gain = fields[BIAS + part], fields[GAIN + part]
            if first == last and bias <= 0 and gain <= 0:
                continue
            total = y[rows, start:stop].float()
            total += t[rows, :, column + first : column + last].float().sum(1) @ _matrix(
                arena, fields[B + part], last - first, width
            )
            if gain > 0:
                total *= _matrix(arena, gain, 1, width)
            if bias > 0:
                total += _matrix(arena, bias, 1, width)
            y[rows, start:stop] = total.to(y.dtype)


def _adapted(site: int, table: Tensor, tiles: Tiles) -> Iterator[tuple[slice, int, list[int]]]:
    """Rows, slot and table entry of every tile whose adapter adapts the site."""
    for first, count, slot, expert in tiles.fields.tolist():
        fields = [] if slot < 0 else table[slot, site + SITES_PER_EXPERT * expert].tolist()
        if count and any(fields):
            yield slice(first, first + count), slot, fields


def _matrix(arena: Tensor, offset: int, rows: int, columns: int) -> Tensor:
    return arena[offset : offset + rows * columns].view(rows, columns).to(torch.float32)
