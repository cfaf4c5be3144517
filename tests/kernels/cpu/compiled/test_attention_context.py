"""Attention over paged contexts against the softmax in float64."""

import itertools

import pytest
import torch
from torch import Tensor

from kernels.cpu.compiled.program import Pool
from tests.kernels.cpu.compiled.contexts import Cache, Piece, attend, exact
from tests.kernels.cpu.compiled.steps import random, same_bits

LENGTHS = (1, 15, 16, 17, 127, 128, 129, 300)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
BLOCK_SIZES = (16, 32, 48)
GROUPS = pytest.mark.parametrize("group", [1, 3, 8])
HEAD_DIMS = pytest.mark.parametrize("head_dim", [8, 20, 64, 128])
KV_HEADS = 2


def check(got: Tensor, want: list[Tensor]) -> None:
    torch.testing.assert_close(got.double(), torch.stack(want), rtol=2e-6, atol=2e-6)


@GROUPS
@HEAD_DIMS
@DTYPES
def test_decoding_sequences_each_see_their_own_context(
    pool: Pool, group: int, head_dim: int, dtype: torch.dtype
) -> None:
    caches = [Cache(KV_HEADS, head_dim, dtype, block_size, LENGTHS) for block_size in BLOCK_SIZES]
    q, scale = random(len(LENGTHS), KV_HEADS * group * head_dim, seed=9), head_dim**-0.5
    want = [exact(row, caches[0], context.slots, scale) for row, context in zip(q, caches[0].contexts, strict=True)]
    for cache, split in itertools.product(caches, (False, True)):
        each = zip(cache.contexts, LENGTHS, strict=True)
        pieces = [Piece(context, length - 1, split=split) for context, length in each]
        check(attend(pool, cache, q, pieces, scale), want)


@GROUPS
@HEAD_DIMS
@DTYPES
def test_each_token_of_a_prompt_sees_itself_and_those_before_it(
    pool: Pool, group: int, head_dim: int, dtype: torch.dtype
) -> None:
    caches = [Cache(KV_HEADS, head_dim, dtype, block_size, (300, 17)) for block_size in BLOCK_SIZES]
    chunks = ((0, 0, 20), (1, 3, 14), (0, 120, 12), (0, 270, 30))  # sequence, position and count
    ends = [(sequence, position + i + 1) for sequence, position, count in chunks for i in range(count)]
    q, scale = random(len(ends), KV_HEADS * group * head_dim, seed=9), head_dim**-0.5
    slots = [caches[0].contexts[sequence].slots[:end] for sequence, end in ends]
    want = [exact(row, caches[0], seen, scale) for row, seen in zip(q, slots, strict=True)]
    for cache in caches:
        pieces = [Piece(cache.contexts[sequence], *chunk) for sequence, *chunk in chunks]
        check(attend(pool, cache, q, pieces, scale), want)


@DTYPES
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("favourite", [0, 126, 127, 128, 250, 299])
def test_a_token_that_outweighs_all_others_decides(pool: Pool, favourite: int, split: bool, dtype: torch.dtype) -> None:
    """Its score is far above the maxima of the other partitions, whose weights become 0."""
    cache = Cache(1, 16, dtype, 16, (300,))
    (context,) = cache.contexts
    q = cache.kv[context.slots[favourite], 0].float() * 50
    got = attend(pool, cache, q, [Piece(context, 299, split=split)], 1.0)
    check(got, [exact(q[0], cache, context.slots, 1.0)])


@DTYPES
def test_scores_of_any_size_neither_overflow_nor_vanish(pool: Pool, dtype: torch.dtype) -> None:
    cache = Cache(1, 16, dtype, 16, (200,))
    (context,) = cache.contexts
    for size in (1e-30, 1e-3, 1e3, 1e18, 1e30):
        q = random(1, 16, seed=9) * size
        got = attend(pool, cache, q, [Piece(context, 199)], 1.0)
        scores = cache.kv[context.slots, 0, 0].double() @ q[0].double()
        if size <= 1e3:
            torch.testing.assert_close(got.double()[0], exact(q[0], cache, context.slots, 1.0), rtol=1e-4, atol=1e-4)
        else:
            torch.testing.assert_close(got[0], cache.kv[context.slots[scores.argmax()], 1, 0].float())


def test_only_the_query_heads_of_a_stacked_projection_are_read(pool: Pool) -> None:
    cache = Cache(2, 16, torch.float32, 16, (40,))
    (context,) = cache.contexts
    qkv = random(1, (6 + 2 * 2) * 16)
    qkv[:, 6 * 16 :] = torch.nan
    got = attend(pool, cache, qkv, [Piece(context, 39)], 0.25, heads=6)
    check(got, [exact(qkv[0, : 6 * 16], cache, context.slots, 0.25)])


