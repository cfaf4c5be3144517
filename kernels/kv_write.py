"""The step between a layer's QKV projection and its attention, in one launch: norm, RoPE, the write to the KV cache."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kernels.launches import ceil_div, launch, power_of_2


class QkvWriteConfig(NamedTuple):
    """Launch configuration of the write."""

    heads: int  # heads of one token that a program takes
    num_warps: int


CANDIDATES = [
    QkvWriteConfig(heads, num_warps)
    for heads, num_warps in [(8, 4), (4, 1), (4, 4), (8, 2), (16, 4), (16, 8), (32, 8), (64, 8)]
]
DEFAULT = CANDIDATES[0]  # not measured


def qkv_write(
    qkv: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    frequencies: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    kv: Tensor,
    rotary_scale: float = 1.0,
    config: QkvWriteConfig = DEFAULT,
    rotary_dim: int | None = None,
    interleaved: bool = False,
) -> None:
    """q ← R(q), in place; kv[slot_mapping[t], 0] = R(k); kv[slot_mapping[t], 1] = v; R is an RMSNorm, then RoPE.

    `qkv` is (T, heads + 2 kv_heads, d): a token's queries, keys and values in that order. Only the queries change.
    `kv` is (slots, 2, kv_heads, d). `positions` and `slot_mapping` are (T,) integers; a token whose slot is -1 is
    skipped. The norm is x / sqrt(mean(x²) + eps) · weight; `q_weight` and `k_weight` are (d,) of any float dtype, or
    both None for heads without a norm. RoPE turns the halves (a, b) of a head into
    (a cos θ - b sin θ, b cos θ + a sin θ), where θ = position · frequencies, (d / 2,) float32, and cosine and sine are
    multiplied by `rotary_scale`. With a `rotary_dim`, only the first so many dimensions turn, by the first frequencies.
    `interleaved`: (a, b) are neighbouring dimensions, and not halves.

    Norm, cosine, sine and the products with the cosine are each rounded to qkv's dtype, as in
    kernels.reference.kv_write. In float32, kernel and reference differ by a few units in the last place. In bfloat16
    and float16 their bits are equal, except where that float32 difference changes a rounding: there they differ by one
    unit of the dtype.
    """
    tokens, rows, head_dim = qkv.shape
    kv_heads = kv.shape[2]
    assert kv.shape[1:] == (2, kv_heads, head_dim), kv.shape
    assert kv.is_contiguous(), "slots must follow each other in memory"
    assert qkv.stride()[1:] == (head_dim, 1), "a token's heads must follow each other in memory"
    assert qkv.dtype == kv.dtype, f"{qkv.dtype} is written to a cache of {kv.dtype}"
    assert frequencies.shape == (head_dim // 2,), frequencies.shape
    assert (q_weight is None) == (k_weight is None), "queries and keys have a norm, or neither has"
    turned = head_dim if rotary_dim is None else rotary_dim
    assert 0 <= turned <= head_dim, turned
    if not tokens:
        return
    launch(
        _qkv_write_kernel, (tokens, ceil_div(rows, config.heads)),
        qkv, positions, slot_mapping, frequencies, q_weight, k_weight, eps, kv, rotary_scale, qkv.stride(0),
        Q_HEADS=rows - 2 * kv_heads, KV_HEADS=kv_heads, HALF=head_dim // 2,
        PAIRS=power_of_2(head_dim // 2), HEADS=config.heads, NORM=q_weight is not None,
        TURNED=turned // 2, INTERLEAVED=interleaved,
        num_warps=config.num_warps, enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit
def _qkv_write_kernel(
    qkv: tl.tensor, positions: tl.tensor, slot_mapping: tl.tensor, frequencies: tl.tensor, q_weight: tl.tensor,
    k_weight: tl.tensor, eps: tl.tensor, kv: tl.tensor, rotary_scale: tl.tensor, qkv_row: tl.tensor,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, HEADS: tl.constexpr,
    NORM: tl.constexpr, TURNED: tl.constexpr, INTERLEAVED: tl.constexpr,
) -> None:  # fmt: skip
    """HEADS heads of one token: norm and turn queries and keys; store queries in place, keys and values in the slot."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if slot < 0:
        return
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    inside = (head < Q_HEADS + 2 * KV_HEADS) & (pair < HALF)
    # The dimensions of each pair; those that do not turn follow the others, and are paired in any way
    first, second = pair, pair + HALF
    if INTERLEAVED:
        first = tl.where(pair < TURNED, 2 * pair, TURNED + pair)
        second = tl.where(pair < TURNED, 2 * pair + 1, HALF + pair)
    elif TURNED < HALF:
        first = tl.where(pair < TURNED, pair, TURNED + pair)
        second = tl.where(pair < TURNED, TURNED + pair, HALF + pair)
    source = qkv + token * qkv_row + head * (2 * HALF)
    left, right = tl.load(source + first, inside, other=0.0), tl.load(source + second, inside, other=0.0)
    a, b = left.to(tl.float32), right.to(tl.float32)
    dtype: tl.constexpr = qkv.dtype.element_ty
    if NORM:
        length = tl.sqrt(tl.sum(a * a + b * b, 1) / (2 * HALF) + eps)[:, None]
        a = _rounded(a / length * _weight(q_weight, k_weight, head < Q_HEADS, first, pair < HALF), dtype)
        b = _rounded(b / length * _weight(q_weight, k_weight, head < Q_HEADS, second, pair < HALF), dtype)
    angle = tl.load(positions + token).to(tl.float32) * tl.load(frequencies + pair, pair < TURNED, other=0.0)
    scaling = tl.where(pair < TURNED, rotary_scale, 1.0)
    cos, sin = _rounded(tl.cos(angle) * scaling, dtype), _rounded(tl.sin(angle) * scaling, dtype)
    turned = head < Q_HEADS + KV_HEADS
    left = tl.where(turned, (_rounded(a * cos, dtype) - b * sin).to(dtype), left)
    right = tl.where(turned, (_rounded(b * cos, dtype) + a * sin).to(dtype), right)
    query = inside & (head < Q_HEADS)
    tl.store(source + first, left, query)
    tl.store(source + second, right, query)
    cached = inside & (head >= Q_HEADS)
    target = kv + slot * (4 * KV_HEADS * HALF) + (head - Q_HEADS) * (2 * HALF)  # K's heads, then V's
    tl.store(target + first, left, cached)
    tl.store(target + second, right, cached)


@triton.jit
def _weight(q_weight: tl.tensor, k_weight: tl.tensor, query: tl.tensor, dims: tl.tensor, there: tl.tensor) -> tl.tensor:
    """The norm's weights of some dimensions, float32: `q_weight` for query heads, `k_weight` for the others."""
    q = tl.load(q_weight + dims, there, other=0.0).to(tl.float32)
    k = tl.load(k_weight + dims, there, other=0.0).to(tl.float32)
    return tl.where(query, q, k)


@triton.jit
def _rounded(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    return x.to(dtype).to(tl.float32)
