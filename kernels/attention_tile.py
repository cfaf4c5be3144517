"""One step of attention's running softmax over keys of a paged KV cache, as decode and prefill take it."""

import triton
import triton.language as tl


@triton.jit
def attend(
    query: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    mixed: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    stop: tl.tensor,
    kv: tl.tensor,
    table: tl.tensor,
    scale: tl.tensor,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Take KEYS keys from `first` on into peak = max score, total = Σ 2^(score - peak), mixed = Σ 2^(score - peak) V.

    `query` is (rows, DIMS), DIMS being HEAD_DIM padded with zeros; `kv` points at the KV head in slot 0, and `scale`
    has log₂ e in it. MASKED: keys end at `stop`, and neither they nor their blocks are read from there on. CAUSAL, of
    masked steps: each row sees keys up to its `last`.
    """
    keys, dims = first + tl.arange(0, KEYS), tl.arange(0, DIMS)
    held = keys < stop
    blocks = tl.load(table + keys // BLOCK_SIZE, held, other=0) if MASKED else tl.load(table + keys // BLOCK_SIZE)
    slots = blocks.to(tl.int64) * BLOCK_SIZE + keys % BLOCK_SIZE
    k_places = kv + slots[:, None] * (2 * KV_HEADS * HEAD_DIM) + dims[None, :]
    v_places = k_places + KV_HEADS * HEAD_DIM
    if MASKED or DIMS > HEAD_DIM:
        wanted = dims[None, :] < HEAD_DIM
        if MASKED:
            wanted = wanted & held[:, None]
        k, v = tl.load(k_places, wanted, other=0.0), tl.load(v_places, wanted, other=0.0)
    else:
        k, v = tl.load(k_places), tl.load(v_places)
    scores = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
    if MASKED:
        visible = held[None, :]
        if CAUSAL:
            visible = visible & (keys[None, :] <= last[:, None])
            # A weight of 0 would not keep a NaN or infinity out: it leaves V, and the rows that see it become NaN.
            finite = tl.abs(v.to(tl.float32)) < float("inf")
            v = tl.where(finite, v, 0.0)
            broken = tl.min(finite.to(tl.int32), 1) == 0
            total = tl.where(tl.max((visible & broken[None, :]).to(tl.int32), 1) > 0, float("nan"), total)
        scores = tl.where(visible, scores, float("-inf"))
    top = tl.maximum(peak, tl.max(scores, 1))
    weights, decay = tl.exp2(scores - top[:, None]), tl.exp2(peak - top)
    total = total * decay + tl.sum(weights, 1)
    mixed = tl.dot(weights.to(v.dtype), v, mixed * decay[:, None], input_precision="ieee")
    return top, total, mixed


@triton.jit
def normalised(mixed: tl.tensor, total: tl.tensor) -> tl.tensor:
    """mixed / total, and 0 where no key was seen: there, both are 0."""
    return mixed / tl.where(total == 0.0, 1.0, total)
