"""Attention over a paged KV cache: decoding rows split over their context, prompt chunks in tiles of queries."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_tile import attend, normalised

MIN_DOT = 16  # the least extent of a matrix product's operands
LEAST_SEQUENCES = 64  # that the prefill kernel is compiled for; more of them, for powers of two


class DecodeConfig(NamedTuple):
    """How decode is launched: `splits` programs share a sequence's context, and take `keys` keys a step."""

    splits: int
    keys: int
    num_warps: int
    num_stages: int


class PrefillConfig(NamedTuple):
    """How prefill is launched: a tile has up to `rows` rows (queries · heads that share K/V), `keys` keys a step."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


DECODE_CANDIDATES = [
    DecodeConfig(splits, keys, 4, num_stages)
    for splits in (8, 1, 4, 16, 32)
    for keys, num_stages in ((64, 2), (64, 3), (32, 3), (128, 2))
]
DECODE = DECODE_CANDIDATES[0]  # not measured
PREFILL_CANDIDATES = [
    PrefillConfig(rows, keys, num_warps, num_stages)
    for rows, keys, num_warps, num_stages in [
        (64, 64, 4, 2),
        (32, 64, 4, 2),
        (64, 32, 4, 3),
        (64, 64, 4, 3),
        (128, 32, 8, 3),
        (128, 64, 8, 2),
        (128, 64, 8, 3),
    ]
]
PREFILL = PREFILL_CANDIDATES[0]  # not measured
# In float32 there are no tensor cores to leave a tile's results with: as compiled for an H100, larger ones than these
# find no room in registers (at d=128, the ones above put 2 and 9 KB a thread elsewhere).
FLOAT32_DECODE = DecodeConfig(splits=8, keys=16, num_warps=8, num_stages=2)
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
) -> None:
    """out[s, h] = softmax(q[s, h] Kᵀ · scale) V over sequence s's context, h reading KV head h // (heads / kv_heads).

    `q` and `out` are (S, heads, d), a row's heads side by side; `kv` is (slots, 2, kv_heads, d), K at index 0, V at 1.
    `block_tables` (S, blocks) and `context_lens` (S,) are int32: token p of sequence s lies in slot
    block_tables[s, p // block_size] · block_size + p % block_size. A context of 0 gives zeros. Nothing from a
    context's end on is read, of the table neither. Sums are in float32; the weights are rounded to kv's dtype.
    The launch depends on shapes and `config` alone, so that a CUDA graph of it serves any contexts.
    """
    rows, heads, head_dim = q.shape
    layout = _layout(q, kv, block_tables, out, block_size)
    if not rows:
        return
    sums = stats = out  # with one split, nothing is put aside
    if config.splits > 1:
        sums = torch.empty((rows, heads, config.splits, head_dim), dtype=torch.float32, device=q.device)
        stats = torch.empty((rows, heads, config.splits, 2), dtype=torch.float32, device=q.device)
    _decode_kernel[(layout["KV_HEADS"], config.splits, rows)](
        q, kv, block_tables, context_lens, out, sums, stats, scale / math.log(2),
        q.stride(0), block_tables.stride(0), out.stride(0), **layout,
        ROWS=max(MIN_DOT, triton.next_power_of_2(layout["GROUP"])), SPLITS=config.splits, KEYS=config.keys,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    if config.splits > 1:
        _reduce_kernel[(heads, rows)](
            sums, stats, context_lens, out, out.stride(0),
            HEADS=heads, HEAD_DIM=head_dim, DIMS=layout["DIMS"], KEYS=config.keys, SPLITS=config.splits,
            SPLITS_PADDED=triton.next_power_of_2(config.splits), num_warps=4, enable_fp_fusion=True,
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
) -> None:
    """As `paged_decode` for several queries a sequence: the last ones of its context, each seeing up to itself.

    `q` and `out` are (T, heads, d); `query_starts` (S + 1,) int32 is where each sequence's rows begin and, last,
    where they end. Query i of n stands at position context_lens[s] - n + i; a context is at least n, or 0 and its
    rows get zeros, as do rows past the end. A row that sees no NaN or infinity gets none from keys of its
    sequence that come after it either; one that sees an infinity in V may get NaN.
    """
    rows, sequences = q.shape[0], len(context_lens)
    layout = _layout(q, kv, block_tables, out, block_size)
    if not rows:
        return
    tile_rows = max(config.rows, triton.next_power_of_2(layout["GROUP"]))
    queries = tile_rows // layout["GROUP"]
    # A sequence, and the rows that belong to none, may fill its last tile in part: a tile more for each.
    _prefill_kernel[(rows // queries + sequences + 1, layout["KV_HEADS"])](
        q, kv, block_tables, context_lens, query_starts, out, scale / math.log(2), sequences, rows,
        q.stride(0), block_tables.stride(0), out.stride(0), **layout,
        SEQUENCES=max(LEAST_SEQUENCES, triton.next_power_of_2(sequences + 1)), QUERIES=queries, ROWS=tile_rows,
        KEYS=config.keys,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip


def _layout(q: Tensor, kv: Tensor, block_tables: Tensor, out: Tensor, block_size: int) -> dict[str, int]:
    """The constants that both kernels are compiled for; asserts what they take for granted."""
    heads, head_dim = q.shape[1:]
    kv_heads = kv.shape[2]
    assert kv.shape[1:] == (2, kv_heads, head_dim), kv.shape
    assert kv.is_contiguous(), "slots lie side by side"
    assert heads % kv_heads == 0, f"{heads} query heads do not share {kv_heads} KV heads"
    assert out.shape == q.shape, out.shape
    assert q.stride()[1:] == out.stride()[1:] == (head_dim, 1), "a row's heads lie side by side"
    assert block_tables.stride(1) == 1, "a sequence's blocks lie side by side"
    return {
        "GROUP": heads // kv_heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "DIMS": max(MIN_DOT, triton.next_power_of_2(head_dim)),
        "BLOCK_SIZE": block_size,
    }


# What differs from step to step, and is read a number at a time: kernels are compiled once for all of it.
_TABLES = ["block_tables", "context_lens", "query_starts"]


@triton.jit
def _span(context: tl.tensor, SPLITS: tl.constexpr, KEYS: tl.constexpr) -> tl.tensor:
    """How many keys each split takes: whole steps, so that only the last split that has any ends within one."""
    return tl.cdiv(tl.cdiv(context, KEYS), SPLITS) * KEYS


@triton.jit(do_not_specialize=["table_row"], do_not_specialize_on_alignment=_TABLES)
def _decode_kernel(
    q: tl.tensor, kv: tl.tensor, block_tables: tl.tensor, context_lens: tl.tensor, out: tl.tensor,
    sums: tl.tensor, stats: tl.tensor, scale: tl.tensor, q_row: tl.tensor, table_row: tl.tensor, out_row: tl.tensor,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, SPLITS: tl.constexpr, KEYS: tl.constexpr,
) -> None:  # fmt: skip
    """Peak, total and mixed values (see `attend`) of a split of one sequence, for all query heads of a KV head."""
    kv_head, split, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    context = tl.load(context_lens + sequence)
    first = split * _span(context, SPLITS, KEYS)
    stop = tl.minimum(first + _span(context, SPLITS, KEYS), context)
    if (split > 0) & (stop <= first):
        return
    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIMS)
    heads = kv_head * GROUP + rows
    wanted = (rows < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    places = heads[:, None] * HEAD_DIM + dims[None, :]
    query = tl.load(q + sequence * q_row + places, wanted, other=0.0)
    table, kv_places = block_tables + sequence * table_row, kv + kv_head * HEAD_DIM
    peak, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, DIMS), tl.float32)
    whole = first + (stop - first) // KEYS * KEYS
    for key in range(first, whole, KEYS):
        peak, total, mixed = attend(
            query, peak, total, mixed, key, rows, stop, kv_places, table, scale,
            KV_HEADS, HEAD_DIM, DIMS, BLOCK_SIZE, KEYS, MASKED=False, CAUSAL=False,
        )  # fmt: skip
    if whole < stop:
        peak, total, mixed = attend(
            query, peak, total, mixed, whole, rows, stop, kv_places, table, scale,
            KV_HEADS, HEAD_DIM, DIMS, BLOCK_SIZE, KEYS, MASKED=True, CAUSAL=False,
        )  # fmt: skip
    if SPLITS > 1:
        part = (sequence * (KV_HEADS * GROUP) + heads) * SPLITS + split
        tl.store(sums + part[:, None] * HEAD_DIM + dims[None, :], mixed, wanted)
        tl.store(stats + part * 2, peak, rows < GROUP)
        tl.store(stats + part * 2 + 1, total, rows < GROUP)
    else:
        result = normalised(mixed, total[:, None]).to(out.dtype.element_ty)
        tl.store(out + sequence * out_row + places, result, wanted)


@triton.jit
def _reduce_kernel(
    sums: tl.tensor, stats: tl.tensor, context_lens: tl.tensor, out: tl.tensor, out_row: tl.tensor,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
) -> None:  # fmt: skip
    """out = Σ 2^(peak - top) sums / Σ 2^(peak - top) total over the splits that had any keys."""
    head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    context = tl.load(context_lens + sequence)
    splits, dims = tl.arange(0, SPLITS_PADDED), tl.arange(0, DIMS)
    used = (splits < SPLITS) & (splits * _span(context, SPLITS, KEYS) < context)
    part = (sequence * HEADS + head) * SPLITS + splits
    peak = tl.load(stats + part * 2, used, other=float("-inf"))
    total = tl.load(stats + part * 2 + 1, used, other=0.0)
    wanted = used[:, None] & (dims < HEAD_DIM)[None, :]
    mixed = tl.load(sums + part[:, None] * HEAD_DIM + dims[None, :], wanted, other=0.0)
    weight = tl.exp2(peak - tl.where(context > 0, tl.max(peak, 0), 0.0))
    result = normalised(tl.sum(mixed * weight[:, None], 0), tl.sum(total * weight, 0)).to(out.dtype.element_ty)
    tl.store(out + sequence * out_row + head * HEAD_DIM + dims, result, dims < HEAD_DIM)


@triton.jit(do_not_specialize=["sequences", "tokens", "table_row"], do_not_specialize_on_alignment=_TABLES)
def _prefill_kernel(
    q: tl.tensor, kv: tl.tensor, block_tables: tl.tensor, context_lens: tl.tensor, query_starts: tl.tensor,
    out: tl.tensor, scale: tl.tensor, sequences: tl.tensor, tokens: tl.tensor,
    q_row: tl.tensor, table_row: tl.tensor, out_row: tl.tensor,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SEQUENCES: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
) -> None:  # fmt: skip
    """out = mixed / total (see `attend`) for QUERIES queries of one sequence and the query heads of a KV head."""
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    # Sequence i has the tiles from starts[i] // QUERIES + i on: enough for its rows, whatever the starts.
    indices = tl.arange(0, SEQUENCES)
    starts = tl.load(query_starts + indices, indices <= sequences, other=0)
    begun = (indices <= sequences) & (starts // QUERIES + indices <= tile)
    sequence = tl.sum(begun.to(tl.int32), 0) - 1
    start = tl.load(query_starts + sequence)
    stop = tl.load(query_starts + sequence + 1, sequence < sequences, other=tokens)
    context = tl.load(context_lens + sequence, sequence < sequences, other=0)
    first = (tile - start // QUERIES - sequence) * QUERIES
    if start + first >= stop:
        return
    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIMS)
    queries = first + rows // GROUP
    wanted = ((rows < QUERIES * GROUP) & (start + queries < stop))[:, None] & (dims < HEAD_DIM)[None, :]
    places = (kv_head * GROUP + rows % GROUP)[:, None] * HEAD_DIM + dims[None, :]
    token = (start + queries).to(tl.int64)[:, None]
    query = tl.load(q + token * q_row + places, wanted, other=0.0)
    table, kv_places = block_tables + sequence.to(tl.int64) * table_row, kv + kv_head * HEAD_DIM
    peak, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, DIMS), tl.float32)
    before = context - (stop - start)
    shared = tl.maximum(before + first + 1, 0) // KEYS * KEYS  # whole steps of keys that every row sees
    end = tl.minimum(before + first + QUERIES, context)
    for key in range(0, shared, KEYS):
        peak, total, mixed = attend(
            query, peak, total, mixed, key, before + queries, end, kv_places, table, scale,
            KV_HEADS, HEAD_DIM, DIMS, BLOCK_SIZE, KEYS, MASKED=False, CAUSAL=False,
        )  # fmt: skip
    for key in range(shared, end, KEYS):
        peak, total, mixed = attend(
            query, peak, total, mixed, key, before + queries, end, kv_places, table, scale,
            KV_HEADS, HEAD_DIM, DIMS, BLOCK_SIZE, KEYS, MASKED=True, CAUSAL=True,
        )  # fmt: skip
    tl.store(out + token * out_row + places, normalised(mixed, total[:, None]).to(out.dtype.element_ty), wanted)
