"""Paged attention against attention written out head by head in float64."""

import pytest
import torch
from torch import Tensor

from kernels.cpu.paged_attention import BY_HEAD_SCORES, AttentionGroup, paged_attention

# Float32 sums of up to 64 products and 40 rows; in bfloat16 the weights and the result are each rounded once.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE))
# heads, kv_heads, head_dim
SHAPES = pytest.mark.parametrize(("heads", "kv_heads", "size"), [(9, 3, 64), (4, 4, 16), (6, 1, 24), (8, 2, 33)])
BLOCK, SLOTS, SCALE = 4, 400, 0.15


class Pool:
    """A cache whose unused slots hold NaN, handing out scattered slots; the first block is null, all zeros."""

    def __init__(self, heads: int, kv_heads: int, size: int, dtype: torch.dtype, slots: int = SLOTS):
        self.heads, self.size, self.dtype = heads, size, dtype
        self.random = torch.Generator().manual_seed(heads * size)
        self.kv = torch.full((slots, 2, kv_heads, size), float("nan"), dtype=dtype)
        self.kv[:BLOCK] = 0
        self.free = (torch.randperm(slots - BLOCK, generator=self.random) + BLOCK).tolist()

    def context(self, length: int) -> Tensor:
        slots = torch.tensor([self.free.pop() for _ in range(length)])
        self.kv[slots] = torch.randn((length, *self.kv.shape[1:]), generator=self.random).to(self.dtype)
        return slots

    def queries(self, rows: int) -> Tensor:
        """(rows, heads, size), a slice of a wider tensor as the fused projection makes them."""
        wide = torch.randn((rows, self.heads + 2, self.size), generator=self.random).to(self.dtype)
        return wide[:, : self.heads]

    def decode(self, contexts: list[Tensor], first_row: int = 0) -> AttentionGroup:
        longest = max(map(len, contexts))
        slots = torch.stack([torch.nn.functional.pad(context, (0, longest - len(context))) for context in contexts])
        mask = torch.zeros((len(contexts), 1, 1, longest), dtype=self.dtype)
        for row, context in enumerate(contexts):
            mask[row, :, :, len(context) :] = float("-inf")
        rows = slice(first_row, first_row + len(contexts))
        return AttentionGroup(rows, len(contexts), 1, slots, mask if mask.any() else None)

    def prefill(self, context: Tensor, queries: int, first_row: int = 0) -> AttentionGroup:
        hidden = torch.ones((queries, len(context)), dtype=torch.bool).triu(len(context) - queries + 1)
        mask = torch.zeros(hidden.shape, dtype=self.dtype).masked_fill_(hidden, float("-inf"))
        rows = slice(first_row, first_row + queries)
        return AttentionGroup(rows, 1, queries, context[None], mask[None, None])

    def exact(self, query: Tensor, context: Tensor, cap: float = 0.0, sinks: Tensor | None = None) -> Tensor:
        """One row's attention over all of `context`."""
        k, v = self.kv[context].double().unbind(1)
        outs = []
        for head in range(self.heads):
            shared = head // (self.heads // k.shape[1])
            scores = k[:, shared] @ query[head].double() * SCALE
            scores = cap * (scores / cap).tanh() if cap else scores
            if sinks is not None:
                scores = torch.cat((scores, sinks[head : head + 1].double()))
            outs.append(scores.softmax(0)[: len(v)] @ v[:, shared])
        return torch.cat(outs)


def assert_close(actual: Tensor, rows: list[Tensor], dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), torch.stack(rows), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@DTYPES
@SHAPES
@pytest.mark.parametrize("lengths", [[1], [37], [16, 16], [1, 5, 40], [33, 2, 17, 9]])
def test_decoding_sequences_each_see_their_own_context(
    heads: int, kv_heads: int, size: int, dtype: torch.dtype, lengths: list[int]
) -> None:
    pool = Pool(heads, kv_heads, size, dtype)
    contexts = [pool.context(length) for length in lengths]
    q = pool.queries(len(lengths))
    out = paged_attention(q, pool.kv, [pool.decode(contexts)], SCALE)
    assert_close(out, [pool.exact(q[row], context) for row, context in enumerate(contexts)], dtype)


