"""The CPU path of attention, over a KV cache that is addressed by slots."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu import onednn

# From this many scores of a KV head's queries on, a prompt's attention is computed head by head. With 9 query and 3 KV
# heads of 64 in bfloat16, torch's attention takes 30 % less time at 46,000 scores, the same time at 100,000 and 17 %
# more at 161,000 (2 threads of a Zen 5).
BY_HEAD_SCORES = 100_000

# The most bytes of scores between their product and their softmax, so that they stay in the CPU's cache. 256 queries
# after 3,840 tokens take 18.2 ms with 1 MiB, 15.7 with 2, 15.2 with 4 and 14.7 with 8 (same shape, 1 thread).
SCORE_BYTES = 4 << 20


class AttentionGroup(NamedTuple):
    """Sequences of a batch that attend in one call, each with the same number of queries.

    Several queries of a sequence are the last tokens of its context, in order.
    """

    rows: slice  # the query rows of all sequences, one sequence after another
    sequences: int
    queries: int  # of each sequence
    slots: Tensor  # (sequences, L) int64, the KV slots of the tokens that any query sees, padded with 0
    mask: Tensor | None  # (sequences, 1, queries, L), 0 or -inf, in the queries' dtype; None if all is visible
    windowed: bool = False  # whether the mask hides more than what comes after a query


def paged_attention(
    q: Tensor,
    kv: Tensor,
    groups: Sequence[AttentionGroup],
    scale: float,
    cap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(q Kᵀ · scale + mask) V for each group, query head h reading KV head h // (heads / kv_heads).

    `q` is (T, heads, d), `kv` (slots, 2, kv_heads, d) with K at index 0 and V at 1, and the groups cover the T
    rows. A `cap` other than 0 caps the scores before the mask: cap · tanh(q Kᵀ · scale / cap). `sinks` are scores
    (heads,) float32 that the softmax has beside those of keys, and that weigh no value. Returns (T, heads * d).
    """
    if len(groups) == 1:
        return _attend(q, kv, groups[0], scale, cap, sinks).reshape(q.shape[0], -1)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for group in groups:
        out[group.rows] = _attend(q[group.rows], kv, group, scale, cap, sinks)
    return out.view(q.shape[0], -1)


def _attend(q: Tensor, kv: Tensor, group: AttentionGroup, scale: float, cap: float, sinks: Tensor | None) -> Tensor:
    """One group's attention, (rows, heads, d)."""
    rows, heads, d = q.shape
    kv_heads = kv.shape[2]
    scores = group.queries * group.slots.shape[1] * heads // kv_heads
    plain = not cap and sinks is None
    alone = group.sequences == 1 < group.queries and not group.windowed and plain
    if alone and scores >= BY_HEAD_SCORES and q.device.type == "cpu" and onednn.computes(q.dtype):
        return _attend_by_head(q, kv, group, scale)
    # One gather copies K and V; the permutation is a view, (2, sequences, kv_heads, L, d).
    context = kv.index_select(0, group.slots.flatten()).view(*group.slots.shape, 2, kv_heads, d).permute(2, 0, 3, 1, 4)
    k, v = context[0], context[1]
    if not plain:
        return _attend_by_formula(q, k, v, group, scale, cap, sinks)
    if group.queries == 1:
        # The heads that share a KV head become queries of that head, so that K and V are not repeated for them.
        folded = q.view(rows, kv_heads, heads // kv_heads, d)
        return F.scaled_dot_product_attention(folded, k, v, group.mask, scale=scale).reshape(rows, heads, d)
    split = q.view(group.sequences, group.queries, heads, d).transpose(1, 2)
    out = F.scaled_dot_product_attention(split, k, v, group.mask, scale=scale, enable_gqa=heads != kv_heads)
    return out.transpose(1, 2).reshape(rows, heads, d)


def _attend_by_formula(
    q: Tensor, k: Tensor, v: Tensor, group: AttentionGroup, scale: float, cap: float, sinks: Tensor | None
) -> Tensor:
    """`_attend` with caps or sinks, which torch's attention has not; `k` and `v` are (sequences, kv_heads, L, d)."""
    rows, heads, d = q.shape
    kv_heads = k.shape[1]
    split = q.view(group.sequences, group.queries, kv_heads, heads // kv_heads, d).permute(0, 2, 3, 1, 4)
    scores = split.float() @ k[:, :, None].float().transpose(-2, -1)  # (sequences, kv_heads, heads of each, queries, L)
    scores = (scores * (scale / cap)).tanh_().mul_(cap) if cap else scores * scale
    if group.mask is not None:
        scores += group.mask[:, :, None]
    if sinks is not None:
        own = sinks.view(1, kv_heads, heads // kv_heads, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, own), -1)
    weights = torch.softmax(scores, -1)[..., : k.shape[2]].to(v.dtype)
    return (weights @ v[:, :, None]).permute(0, 3, 1, 2, 4).reshape(rows, heads, d)


def _attend_by_head(q: Tensor, kv: Tensor, group: AttentionGroup, scale: float) -> Tensor:
    """`_attend` for one sequence of many queries: oneDNN products for each KV head and a few queries at a time.

    The weights are rounded to q's dtype before the product with V; the scores are not rounded. torch's own CPU
    attention multiplies bfloat16 at the speed of float32, a fifth of oneDNN's speed here.
    """
    queries, heads, d = q.shape
    length, kv_heads = group.slots.shape[1], kv.shape[2]
    shared = heads // kv_heads
    keys, values = kv.index_select(0, group.slots[0]).permute(1, 2, 0, 3).contiguous()
    keys = keys.float()
    split = (q.float() * scale).view(queries, kv_heads, shared, d)
    out = torch.empty((queries, kv_heads, shared, d), dtype=q.dtype)
    tile = max(SCORE_BYTES // (4 * shared * length), 1)
    for first in range(0, queries, tile):
        last = min(first + tile, queries)
        seen = length - queries + last
        own = None if group.mask is None else group.mask[0, 0, first:last, None, seen - (last - first) : seen]
        for head in range(kv_heads):
            out[first:last, head] = _weighted(split[first:last, head], keys[head, :seen], values[head, :seen], own)
    return out.view(queries, heads, d)


def _weighted(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q Kᵀ + mask) V for `q` (rows, shared, d) float32, where `mask` (rows, 1, rows) covers the last keys."""
    rows, shared, d = q.shape
    scores = onednn.linear(q.reshape(rows * shared, d), keys)
    if mask is not None:
        scores.view(rows, shared, -1)[..., -rows:] += mask
    weights = torch.softmax(scores, -1, out=scores).to(values.dtype)
    return onednn.linear(weights, values.T).view(rows, shared, d)
