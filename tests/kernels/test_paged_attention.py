"""Attention over tables of blocks, the kernels and their twins, against attention head by head in float64."""

from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import paged_attention as kernels
from kernels.paged_attention import DECODE_CANDIDATES, PREFILL_CANDIDATES, DecodeConfig, PrefillConfig
from kernels.reference import paged_attention as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# One rounding to the dtype, of the weights and of the result. Not in the interpreter: its products of bfloat16 are
# of their bits, as integers.
ROUNDING = {torch.float32: 2**-24, torch.float16: 2**-11}
if DEVICE == "cuda":
    ROUNDING[torch.bfloat16] = 2**-8
SERVED = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # the dtype of the tests of candidates
DTYPES = pytest.mark.parametrize("dtype", list(ROUNDING))
TWINS = pytest.mark.parametrize("attention", [kernels, reference], ids=["kernel", "reference"])
# heads, kv_heads, head_dim, block_size
SHAPES = pytest.mark.parametrize(
    "shape", [(6, 2, 64, 16), (2, 2, 80, 32), (7, 1, 96, 16), (8, 1, 128, 16), (6, 1, 24, 4), (5, 1, 33, 16)], ids=str
)
SMALL = (4, 2, 16, 16)
SCALE = 0.15
NAN, INF = float("nan"), float("inf")


def different(candidates: list) -> list:
    """In the interpreter, warps and stages make no difference."""
    return candidates if DEVICE == "cuda" else list({config[:2]: config for config in candidates}.values())


DECODES = pytest.mark.parametrize("config", different(DECODE_CANDIDATES), ids=str)
PREFILLS = pytest.mark.parametrize("config", different(PREFILL_CANDIDATES), ids=str)


