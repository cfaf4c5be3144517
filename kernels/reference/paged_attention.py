"""The specification of kernels.paged_attention: attention over a KV cache that block tables address."""

import torch
from torch import Tensor


def paged_decode(
    q: Tensor,
    kv: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    block_size: int,
    scale: float,
    out: Tensor,
    window: int = 0,
    cap: float = 0.0,
    sinks: Tensor | None = None,
) -> None:
    """out[s, h] = softmax(q[s, h] Kᵀ · scale) V over sequence s's context, h reading KV head h // (heads / kv_heads).

    Arguments as in kernels.paged_attention.paged_decode. The weights are not rounded.
    """
    for row, context in enumerate(context_lens.tolist()):
        out[row] = _attend(q[row], kv, block_tables[row], context, block_size, scale, window, cap, sinks)


def paged_prefill(
    q: Tensor,
    kv: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_starts: Tensor,
    block_size: int,
    scale: float,
    out: Tensor,
    window: int = 0,
    cap: float = 0.0,
    sinks: Tensor | None = None,
) -> None:
    """As `paged_decode`, for several queries a sequence: the last tokens of its context, with a causal mask.

    Arguments as in kernels.paged_attention.paged_prefill.
    """
    starts = query_starts.tolist()
    out[starts[-1] :] = 0
    for sequence, context in enumerate(context_lens.tolist()):
        start, stop = starts[sequence : sequence + 2]
        for row in range(start, stop):
            seen = max(context - (stop - 1 - row), 0)
            out[row] = _attend(q[row], kv, block_tables[sequence], seen, block_size, scale, window, cap, sinks)


def _attend(
    query: Tensor,
    kv: Tensor,
    table: Tensor,
    seen: int,
    block_size: int,
    scale: float,
    window: int,
    cap: float,
    sinks: Tensor | None,
) -> Tensor:
    """One row's attention, (heads, d) float32, over the first `seen` tokens; zeros if there are none."""
    heads, head_dim = query.shape
    tokens = torch.arange(max(seen - window, 0) if window else 0, seen, device=table.device)
    slots = table[tokens // block_size].long() * block_size + tokens % block_size
    k, v = kv[slots].float().permute(1, 2, 0, 3)  # (kv_heads, seen, d)
    grouped = query.float().view(len(k), -1, head_dim)
    scores = grouped @ k.transpose(1, 2) * scale
    scores = cap * (scores / cap).tanh() if cap else scores
    if sinks is not None:
        scores = torch.cat((scores, sinks.view(len(k), -1, 1)), -1)
    mixed: Tensor = torch.softmax(scores, -1)[..., : len(tokens)] @ v
    return mixed.view(heads, head_dim)
