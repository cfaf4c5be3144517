"""Attention over a KV cache that is addressed by slots."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class AttentionGroup(NamedTuple):
    """Sequences of a batch that attend in one call: `sequences` of them, with `queries` rows each.

    `rows` are their query rows, one sequence after another. `slots` (sequences, L) int64 are the KV slots of
    each one's context, its own new tokens included, padded with 0. `mask` (sequences, 1, queries, L) is added
    to the scores, 0 or -inf, in the dtype of the queries; None where everything is visible.
    """

    rows: slice
    sequences: int
    queries: int
    slots: Tensor
    mask: Tensor | None


def paged_attention(q: Tensor, kv: Tensor, groups: Sequence[AttentionGroup], scale: float) -> Tensor:
    """softmax(q Kᵀ · scale + mask) V for each group, query head h reading KV head h // (heads / kv_heads).

    `q` is (T, heads, d), `kv` (slots, 2, kv_heads, d) with K at index 0 and V at 1, and the groups cover the T
    rows. Gives (T, heads * d).
    """
    if len(groups) == 1:
        return _attend(q, kv, groups[0], scale).reshape(q.shape[0], -1)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for group in groups:
        out[group.rows] = _attend(q[group.rows], kv, group, scale)
    return out.view(q.shape[0], -1)


def _attend(q: Tensor, kv: Tensor, group: AttentionGroup, scale: float) -> Tensor:
    """One group's attention, (rows, heads, d)."""
    rows, heads, d = q.shape
    kv_heads = kv.shape[2]
    # One gather brings K and V; the permutation is a view: (2, sequences, kv_heads, L, d).
    context = kv.index_select(0, group.slots.flatten()).view(*group.slots.shape, 2, kv_heads, d).permute(2, 0, 3, 1, 4)
    k, v = context[0], context[1]
    if group.queries == 1:
        # The heads that share a KV head become its queries, so that K and V are not repeated for them.
        folded = q.view(rows, kv_heads, heads // kv_heads, d)
        return F.scaled_dot_product_attention(folded, k, v, group.mask, scale=scale).reshape(rows, heads, d)
    split = q.view(group.sequences, group.queries, heads, d).transpose(1, 2)
    out = F.scaled_dot_product_attention(split, k, v, group.mask, scale=scale, enable_gqa=heads != kv_heads)
    return out.transpose(1, 2).reshape(rows, heads, d)