class Pool:
    """A cache of scattered blocks, with NaN in all that no context has written, block 0 too."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, blocks: int = 64):
        self.heads, self.kv_heads, self.head_dim, self.block_size = shape
        self.dtype = dtype
        self.random = torch.Generator().manual_seed(sum(shape))
        self.kv = torch.full(
            (blocks * self.block_size, 2, self.kv_heads, self.head_dim), NAN, dtype=dtype, device=DEVICE
        )
        free = (torch.randperm(blocks - 1, generator=self.random) + 1).tolist()
        self.unwritten, self.free = free[0], free[1:]

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random).to(DEVICE, self.dtype)

    def context(self, length: int) -> list[int]:
        """The blocks of a new context, with random K and V in as many slots."""
        table = [self.free.pop() for _ in range(-(-length // self.block_size))]
        self.kv[self.slots(table, length)] = self.randn(length, *self.kv.shape[1:])
        return table

    def slots(self, table: list[int], length: int) -> list[int]:
        return [table[p // self.block_size] * self.block_size + p % self.block_size for p in range(length)]

    def tables(self, tables: list[list[int]], width: int | None = None) -> Tensor:
        """Side by side; entries past a context's end name a block of NaN."""
        width = width or max(map(len, tables)) + 1
        return torch.tensor(
            [table + [self.unwritten] * (width - len(table)) for table in tables], dtype=torch.int32, device=DEVICE
        )

    def queries(self, rows: int) -> Tensor:
        """A slice of a wider tensor, as the fused projection makes them."""
        return self.randn(rows, self.heads + 2 * self.kv_heads, self.head_dim)[:, : self.heads]

    def check(
        self,
        actual: Tensor,
        query: Tensor,
        table: list[int],
        seen: int,
        window: int = 0,
        cap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> None:
        """A row against its attention over the first `seen` tokens, each error bounded by the roundings behind it."""
        context = self.kv[self.slots(table, seen)[-window:]].double().cpu()
        k, v = context.repeat_interleave(self.heads // self.kv_heads, 2).permute(1, 2, 0, 3)
        q = query.double().cpu()[:, None]
        scores = (q * k).sum(-1) * SCALE
        scores = cap * (scores / cap).tanh() if cap else scores
        if sinks is not None:
            scores = torch.cat((scores, sinks.double().cpu()[:, None]), -1)
        weights = scores.softmax(-1)[:, : k.shape[1], None]
        exact = (weights * v).sum(1)
        # A score errs by a few units of its partial sums, its weight by twice that, as the total does.
        largest = ((q * k).abs().sum(-1) * SCALE).amax(-1, keepdim=True) if seen else torch.zeros(1)
        error = ROUNDING[self.dtype] + 8 * 2**-24 * (largest + 1 + 2 * cap)
        bound = ROUNDING[self.dtype] * exact.abs() + error * (weights * v.abs()).sum(1) + 2**-24
        assert ((actual.double().cpu() - exact).abs() <= bound).all()


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def decode(
    attention: ModuleType, pool: Pool, q: Tensor, tables: Tensor, lengths: list[int], *config: object, **options: object
) -> Tensor:
    out = torch.full((len(q), pool.heads * pool.head_dim), NAN, dtype=pool.dtype, device=DEVICE).view(q.shape)
    attention.paged_decode(q, pool.kv, tables, int32(lengths), pool.block_size, SCALE, out, *config, **options)
    return out


@DTYPES
@SHAPES
@TWINS
def test_decoding_sequences_each_see_their_own_context(attention: ModuleType, shape, dtype: torch.dtype) -> None:
    pool, lengths = Pool(shape, dtype), [1, 15, 16, 0, 17, 70]
    contexts = [pool.context(length) for length in lengths]
    q = pool.queries(len(lengths))
    out = decode(attention, pool, q, pool.tables(contexts), lengths)
    for row, (context, length) in enumerate(zip(contexts, lengths, strict=True)):
        pool.check(out[row], q[row], context, length)


@DECODES
def test_every_decode_candidate_is_right_around_the_borders_of_its_splits(config: DecodeConfig) -> None:
    pool = Pool((2, 1, 16, 16), SERVED, blocks=1300)
    config = config._replace(least=config.keys)
    whole = config.splits * config.keys
    lengths = [config.keys - 1, config.keys + 1, whole - 1, whole, whole + 1]
    contexts = [pool.context(length) for length in lengths]
    q = pool.queries(len(lengths))
    out = decode(kernels, pool, q, pool.tables(contexts), lengths, config)
    for row, (context, length) in enumerate(zip(contexts, lengths, strict=True)):
        pool.check(out[row], q[row], context, length)


def test_a_split_has_least_keys_and_a_longer_context_shares_them_out() -> None:
    pool, config = Pool((2, 1, 16, 16), SERVED, blocks=100), DecodeConfig(4, 16, 4, 2, least=48)
    lengths = [1, 47, 48, 49, 96, 97, 4 * 48, 4 * 48 + 1, 4 * 64 + 1, 300]
    contexts = [pool.context(length) for length in lengths]
    q = pool.queries(len(lengths))
    out = decode(kernels, pool, q, pool.tables(contexts), lengths, config)
    for row, (context, length) in enumerate(zip(contexts, lengths, strict=True)):
        pool.check(out[row], q[row], context, length)


def test_few_sequences_are_split_as_far_as_their_contexts_go_and_many_not_at_all() -> None:
    config = DecodeConfig(32, 64, 4, 2)
    splits = {rows: config.of_batch(rows, kv_heads=8, longest=32768).splits for rows in (1, 2, 4, 8, 16, 17, 128)}
    assert splits == {1: 32, 2: 32, 4: 16, 8: 8, 16: 4, 17: 1, 128: 1}
    assert [config.of_batch(1, 8, longest).splits for longest in (1, 128, 129, 1000, 1 << 20)] == [1, 1, 2, 8, 32]
    assert config._replace(splits=8).of_batch(1, 8, 1 << 20).splits == 8


@TWINS
def test_tables_may_lie_a_column_after_the_other(attention: ModuleType) -> None:
    pool, lengths = Pool(SMALL, SERVED), [17, 40]
    contexts = [pool.context(length) for length in lengths]
    q, tables = pool.queries(2), pool.tables(contexts)
    columns = tables.t().contiguous().t()
    assert columns.stride() == (1, 2)
    rows, turned = (decode(attention, pool, q, each, lengths) for each in (tables, columns))
    assert torch.equal(rows, turned)
    starts = int32([0, 1, 2])
    outputs = [torch.empty_like(rows) for _ in range(2)]
    for each, out in zip((tables, columns), outputs, strict=True):
        attention.paged_prefill(q, pool.kv, each, int32(lengths), starts, pool.block_size, SCALE, out)
    assert torch.equal(*outputs)


@DTYPES
@pytest.mark.parametrize("splits", [1, 3])
def test_a_launch_serves_whatever_its_buffers_hold_when_it_is_repeated(splits: int, dtype: torch.dtype) -> None:
    pool, config = Pool(SMALL, dtype), DecodeConfig(splits, 16, 4, 2, least=16)
    q, out = pool.queries(4), torch.empty((4, *SMALL[:1], SMALL[2]), dtype=dtype, device=DEVICE)
    tables, lengths = torch.zeros((4, 8), dtype=torch.int32, device=DEVICE), int32([0, 0, 0, 0])

    def launch() -> None:
        kernels.paged_decode(q, pool.kv, tables, lengths, pool.block_size, SCALE, out, config)

    launch()
    replay = launch
    if DEVICE == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        replay = graph.replay
    for contents in ([1, 0, 0, 0], [49, 16, 100, 33], [0, 48, 1, 0], [97, 96, 95, 0]):
        contexts = [pool.context(length) for length in contents]
        tables.copy_(pool.tables([context or [0] * 8 for context in contexts], 8))
        lengths.copy_(int32(contents))
        q.copy_(pool.queries(4))
        q[lengths == 0] = NAN  # padding rows
        replay()
        for row, (context, length) in enumerate(zip(contexts, contents, strict=True)):
            if length:
                pool.check(out[row], q[row], context, length)
            else:
                assert not out[row].any()


def test_what_lay_in_scratch_memory_makes_no_difference() -> None:
    pool, lengths = Pool(SMALL, torch.float32), [40, 0, 5]
    contexts = [pool.context(length) for length in lengths]
    q = pool.queries(3)
    torch.use_deterministic_algorithms(True)  # new tensors are NaN then
    try:
        assert torch.empty(1).isnan()
        out = decode(kernels, pool, q, pool.tables(contexts), lengths, DecodeConfig(4, 16, 4, 2))
    finally:
        torch.use_deterministic_algorithms(False)
    for row, (context, length) in enumerate(zip(contexts, lengths, strict=True)):
        pool.check(out[row], q[row], context, length)


@TWINS
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_what_breaks_one_decoding_sequence_does_not_reach_another(attention: ModuleType, poison: float) -> None:
    pool, lengths = Pool(SMALL, torch.float32), [40, 33, 40]
    contexts = [pool.context(length) for length in lengths]
    q = pool.queries(3)
    pool.kv[pool.slots(contexts[1], 33)[20:]] = poison
    with np.errstate(invalid="ignore"):  # the interpreter warns of NaN
        out = decode(attention, pool, q, pool.tables(contexts), lengths)
    assert not out[1].isfinite().any()
    for row in (0, 2):
        pool.check(out[row], q[row], contexts[row], 40)


# (cached before, queries) of each sequence
CHUNKS = {
    "one fresh": [(0, 19)],
    "one cached": [(30, 13)],
    "single rows": [(0, 1), (15, 1), (16, 1)],
    "some": [(17, 5), (0, 40), (0, 0), (3, 1), (64, 9)],
    "on borders": [(0, 16), (16, 16), (15, 17), (1, 31), (31, 33)],
}


def prefill(
    attention: ModuleType, pool: Pool, chunks: list[tuple[int, int]], config: PrefillConfig | None, extra: int = 0
) -> tuple[Tensor, Tensor, list[list[int]]]:
    """Queries, result and tables; after the chunks' rows come `extra` that belong to none."""
    tables = [pool.context(sum(chunk)) for chunk in chunks]
    starts = [sum(queries for _, queries in chunks[:index]) for index in range(len(chunks) + 1)]
    q = pool.queries(starts[-1] + extra)
    out = torch.full(q.shape, NAN, dtype=pool.dtype, device=DEVICE)
    lengths = int32([sum(chunk) for chunk in chunks])
    attention.paged_prefill(
        q,
        pool.kv,
        pool.tables(tables),
        lengths,
        int32(starts),
        pool.block_size,
        SCALE,
        out,
        *([config] if config else []),
    )
    return q, out, tables


def check_prefill(pool: Pool, chunks: list[tuple[int, int]], q: Tensor, out: Tensor, tables: list[list[int]]) -> None:
    row = 0
    for (before, queries), table in zip(chunks, tables, strict=True):
        for position in range(before, before + queries):
            pool.check(out[row], q[row], table, position + 1)
            row += 1
    assert not out[row:].any()


@DTYPES
@SHAPES
@TWINS
def test_a_prompts_rows_see_what_precedes_them(attention: ModuleType, shape, dtype: torch.dtype) -> None:
    pool = Pool(shape, dtype)
    check_prefill(pool, CHUNKS["some"], *prefill(attention, pool, CHUNKS["some"], None))


@PREFILLS
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS.keys())
def test_every_prefill_candidate_is_right_for_chunks_of_any_size(chunks, config: PrefillConfig) -> None:
    pool = Pool((7, 1, 16, 16), SERVED)
    check_prefill(pool, chunks, *prefill(kernels, pool, chunks, config, extra=3))


@TWINS
def test_rows_of_an_empty_context_and_rows_of_no_sequence_are_zeros(attention: ModuleType) -> None:
    pool = Pool(SMALL, torch.float32)
    q, out = pool.queries(9), torch.full((9, SMALL[0], SMALL[2]), NAN, device=DEVICE)
    context = pool.context(2)
    q[2:] = NAN
    tables, starts = pool.tables([context, [], []]), int32([0, 2, 6, 6])
    attention.paged_prefill(q, pool.kv, tables, int32([2, 0, 0]), starts, pool.block_size, SCALE, out)
    for row in range(2):
        pool.check(out[row], q[row], context, row + 1)
    assert not out[2:].any()


@TWINS
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("part", [0, 1], ids=["K", "V"])
def test_what_breaks_a_row_reaches_none_before_it_and_no_other_sequence(
    attention: ModuleType, part: int, poison: float
) -> None:
    pool, chunks, broken = Pool(SMALL, torch.float32), [(5, 30), (9, 30)], 20
    tables = [pool.context(sum(chunk)) for chunk in chunks]
    pool.kv[pool.slots(tables[0], 35)[broken], part] = poison
    q, out = pool.queries(60), torch.empty((60, SMALL[0], SMALL[2]), device=DEVICE)
    starts = int32([0, 30, 60])
    with np.errstate(invalid="ignore"):  # the interpreter warns of NaN
        attention.paged_prefill(q, pool.kv, pool.tables(tables), int32([35, 39]), starts, pool.block_size, SCALE, out)
    first = broken - chunks[0][0]
    for row in range(first):
        pool.check(out[row], q[row], tables[0], chunks[0][0] + row + 1)
    if part == 1:
        assert not out[first:30].isfinite().any()
    for row in range(30):
        pool.check(out[30 + row], q[30 + row], tables[1], chunks[1][0] + row + 1)


def test_a_batch_of_no_rows_is_no_launch() -> None:
    pool = Pool(SMALL, torch.float32)
    none = torch.empty((0, SMALL[0], SMALL[2]), device=DEVICE)
    kernels.paged_decode(none, pool.kv, pool.tables([[]])[:0], int32([]), pool.block_size, SCALE, none)
    kernels.paged_prefill(none, pool.kv, pool.tables([[]])[:0], int32([]), int32([0]), pool.block_size, SCALE, none)


# On borders of steps, of splits and of blocks, and in none
WINDOWS = pytest.mark.parametrize("window", [1, 13, 16, 40, 200])


@WINDOWS
@TWINS
@pytest.mark.parametrize("splits", [1, 3])
def test_with_a_window_decoding_reads_the_last_tokens_only(attention: ModuleType, splits: int, window: int) -> None:
    pool, lengths = Pool(SMALL, SERVED), [1, 15, 0, 33, 70, 129]
    contexts = [pool.context(length) for length in lengths]
    for context, length in zip(contexts, lengths, strict=True):
        pool.kv[pool.slots(context, max(length - window, 0))] = NAN
    q = pool.queries(len(lengths))
    options = {"config": DecodeConfig(splits, 16, 4, 2, least=16)} if attention is kernels else {}
    out = decode(attention, pool, q, pool.tables(contexts), lengths, window=window, **options)
    for row, (context, length) in enumerate(zip(contexts, lengths, strict=True)):
        pool.check(out[row], q[row], context, length, window=window)


@WINDOWS
@TWINS
@pytest.mark.parametrize("chunks", [CHUNKS["some"], CHUNKS["on borders"]], ids=["some", "on borders"])
def test_with_a_window_a_prompt_reads_the_last_tokens_of_each_query(
    attention: ModuleType, chunks: list[tuple[int, int]], window: int
) -> None:
    """Rows of a tile whose windows begin after the keys of its first step see none of them."""
    pool = Pool(SMALL, SERVED)
    tables = [pool.context(sum(chunk)) for chunk in chunks]
    starts = [sum(queries for _, queries in chunks[:index]) for index in range(len(chunks) + 1)]
    for table, (before, _) in zip(tables, chunks, strict=True):
        pool.kv[pool.slots(table, max(before + 1 - window, 0))] = NAN
    q = pool.queries(starts[-1])
    out = torch.full(q.shape, NAN, dtype=pool.dtype, device=DEVICE)
    places = pool.tables(tables), int32([sum(chunk) for chunk in chunks]), int32(starts)
    options = {"config": PrefillConfig(32, 16, 4, 2)} if attention is kernels else {}
    attention.paged_prefill(q, pool.kv, *places, pool.block_size, SCALE, out, window=window, **options)
    for table, start, (before, queries) in zip(tables, starts, chunks, strict=False):
        for i in range(queries):
            pool.check(out[start + i], q[start + i], table, before + i + 1, window=window)


@TWINS
@pytest.mark.parametrize("cap", [0.4, 50.0])
@pytest.mark.parametrize("window", [0, 21])
def test_capped_scores_are_bent_by_a_tanh(attention: ModuleType, window: int, cap: float) -> None:
    pool, length = Pool(SMALL, SERVED), 37
    context = pool.context(length)
    for size in (1.0, 300.0):  # the second far beyond every cap
        q = pool.queries(length) * size
        alone = decode(attention, pool, q[-1:], pool.tables([context]), [length], window=window, cap=cap)
        out = torch.full(q.shape, NAN, dtype=pool.dtype, device=DEVICE)
        places = pool.tables([context]), int32([length]), int32([0, length])
        attention.paged_prefill(q, pool.kv, *places, pool.block_size, SCALE, out, window=window, cap=cap)
        for row in range(length):
            pool.check(out[row], q[row], context, row + 1, window=window, cap=cap)
        pool.check(alone[0], q[-1], context, length, window=window, cap=cap)


@TWINS
@pytest.mark.parametrize("window", [0, 21])
@pytest.mark.parametrize("splits", [1, 3])
def test_a_sink_takes_its_part_of_a_heads_softmax(attention: ModuleType, splits: int, window: int) -> None:
    pool, length = Pool(SMALL, SERVED), 53
    context, sinks = pool.context(length), torch.tensor([-50.0, -1.0, 2.0, 50.0], device=DEVICE)
    config = [DecodeConfig(splits, 16, 4, 2, least=16)] if attention is kernels else []
    q = pool.queries(length)
    alone = decode(attention, pool, q[-1:], pool.tables([context]), [length], *config, window=window, sinks=sinks)
    out = torch.full(q.shape, NAN, dtype=pool.dtype, device=DEVICE)
    places = pool.tables([context]), int32([length]), int32([0, length])
    attention.paged_prefill(q, pool.kv, *places, pool.block_size, SCALE, out, window=window, sinks=sinks)
    for row in range(length):
        pool.check(out[row], q[row], context, row + 1, window=window, sinks=sinks)
    pool.check(alone[0], q[-1], context, length, window=window, sinks=sinks)
    nothing = decode(attention, pool, q[-1:], pool.tables([context]), [0], *config, window=window, sinks=sinks)
    assert not nothing.any()
