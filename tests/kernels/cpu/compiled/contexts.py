"""Paged K/V and queries over it, for the tests of the compiled attention."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.cpu.compiled import structs
from kernels.cpu.compiled.program import Pool, Program
from tests.kernels.cpu.compiled.steps import empty_rows, gaps_are_kept, in_tiles, random, rows_of, step_of

PARTITION = 128


class Context(NamedTuple):
    """A sequence's place in the cache."""

    blocks: Tensor  # int32
    slots: Tensor  # of each token


class Piece(NamedTuple):
    """Consecutive queries of one sequence; a row for each, piece after piece."""

    context: Context
    position: int
    count: int = 1
    split: bool = False  # whether its partitions are tasks


class Cache:
    """K/V of random tokens, NaN in all other slots; a context has blocks in no order. `attend` lays it out in tiles."""

    def __init__(
        self, kv_heads: int, head_dim: int, dtype: torch.dtype, block_size: int, lengths: Sequence[int], seed: int = 0
    ) -> None:
        self.block_size = block_size
        counts = [-(-length // block_size) for length in lengths]
        blocks = sum(counts) + 3
        self.kv = torch.full((blocks * block_size, 2, kv_heads, head_dim), torch.nan, dtype=dtype)
        shuffled = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed)).int()
        self.contexts = []
        for index, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            own, shuffled = shuffled[:count].clone(), shuffled[count:]
            tokens = torch.arange(length)
            slots = own[tokens // block_size].long() * block_size + tokens % block_size
            # A token's K/V is the same whatever the blocks are
            self.kv[slots] = random(length, 2, kv_heads, head_dim, seed=1000 * seed + index).to(dtype)
            self.contexts.append(Context(own, slots))

    def hide(self, context: Context, start: int) -> None:
        """NaN in place of all tokens from one on."""
        self.kv[context.slots[start:]] = torch.nan


def attend(
    pool: Pool,
    cache: Cache,
    q: Tensor,
    pieces: Sequence[Piece],
    scale: float,
    *,
    times: int = 1,
    heads: int = 0,
    **options: Any,
) -> Tensor:
    """Attention of `q` (rows, heads · head_dim), by the last of so many equal operations of one program.

    `options` are the window, the cap and the sinks.
    """
    kv_heads, head_dim = cache.kv.shape[2:]
    heads = heads or q.shape[1] // head_dim
    outs = [empty_rows(len(q), heads * head_dim) for _ in range(times)]
    program, rows, tiles = Program(pool), rows_of(q), in_tiles(cache.kv)
    for out in outs:
        program.attention(rows, tiles, out, heads, cache.block_size, scale, **options)
    firsts = [0, *itertools.accumulate(piece.count for piece in pieces)]
    assert firsts.pop() == len(q)
    queries, kept = [], []
    for first, (context, position, count, split) in zip(firsts, pieces, strict=True):
        visible = position + count
        one = structs.Queries(first, count, position, visible, context.blocks.data_ptr(), None, None)
        if split:
            padded, partitions = -(-head_dim // 16) * 16, -(-visible // PARTITION)
            partials = torch.full((partitions * count * heads * (padded + 2),), torch.nan)
            arrived = torch.zeros(kv_heads, dtype=torch.int32)
            one.partials, one.arrived = partials.data_ptr(), arrived.data_ptr()
            kept.append((partials, arrived))
        queries.append(one)
    program.run(step_of(len(q), queries=queries))
    assert all(gaps_are_kept(out) for out in outs)
    assert not any(arrived.any() for _, arrived in kept)
    return outs[-1]


def exact(
    query: Tensor, cache: Cache, slots: Tensor, scale: float, cap: float = 0.0, sinks: Tensor | None = None
) -> Tensor:
    """One row's attention over all tokens of some slots, in float64."""
    keys, values = cache.kv[slots].double().unbind(1)
    kv_heads, head_dim = cache.kv.shape[2:]
    q = query.double().view(kv_heads, -1, head_dim)
    scores = torch.einsum("hgd,thd->hgt", q, keys) * scale
    scores = cap * (scores / cap).tanh() if cap else scores
    if sinks is not None:
        scores = torch.cat((scores, sinks.double().view(kv_heads, -1, 1)), -1)
    weights = scores.softmax(-1)[..., : len(keys)]
    return torch.einsum("hgt,thd->hgd", weights, values).flatten()
