"""A row's attention depends, to the bit, on its query and its visible context alone."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kernels.cpu.compiled.program import Pool
from tests.kernels.cpu.compiled.contexts import Cache, Context, Piece, attend
from tests.kernels.cpu.compiled.steps import random, same_bits

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# query heads of each K/V head, and their size
SHAPES = pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (3, 20), (8, 8), (4, 128)])
LENGTH, KV_HEADS, SCALE = 300, 2, 0.2
CUTS = {
    "single tokens": [*range(1, 20), *range(120, 140), *range(250, LENGTH)],
    "blocks": range(16, LENGTH, 16),
    "at partitions": (128, 256),
    "beside partitions": (127, 129, 255, 257),
    "few and many": (1, 2, 290, 299),
    "odd": (3, 10, 17, 60, 131, 190, 283),
    "tasks of 32": range(32, LENGTH, 32),
}


def pieces_of(context: Context, cuts: Sequence[int]) -> list[Piece]:
    return [Piece(context, start, stop - start) for start, stop in itertools.pairwise([0, *cuts, LENGTH])]


@SHAPES
@DTYPES
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
def test_a_prompt_has_the_same_bits_whatever_its_pieces_in_one_step_or_in_several(
    pool: Pool, group: int, head_dim: int, dtype: torch.dtype, cuts: Sequence[int]
) -> None:
    """Of the several steps, each finds NaN where later tokens will lie."""
    cache = Cache(KV_HEADS, head_dim, dtype, 16, (LENGTH,))
    (context,) = cache.contexts
    q = random(LENGTH, KV_HEADS * group * head_dim, seed=9)
    whole = attend(pool, cache, q, [Piece(context, 0, LENGTH)], SCALE)
    pieces = pieces_of(context, cuts)
    assert same_bits(attend(pool, cache, q, pieces, SCALE), whole)
    for piece in reversed(pieces):
        stop = piece.position + piece.count
        cache.hide(context, stop)
        rows = slice(piece.position, stop)
        assert same_bits(attend(pool, cache, q[rows], [piece], SCALE), whole[rows])


@SHAPES
@DTYPES
@pytest.mark.parametrize("block_size", [16, 32, 48])
def test_partitions_as_tasks_give_the_same_bits_also_in_the_next_layer(
    pools: list[Pool], group: int, head_dim: int, dtype: torch.dtype, block_size: int
) -> None:
    lengths = (1, 16, 127, 128, 129, 256, 257, 300)
    cache = Cache(KV_HEADS, head_dim, dtype, block_size, lengths)
    q = random(len(lengths), KV_HEADS * group * head_dim, seed=9)
    each = list(zip(cache.contexts, lengths, strict=True))
    whole = attend(pools[0], cache, q, [Piece(context, length - 1) for context, length in each], SCALE)
    for pool in pools:
        for times in (1, 2, 5):
            split = [Piece(context, length - 1, split=True) for context, length in each]
            assert same_bits(attend(pool, cache, q, split, SCALE, times=times), whole)
            mixed = [piece._replace(split=index % 2 == 0) for index, piece in enumerate(split)]
            assert same_bits(attend(pool, cache, q, mixed, SCALE, times=times), whole)


@SHAPES
@DTYPES
def test_a_row_has_the_bits_that_it_has_alone_whatever_is_beside_it(
    pools: list[Pool], group: int, head_dim: int, dtype: torch.dtype
) -> None:
    lengths = (1, 5, 16, 40, 128, 131, 257)
    cache = Cache(KV_HEADS, head_dim, dtype, 16, lengths)
    width = KV_HEADS * group * head_dim
    each = [Piece(context, length - 1) for context, length in zip(cache.contexts, lengths, strict=True)]
    each += [Piece(cache.contexts[-1], position, count) for position, count in ((0, 3), (100, 40), (250, 7))]
    queries = [random(piece.count, width, seed=index) for index, piece in enumerate(each)]
    alone = [attend(pools[0], cache, q, [piece], SCALE) for q, piece in zip(queries, each, strict=True)]
    generator = torch.Generator().manual_seed(1)
    for pool in pools:
        for size in (2, 3, 5, 10, 25):
            chosen = torch.randint(len(each), (size,), generator=generator).tolist()
            got = attend(pool, cache, torch.cat([queries[i] for i in chosen]), [each[i] for i in chosen], SCALE)
            assert same_bits(got, torch.cat([alone[i] for i in chosen]))


@DTYPES
@pytest.mark.parametrize("length", [1, 15, 17, 127, 128, 129, 250])
def test_what_lies_beyond_the_visible_tokens_changes_nothing(pool: Pool, length: int, dtype: torch.dtype) -> None:
    cache = Cache(KV_HEADS, 20, dtype, 16, (LENGTH,))
    (context,) = cache.contexts
    q = random(1, KV_HEADS * 3 * 20, seed=9)

    def both() -> Tensor:
        pieces = [Piece(context, length - 1, split=split) for split in (False, True)]
        return torch.cat([attend(pool, cache, q, [piece], SCALE) for piece in pieces])

    before = both()
    assert before.isfinite().all()
    for beyond in (torch.nan, torch.inf, -torch.inf, 1e30):
        cache.kv[context.slots[length:]] = beyond
        assert same_bits(both(), before)


@DTYPES
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_the_order_of_the_blocks_changes_nothing(pool: Pool, split: bool, dtype: torch.dtype) -> None:
    q = random(1, KV_HEADS * 2 * 16, seed=9)
    outs = []
    for block_size in (16, 32, 48):
        cache = Cache(KV_HEADS, 16, dtype, block_size, (LENGTH,))
        outs.append(attend(pool, cache, q, [Piece(cache.contexts[0], LENGTH - 1, split=split)], SCALE))
    assert same_bits(outs[0], outs[1])
    assert same_bits(outs[0], outs[2])


@DTYPES
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_nan_and_infinity_in_one_sequence_reach_no_other(pools: list[Pool], wrong: float, dtype: torch.dtype) -> None:
    cache = Cache(KV_HEADS, 16, dtype, 16, (200, 200, 200))
    q = random(7, KV_HEADS * 2 * 16, seed=9)
    left, middle, right = cache.contexts
    pieces = [Piece(left, 199), Piece(left, 10), Piece(middle, 197, 3), Piece(right, 199, split=True), Piece(right, 3)]
    clean = attend(pools[0], cache, q, pieces, SCALE)
    for place in ("query", "cache"):
        if place == "query":
            q[2:5] = wrong
        else:
            q[2:5] = 1.0
            cache.kv[middle.slots[150]] = wrong
        for pool in pools:
            got = attend(pool, cache, q, pieces, SCALE)
            assert not got[2:5].isfinite().any()
            assert same_bits(got[[0, 1, 5, 6]], clean[[0, 1, 5, 6]])