@DTYPES
@SHAPES
@pytest.mark.parametrize(("before", "queries"), [(0, 2), (0, 19), (21, 2), (30, 13)])
def test_a_prompt_sees_what_precedes_each_token(
    heads: int, kv_heads: int, size: int, dtype: torch.dtype, before: int, queries: int
) -> None:
    pool = Pool(heads, kv_heads, size, dtype)
    context, q = pool.context(before + queries), pool.queries(queries)
    out = paged_attention(q, pool.kv, [pool.prefill(context, queries)], SCALE)
    assert_close(out, [pool.exact(q[row], context[: before + row + 1]) for row in range(queries)], dtype)


@DTYPES
@SHAPES
@pytest.mark.parametrize(("before", "queries"), [(0, 330), (2600, 150)])
def test_a_long_prompt_sees_what_precedes_each_token_whatever_is_computed_at_once(
    heads: int, kv_heads: int, size: int, dtype: torch.dtype, before: int, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernels.cpu.paged_attention.SCORE_BYTES", 1 << 20)
    length, shared = before + queries, heads // kv_heads
    assert queries * length * shared >= BY_HEAD_SCORES
    pool = Pool(heads, kv_heads, size, dtype, 3000)
    context, q = pool.context(length), pool.queries(queries)
    out = paged_attention(q, pool.kv, [pool.prefill(context, queries)], SCALE)
    rows = [*range(0, queries, 7), queries - 1]
    assert_close(out[rows], [pool.exact(q[row], context[: before + row + 1]) for row in rows], dtype)


@DTYPES
@SHAPES
def test_groups_of_both_kinds_fill_one_batch_in_any_order(
    heads: int, kv_heads: int, size: int, dtype: torch.dtype
) -> None:
    pool = Pool(heads, kv_heads, size, dtype)
    decoding, prompt, single = [pool.context(9), pool.context(3)], pool.context(12), [pool.context(30)]
    q = pool.queries(2 + 5 + 1)
    groups = [pool.prefill(prompt, 5, 2), pool.decode(single, 7), pool.decode(decoding)]
    expected = [pool.exact(q[row], context) for row, context in enumerate(decoding)]
    expected += [pool.exact(q[2 + row], prompt[: 8 + row]) for row in range(5)]
    expected += [pool.exact(q[7], single[0])]
    assert_close(paged_attention(q, pool.kv, groups, SCALE), expected, dtype)


def test_several_sequences_with_several_queries_each_share_a_group() -> None:
    pool = Pool(6, 2, 16, torch.float32)
    contexts = [pool.context(7), pool.context(7)]
    q = pool.queries(6)
    one = pool.prefill(contexts[0], 3)
    group = AttentionGroup(slice(0, 6), 2, 3, torch.stack(contexts), one.mask.expand(2, 1, 3, 7))
    expected = [pool.exact(q[3 * index + row], contexts[index][: 5 + row]) for index in range(2) for row in range(3)]
    assert_close(paged_attention(q, pool.kv, [group], SCALE), expected, torch.float32)


@DTYPES
@SHAPES
def test_capped_scores_are_bent_by_a_tanh(heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> None:
    pool, cap = Pool(heads, kv_heads, size, dtype), 0.7
    contexts = [pool.context(length) for length in (9, 23)]
    groups = [pool.decode(contexts), pool.prefill(contexts[1], 6, first_row=2)]
    q = pool.queries(8)
    out = paged_attention(q, pool.kv, groups, SCALE, cap)
    seen = [*contexts, *(contexts[1][: 18 + i] for i in range(6))]
    for row, (query, context) in enumerate(zip(q, seen, strict=True)):
        torch.testing.assert_close(
            out[row].double(), pool.exact(query, context, cap), rtol=TOLERANCE[dtype], atol=2 * TOLERANCE[dtype]
        )


@DTYPES
@SHAPES
def test_a_sink_takes_its_part_of_a_heads_softmax(heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> None:
    pool, sinks = Pool(heads, kv_heads, size, dtype), torch.linspace(-3, 4, heads)
    contexts = [pool.context(length) for length in (9, 23)]
    groups = [pool.decode(contexts), pool.prefill(contexts[1], 6, first_row=2)]
    q = pool.queries(8)
    out = paged_attention(q, pool.kv, groups, SCALE, sinks=sinks)
    seen = [*contexts, *(contexts[1][: 18 + i] for i in range(6))]
    assert_close(out, [pool.exact(*each, sinks=sinks) for each in zip(q, seen, strict=True)], dtype)
