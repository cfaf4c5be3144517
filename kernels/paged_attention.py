"""Attention over a paged KV cache. Decode splits each sequence's context; prefill takes tiles of queries."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launches import ceil_div, launch, power_of_2

MIN_DOT = 16  # the least size of a dimension of tl.dot's operands
H100_SHARED_BYTES = 227 * 1024  # of a program, at most
ENOUGH_PROGRAMS = 132  # of decode: one for each multiprocessor of an H100
LEAST_SEQUENCES = 64  # one compiled prefill kernel serves fewer sequences; one more is compiled for each power of two


class DecodeConfig(NamedTuple):
    """Launch configuration of decode."""

    splits: int  # the most programs that share the context of a sequence
    keys: int  # keys of one step
    num_warps: int
    num_stages: int
    least: int = 128  # keys of a split, at least: fewer are not worth the reduction of their sums. Not measured

    def of_batch(self, sequences: int, kv_heads: int, longest: int) -> "DecodeConfig":
        """The same with no more splits than keep a device busy, for contexts of up to `longest` tokens.

        Short contexts leave splits idle, so that one CUDA graph serves all contexts.
        """
        programs = sequences * kv_heads
        useful = 1 if programs >= ENOUGH_PROGRAMS else power_of_2(ceil_div(2 * ENOUGH_PROGRAMS, programs))
        return self._replace(splits=min(self.splits, useful, power_of_2(ceil_div(longest, self.least))))


class PrefillConfig(NamedTuple):
    """Launch configuration of prefill."""

    rows: int  # the most rows of a tile; a row is a query of one of the heads that share a KV head
    keys: int  # keys of one step
    num_warps: int
    num_stages: int

    def of_heads(self, head_dim: int, shared_bytes: int = H100_SHARED_BYTES) -> "PrefillConfig":
        """The same up to 128; for the sums of wider heads to stay in registers, more warps and fewer keys, or rows.

        As compiled for an H100 at d=256, the defaults above spill 224 bytes a thread, and what this makes of them none.
        A GPU whose programs have less shared memory multiplies from registers: for it the default gets more warps (at
        d=128, compiled for sm_80, 72 bytes spilled and none).
        """
        if head_dim <= 128 and self == PREFILL and shared_bytes < H100_SHARED_BYTES:
            return self._replace(num_warps=8)
        if head_dim <= 128:
            return self
        if self.num_warps < 8:
            return self._replace(keys=self.keys // 2, num_warps=8)
        return self._replace(rows=self.rows // 2)


# K and V lie behind an indirect load, for which Triton takes half of the stages: 5 are the fewest with two buffers of
# them. Rows of a decode tile are few, so that fewer warps wait less for each other.
DECODE_CANDIDATES = [
    DecodeConfig(splits, keys, num_warps, num_stages)
    for splits in (32, 8, 1)
    for keys, num_warps, num_stages in (
        (64, 4, 2),
        (64, 4, 3),
        (64, 4, 5),
        (64, 2, 5),
        (32, 4, 3),
        (32, 2, 5),
        (32, 1, 5),
        (128, 4, 2),
    )
]
DECODE = DECODE_CANDIDATES[0]  # not measured
PREFILL_CANDIDATES = [
    PrefillConfig(rows, keys, num_warps, num_stages)
    for rows, keys, num_warps, num_stages in [
        (64, 64, 4, 2),
        (32, 64, 4, 2),
        (64, 32, 4, 3),
        (64, 64, 4, 3),
        (64, 64, 4, 5),
        (128, 32, 8, 3),
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 64, 8, 5),
    ]
]
PREFILL = PREFILL_CANDIDATES[0]  # not measured
# Tensor cores do not multiply float32, so a tile's results stay in registers. As compiled for an H100, larger tiles
# than these spill (at d=128, the defaults above spill 2 and 9 KB a thread).
FLOAT32_DECODE = DecodeConfig(splits=32, keys=16, num_warps=8, num_stages=2)
FLOAT32_PREFILL = PrefillConfig(rows=32, keys=16, num_warps=8, num_stages=2)


def paged_decode(
    q: Tensor,
    kv: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    block_size: int,
    scale: float,
    out: Tensor,
    config: DecodeConfig = DECODE,
    window: int = 0,
    cap: float = 0.0,
    sinks: Tensor | None = None,
) -> None:
    """out[s, h] = softmax(q[s, h] Kᵀ · scale) V over sequence s's context, h reading KV head h // (heads / kv_heads).

    `q` and `out` are (S, heads, d), contiguous within a row; `kv` is (slots, 2, kv_heads, d), K at index 0, V at 1.
    `block_tables` (S, blocks) and `context_lens` (S,) are int32: token p of sequence s lies in slot
    block_tables[s, p // block_size] · block_size + p % block_size. A context of 0 gives zeros. Slots and table
    entries beyond a context are not read. Sums are float32; the weights are rounded to kv's dtype. The launch depends
    on shapes and `config` alone, so that its CUDA graph serves any contexts.

    With a `window`, a query sees the last so many tokens of its context, its own included, and nothing before them is
    read. A `cap` other than 0 caps the scores: cap · tanh(q Kᵀ · scale / cap). `sinks` (heads,) float32 are scores that
    each head's softmax has beside those of tokens, and that weigh no value.
    """
    rows, heads, head_dim = q.shape
    layout = _layout(q, kv, block_tables, out, block_size)
    if not rows:
        return
    least = ceil_div(config.least, config.keys)
    sums = stats = out  # not used with one split
    if config.splits > 1:
        sums = torch.empty((rows, heads, config.splits, head_dim), dtype=torch.float32, device=q.device)
        stats = torch.empty((rows, heads, config.splits, 2), dtype=torch.float32, device=q.device)
    launch(
        _decode_kernel, (layout["KV_HEADS"], config.splits, rows),
        q, kv, block_tables, context_lens, out, sums, stats, q if sinks is None else sinks, *_score_factors(scale, cap),
        q.stride(0), *block_tables.stride(), out.stride(0), **layout, WINDOW=window, CAPPED=cap != 0.0,
        SINKS=sinks is not None,
        ROWS=max(MIN_DOT, power_of_2(layout["GROUP"])), SPLITS=config.splits, KEYS=config.keys,
        LEAST=least, num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    if config.splits > 1:
        launch(
            _reduce_kernel, (heads, rows),
            sums, stats, context_lens, out, out.stride(0),
            HEADS=heads, HEAD_DIM=head_dim, DIMS=layout["DIMS"], WINDOW=window, KEYS=config.keys, LEAST=least,
            SPLITS=config.splits, SPLITS_PADDED=power_of_2(config.splits), num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


def paged_prefill(
    q: Tensor,
    kv: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_starts: Tensor,
    block_size: int,
    scale: float,
    out: Tensor,
    config: PrefillConfig = PREFILL,
    window: int = 0,
    cap: float = 0.0,
    sinks: Tensor | None = None,
) -> None:
    """As `paged_decode`, for several queries a sequence: the last tokens of its context, with a causal mask.

    `q` and `out` are (T, heads, d); sequence s has the rows from query_starts[s] to query_starts[s + 1] - 1, where
    `query_starts` is (S + 1,) int32. Query i of n is at position context_lens[s] - n + i. A context is at least n, or
    0. Rows of a context of 0, and rows beyond the last sequence, get zeros. A NaN or infinity reaches no row that
    precedes it. A row that sees an infinity in V may get NaN.
    """
    rows, sequences = q.shape[0], len(context_lens)
    layout = _layout(q, kv, block_tables, out, block_size)
    if not rows:
        return
    tile_rows = max(config.rows, power_of_2(layout["GROUP"]))
    queries = tile_rows // layout["GROUP"]
    # One more tile for each sequence, and for the rows of no sequence, because each may end within a tile.
    launch(
        _prefill_kernel, (rows // queries + sequences + 1, layout["KV_HEADS"]),
        q, kv, block_tables, context_lens, query_starts, out, q if sinks is None else sinks,
        *_score_factors(scale, cap), sequences, rows,
        q.stride(0), *block_tables.stride(), out.stride(0), **layout, WINDOW=window, CAPPED=cap != 0.0,
        SINKS=sinks is not None,
        SEQUENCES=max(LEAST_SEQUENCES, power_of_2(sequences + 1)), QUERIES=queries, ROWS=tile_rows,
        KEYS=config.keys,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip


def _layout(q: Tensor, kv: Tensor, block_tables: Tensor, out: Tensor, block_size: int) -> dict[str, int]:
    """The constants that both kernels are compiled for; asserts the layouts that they assume."""
    heads, head_dim = q.shape[1:]
    kv_heads = kv.shape[2]
    assert kv.shape[1:] == (2, kv_heads, head_dim), kv.shape
    assert kv.is_contiguous(), "slots must follow each other in memory"
    assert heads % kv_heads == 0, f"{heads} query heads do not share {kv_heads} KV heads"
    assert out.shape == q.shape, out.shape
    assert q.stride()[1:] == out.stride()[1:] == (head_dim, 1), "a row's heads must follow each other in memory"
    return {
        "GROUP": heads // kv_heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "DIMS": max(MIN_DOT, power_of_2(head_dim)),
        "BLOCK_SIZE": block_size,
    }


def _score_factors(scale: float, cap: float) -> tuple[float, float]:
    """What the kernels multiply products by, and the cap, both for powers of 2; see `_scores`."""
    return (2 * scale / cap / math.log(2), cap / math.log(2)) if cap else (scale / math.log(2), 0.0)


# Pointers whose alignment differs from step to step. They are read one number at a time, so alignment gains nothing
# there, and one compiled kernel serves all alignments.
_TABLES = ["block_tables", "context_lens", "query_starts"]


@triton.jit
def _scores(products: tl.tensor, scale: tl.tensor, cap: tl.tensor, CAPPED: tl.constexpr) -> tl.tensor:
    """products · scale, or cap · tanh(products · scale / 2), where scale includes log₂ e; NaN stays NaN."""
    scores = products * scale
    if CAPPED:
        scores = cap - 2 * cap / (tl.exp2(tl.where(scores > 120.0, 120.0, scores)) + 1.0)
    return scores


@triton.jit
def _attend(
    query: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    mixed: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    begin: tl.tensor,
    stop: tl.tensor,
    kv: tl.tensor,
    table: tl.tensor,
    table_step: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """One step of the running softmax: add KEYS keys, from `first` on, to the state of each row.

    The state is peak = max score, total = Σ 2^(score - peak), mixed = Σ 2^(score - peak) V; it is returned. `query` is
    (rows, DIMS), where DIMS is HEAD_DIM padded with zeros. `kv` points at the KV head in slot 0, and `scale` includes
    log₂ e. MASKED: the keys end at `stop`; nothing from there on is read, of the block table neither. CAUSAL, for
    masked steps: each row sees the keys up to its `last`. WINDOW, for masked steps: the keys begin at `begin`, and
    each row sees WINDOW keys up to its `last`.
    """
    keys, dims = first + tl.arange(0, KEYS), tl.arange(0, DIMS)
    held = keys < stop
    if WINDOW:
        held = held & (keys >= begin)
    entries = table + keys // BLOCK_SIZE * table_step
    blocks = tl.load(entries, held, other=0) if MASKED else tl.load(entries)
    slots = blocks.to(tl.int64) * BLOCK_SIZE + keys % BLOCK_SIZE
    k_places = kv + slots[:, None] * (2 * KV_HEADS * HEAD_DIM) + dims[None, :]
    v_places = k_places + KV_HEADS * HEAD_DIM
    if MASKED or DIMS > HEAD_DIM:
        inside = dims[None, :] < HEAD_DIM
        if MASKED:
            inside = inside & held[:, None]
        k, v = tl.load(k_places, inside, other=0.0), tl.load(v_places, inside, other=0.0)
    else:
        k, v = tl.load(k_places), tl.load(v_places)
    scores = _scores(tl.dot(query, tl.trans(k), input_precision="ieee"), scale, cap, CAPPED)
    if MASKED:
        visible = held[None, :]
        if CAUSAL:
            visible = visible & (keys[None, :] <= last[:, None])
            if WINDOW:
                visible = visible & (keys[None, :] > last[:, None] - WINDOW)
            # 0 · NaN is NaN, so a NaN or infinity in V is replaced by 0, and only the rows that see it become NaN.
            finite = tl.abs(v.to(tl.float32)) < float("inf")
            v = tl.where(finite, v, 0.0)
            broken = tl.min(finite.to(tl.int32), 1) == 0
            total = tl.where(tl.max((visible & broken[None, :]).to(tl.int32), 1) > 0, float("nan"), total)
        scores = tl.where(visible, scores, float("-inf"))
    top = tl.maximum(peak, tl.max(scores, 1))
    # With a window a row may have seen no key yet: its weights are 0, and not NaN
    shift = tl.where(top == float("-inf"), 0.0, top) if WINDOW else top
    weights, decay = tl.exp2(scores - shift[:, None]), tl.exp2(peak - shift)
    total = total * decay + tl.sum(weights, 1)
    mixed = tl.dot(weights.to(v.dtype), v, mixed * decay[:, None], input_precision="ieee")
    return top, total, mixed


@triton.jit
def _normalised(mixed: tl.tensor, total: tl.tensor) -> tl.tensor:
    """mixed / total, and 0 for rows that saw no key: their mixed and total are 0."""
    return mixed / tl.where(total == 0.0, 1.0, total)


@triton.jit
def _sunk(sinks: tl.tensor, heads: tl.tensor, inside: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The peak and the total (see `_attend`) of a softmax over the sinks of some rows' heads, and nothing of others."""
    peak = tl.load(sinks + heads, inside, other=float("-inf")) * 1.4426950408889634
    return peak, tl.where(inside, 1.0, 0.0)


@triton.jit
def _span(keys: tl.tensor, SPLITS: tl.constexpr, KEYS: tl.constexpr, LEAST: tl.constexpr) -> tl.tensor:
    """Keys of each split: LEAST steps or more, and whole ones, so that only the last split in use has a partial one."""
    return tl.maximum(tl.cdiv(tl.cdiv(keys, KEYS), SPLITS), LEAST) * KEYS


@triton.jit
def _first_step(begin: tl.tensor, KEYS: tl.constexpr) -> tl.tensor:
    """The first key of the step that a key is in."""
    return tl.maximum(begin, 0) // KEYS * KEYS


@triton.jit(do_not_specialize=["table_row", "table_step"], do_not_specialize_on_alignment=_TABLES)
def _decode_kernel(
    q: tl.tensor, kv: tl.tensor, block_tables: tl.tensor, context_lens: tl.tensor, out: tl.tensor,
    sums: tl.tensor, stats: tl.tensor, sinks: tl.tensor, scale: tl.tensor, cap: tl.tensor, q_row: tl.tensor,
    table_row: tl.tensor, table_step: tl.tensor, out_row: tl.tensor,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
    KEYS: tl.constexpr, LEAST: tl.constexpr,
) -> None:  # fmt: skip
    """Peak, total and mixed values (see `_attend`) of a split of one sequence, for all query heads of a KV head."""
    kv_head, split, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    context = tl.load(context_lens + sequence)
    begin = tl.maximum(context - WINDOW, 0) if WINDOW else 0
    base = _first_step(begin, KEYS) if WINDOW else 0
    span = _span(context - base, SPLITS, KEYS, LEAST)
    first = base + split * span
    stop = tl.minimum(first + span, context)
    if (split > 0) & (stop <= first):
        return
    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIMS)
    heads = kv_head * GROUP + rows
    inside = (rows < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    places = heads[:, None] * HEAD_DIM + dims[None, :]
    query = tl.load(q + sequence * q_row + places, inside, other=0.0)
    table, kv_places = block_tables + sequence * table_row, kv + kv_head * HEAD_DIM
    peak, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    if SINKS:
        peak, total = _sunk(sinks, heads, rows < tl.where(split == 0, GROUP, 0))
    mixed = tl.zeros((ROWS, DIMS), tl.float32)
    # A window begins within a step, so all its steps are masked
    whole = first if WINDOW else first + (stop - first) // KEYS * KEYS
    for key in range(first, whole, KEYS):
        peak, total, mixed = _attend(
            query, peak, total, mixed, key, rows, begin, stop, kv_places, table, table_step, scale, cap,
            KV_HEADS, HEAD_DIM, DIMS, BLOCK_SIZE, KEYS, MASKED=False, CAUSAL=False, WINDOW=0, CAPPED=CAPPED,
        )  # fmt: skip
    for key in range(whole, stop, KEYS):
        peak, total, mixed = _attend(
            query, peak, total, mixed, key, rows, begin, stop, kv_places, table, table_step, scale, cap,
            KV_HEADS, HEAD_DIM, DIMS, BLOCK_SIZE, KEYS, MASKED=True, CAUSAL=False, WINDOW=WINDOW, CAPPED=CAPPED,
        )  # fmt: skip
    if SPLITS > 1:
        part = (sequence * (KV_HEADS * GROUP) + heads) * SPLITS + split
        tl.store(sums + part[:, None] * HEAD_DIM + dims[None, :], mixed, inside)
        tl.store(stats + part * 2, peak, rows < GROUP)
        tl.store(stats + part * 2 + 1, total, rows < GROUP)
    else:
        result = _normalised(mixed, total[:, None]).to(out.dtype.element_ty)
        tl.store(out + sequence * out_row + places, result, inside)


@triton.jit
def _reduce_kernel(
    sums: tl.tensor, stats: tl.tensor, context_lens: tl.tensor, out: tl.tensor, out_row: tl.tensor,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, WINDOW: tl.constexpr, KEYS: tl.constexpr,
    LEAST: tl.constexpr, SPLITS: tl.constexpr, SPLITS_PADDED: tl.constexpr,
) -> None:  # fmt: skip
    """out = Σ 2^(peak - top) sums / Σ 2^(peak - top) total over the splits with keys."""
    head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    context = tl.load(context_lens + sequence)
    splits, dims = tl.arange(0, SPLITS_PADDED), tl.arange(0, DIMS)
    keys = context - _first_step(context - WINDOW, KEYS) if WINDOW else context
    used = (splits < SPLITS) & (splits * _span(keys, SPLITS, KEYS, LEAST) < keys)
    part = (sequence * HEADS + head) * SPLITS + splits
    peak = tl.load(stats + part * 2, used, other=float("-inf"))
    total = tl.load(stats + part * 2 + 1, used, other=0.0)
    inside = used[:, None] & (dims < HEAD_DIM)[None, :]
    mixed = tl.load(sums + part[:, None] * HEAD_DIM + dims[None, :], inside, other=0.0)
    weight = tl.exp2(peak - tl.where(context > 0, tl.max(peak, 0), 0.0))
    result = _normalised(tl.sum(mixed * weight[:, None], 0), tl.sum(total * weight, 0)).to(out.dtype.element_ty)
    tl.store(out + sequence * out_row + head * HEAD_DIM + dims, result, dims < HEAD_DIM)


@triton.jit(
    do_not_specialize=["sequences", "tokens", "table_row", "table_step"], do_not_specialize_on_alignment=_TABLES
)
def _prefill_kernel(
    q: tl.tensor, kv: tl.tensor, block_tables: tl.tensor, context_lens: tl.tensor, query_starts: tl.tensor,
    out: tl.tensor, sinks: tl.tensor, scale: tl.tensor, cap: tl.tensor, sequences: tl.tensor, tokens: tl.tensor,
    q_row: tl.tensor, table_row: tl.tensor, table_step: tl.tensor, out_row: tl.tensor,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr, SEQUENCES: tl.constexpr, QUERIES: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
) -> None:  # fmt: skip
    """out = mixed / total (see `_attend`) for QUERIES queries of one sequence and the query heads of a KV head."""
    # Last tiles first: they see the most keys
    tile, kv_head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    # Sequence i has the tiles from starts[i] // QUERIES + i on. For any starts, these suffice for its rows.
    indices = tl.arange(0, SEQUENCES)
    starts = tl.load(query_starts + indices, indices <= sequences, other=0)
    started = (indices <= sequences) & (starts // QUERIES + indices <= tile)
    sequence = tl.sum(started.to(tl.int32), 0) - 1
    start = tl.load(query_starts + sequence)
    stop = tl.load(query_starts + sequence + 1, sequence < sequences, other=tokens)
    context = tl.load(context_lens + sequence, sequence < sequences, other=0)
    first = (tile - start // QUERIES - sequence) * QUERIES
    if start + first >= stop:
        return
    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIMS)
    queries = first + rows // GROUP
    inside = ((rows < QUERIES * GROUP) & (start + queries < stop))[:, None] & (dims < HEAD_DIM)[None, :]
    places = (kv_head * GROUP + rows % GROUP)[:, None] * HEAD_DIM + dims[None, :]
    token = (start + queries).to(tl.int64)[:, None]
    query = tl.load(q + token * q_row + places, inside, other=0.0)
    table, kv_places = block_tables + sequence.to(tl.int64) * table_row, kv + kv_head * HEAD_DIM
    peak, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    if SINKS:
        peak, total = _sunk(sinks, kv_head * GROUP + rows % GROUP, rows < QUERIES * GROUP)
    mixed = tl.zeros((ROWS, DIMS), tl.float32)
    before = context - (stop - start)
    shared = tl.maximum(before + first + 1, 0) // KEYS * KEYS  # whole steps of keys that every row sees
    end = tl.minimum(before + first + QUERIES, context)
    begin = 0
    if WINDOW:  # no step is seen by every row, in general
        begin = tl.maximum(before + first + 1 - WINDOW, 0)
        shared = _first_step(begin, KEYS)
    for key in range(0, 0 if WINDOW else shared, KEYS):
        peak, total, mixed = _attend(
            query, peak, total, mixed, key, before + queries, begin, end, kv_places, table, table_step, scale, cap,
            KV_HEADS, HEAD_DIM, DIMS, BLOCK_SIZE, KEYS, MASKED=False, CAUSAL=False, WINDOW=0, CAPPED=CAPPED,
        )  # fmt: skip
    for key in range(shared, end, KEYS):
        peak, total, mixed = _attend(
            query, peak, total, mixed, key, before + queries, begin, end, kv_places, table, table_step, scale, cap,
            KV_HEADS, HEAD_DIM, DIMS, BLOCK_SIZE, KEYS, MASKED=True, CAUSAL=True, WINDOW=WINDOW, CAPPED=CAPPED,
        )  # fmt: skip
    tl.store(out + token * out_row + places, _normalised(mixed, total[:, None]).to(out.dtype.element_ty), inside)