WINDOWS = pytest.mark.parametrize("window", [1, 7, 16, 100, 128, 150])


@WINDOWS
@DTYPES
def test_a_window_shows_each_token_the_last_ones_and_no_tile_before_them_is_read(
    pool: Pool, window: int, dtype: torch.dtype
) -> None:
    cache = Cache(KV_HEADS, 20, dtype, 16, (300, 33))
    chunks = ((0, 299, 1), (1, 0, 33), (0, 120, 12), (0, 200, 90), (1, 20, 1))  # sequence, position and count
    ends = [(sequence, position + i + 1) for sequence, position, count in chunks for i in range(count)]
    q = random(len(ends), KV_HEADS * 3 * 20, seed=9)
    slots = [cache.contexts[sequence].slots[max(end - window, 0) : end] for sequence, end in ends]
    want = [exact(row, cache, seen, 0.2) for row, seen in zip(q, slots, strict=True)]
    for split in (False, True):
        pieces = [Piece(cache.contexts[sequence], *chunk, split=split) for sequence, *chunk in chunks]
        check(attend(pool, cache, q, pieces, 0.2, window=window, times=2), want)
    (context, _), last = cache.contexts, Piece(cache.contexts[0], 299)
    alone = attend(pool, cache, q[:1], [last], 0.2, window=window)
    cache.kv[context.slots[: (300 - window) // 16 * 16]] = torch.nan
    for split in (False, True):
        assert same_bits(attend(pool, cache, q[:1], [last._replace(split=split)], 0.2, window=window), alone)


@WINDOWS
@DTYPES
def test_with_a_window_a_row_has_the_same_bits_whatever_the_pieces(
    pools: list[Pool], window: int, dtype: torch.dtype
) -> None:
    cache = Cache(KV_HEADS, 16, dtype, 16, (300,))
    (context,) = cache.contexts
    q = random(300, KV_HEADS * 4 * 16, seed=9)
    whole = attend(pools[0], cache, q, [Piece(context, 0, 300)], 0.2, window=window, cap=3.0)
    for pool, size in itertools.product(pools, (1, 7, 32, 130)):
        pieces = [Piece(context, at, min(size, 300 - at), split=size == 1) for at in range(0, 300, size)]
        assert same_bits(attend(pool, cache, q, pieces, 0.2, window=window, cap=3.0), whole)


@DTYPES
@pytest.mark.parametrize("cap", [0.5, 4.0, 50.0])
def test_capped_scores_are_bent_by_a_tanh(pool: Pool, cap: float, dtype: torch.dtype) -> None:
    cache = Cache(KV_HEADS, 64, dtype, 16, (300,))
    (context,) = cache.contexts
    for size in (0.1, 3.0, 100.0):  # the last far beyond every cap
        q = random(12, KV_HEADS * 2 * 64, seed=9) * size
        want = [exact(row, cache, context.slots[: 289 + i], 0.125, cap) for i, row in enumerate(q)]
        got = attend(pool, cache, q, [Piece(context, 288, 12)], 0.125, cap=cap)
        torch.testing.assert_close(got.double(), torch.stack(want), rtol=1e-5 * cap, atol=1e-5 * cap)


@DTYPES
def test_a_sink_takes_its_part_of_a_heads_softmax(pool: Pool, dtype: torch.dtype) -> None:
    """Also one that is far below or above all scores, in windows, and where partitions are merged."""
    cache = Cache(KV_HEADS, 64, dtype, 16, (300,))
    (context,) = cache.contexts
    q = random(12, KV_HEADS * 2 * 64, seed=9)
    sinks = torch.linspace(-3, 4, KV_HEADS * 2)
    sinks[0], sinks[-1] = -1e4, 1e4
    for window, split in ((0, False), (0, True), (150, False)):
        slots = [context.slots[max(289 + i - window, 0) if window else 0 : 289 + i] for i in range(12)]
        want = [exact(row, cache, seen, 0.125, sinks=sinks) for row, seen in zip(q, slots, strict=True)]
        pieces = [Piece(context, 288 + i, split=True) for i in range(12)] if split else [Piece(context, 288, 12)]
        got = attend(pool, cache, q, pieces, 0.125, window=window, sinks=sinks)
        torch.testing.assert_close(got.double(), torch.stack(want), rtol=1e-5, atol=1e-5)
