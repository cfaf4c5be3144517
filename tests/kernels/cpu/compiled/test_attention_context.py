"""Attention over paged contexts against the softmax in float64."""

import itertools

import pytest
import torch
from torch import Tensor

from kernels.cpu.compiled.program import Pool
from tests.kernels.cpu.compiled.contexts import Cache, Piece, attend, exact
from tests.kernels.cpu.compiled.steps import random

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
