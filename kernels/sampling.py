"""Sampling a token for each row of logits on the device, without waiting for the host.

Rows without a cut (top_k, top_p, min_p) take two kernels: the sums of chunks of the vocabulary, then a choice of the
chunk and of the token in it. Rows with a cut are then drawn from again: those with a top_k from their candidates in
order, the others by a search for the logit at which the tokens kept end, which passes over the logits a few times.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launches import ceil_div, launch, power_of_2
from kernels.row_params import LEAST_TEMPERATURE, RowParams

_LEAST_TEMPERATURE = tl.constexpr(LEAST_TEMPERATURE)
_LARGEST = tl.constexpr(2**31 - 1)
_PROBES = tl.constexpr(4)  # of one pass of a search
_LOWEST_LOGIT = tl.constexpr(-3.4e38)
_WEIGHTLESS = tl.constexpr(110.0)  # e^-110 is 0 in float32


class SamplingConfig(NamedTuple):
    """Launch configuration of sampling."""

    chunk: int  # tokens of the vocabulary, or candidates, that a program takes at a time
    num_warps: int


CANDIDATES = [
    SamplingConfig(chunk, num_warps)
    for chunk, num_warps in [(2048, 4), (1024, 4), (1024, 2), (2048, 8), (4096, 4), (4096, 8), (8192, 8), (8192, 16)]
]
DEFAULT = CANDIDATES[0]  # not measured
_SEARCHED, _SEARCH_WARPS = 2048, 8  # logits of one step of a search, whose sums are in registers; not measured


def sample(logits: Tensor, params: RowParams, config: SamplingConfig = DEFAULT) -> tuple[Tensor, Tensor]:
    """A token for each row of `logits` (n, vocab), and whether the row had one: int64 and bool, (n,) each.

    kernels.reference.sampling.sample states which token. Here weights are float32 and running sums float64, so a draw
    within the weights' rounding of the border between two tokens may give the neighbour. Rows of `logits` have no
    gaps. Nothing sorts the vocabulary.
    """
    (rows, vocab), device = logits.shape, logits.device
    assert (logits.stride(1), len(params.draw)) == (1, rows)
    token_ids = torch.empty(rows, dtype=torch.int64, device=device)
    finite = torch.empty(rows, dtype=torch.bool, device=device)
    if not rows:
        return token_ids, finite
    chunks = ceil_div(vocab, config.chunk)
    maxima = torch.empty((rows, chunks), dtype=torch.float32, device=device)
    masses = torch.empty((rows, chunks), dtype=torch.float64, device=device)
    launch(
        _chunk_kernel, (rows, chunks),
        logits, params.temperature, maxima, masses, logits.stride(0), VOCAB=vocab, CHUNKS=chunks, CHUNK=config.chunk,
        num_warps=config.num_warps, enable_fp_fusion=True,
    )  # fmt: skip
    launch(
        _choose_kernel, (rows,),
        logits, params.temperature, params.draw, maxima, masses, token_ids, finite, logits.stride(0), VOCAB=vocab,
        CHUNKS=chunks, CHUNKS_BLOCK=power_of_2(chunks), CHUNK=config.chunk, num_warps=config.num_warps,
        enable_fp_fusion=True,
    )  # fmt: skip
    if len(params.ranked_rows):
        _sample_ranked_rows(logits, params, finite, token_ids, config)
    if len(params.cut_rows):
        launch(
            _search_kernel, (len(params.cut_rows),),
            logits, params.cut_rows, params.temperature, params.top_p, params.min_p, params.draw, maxima, finite,
            token_ids, logits.stride(0), VOCAB=vocab, CHUNKS=chunks, CHUNKS_BLOCK=power_of_2(chunks),
            CHUNK=_SEARCHED, SHIFT=16 if logits.dtype == torch.bfloat16 else 0, num_warps=_SEARCH_WARPS,
            enable_fp_fusion=True,
        )  # fmt: skip
    return token_ids, finite


def _sample_ranked_rows(
    logits: Tensor, params: RowParams, finite: Tensor, token_ids: Tensor, config: SamplingConfig
) -> None:
    """Overwrite `token_ids` in the `ranked_rows` that are finite: order their candidates, then draw from those kept."""
    rows, vocab = len(params.ranked_rows), logits.shape[1]
    keys = torch.empty((rows, vocab), dtype=torch.int64, device=logits.device)
    launch(
        _key_kernel, (rows, ceil_div(vocab, config.chunk)),
        logits, params.ranked_rows, keys, logits.stride(0), VOCAB=vocab, CHUNK=config.chunk, num_warps=config.num_warps,
        enable_fp_fusion=True,
    )  # fmt: skip
    keys = keys.topk(min(params.candidates, vocab), -1).values
    launch(
        _cut_kernel, (rows,),
        keys, params.ranked_rows, params.temperature, params.top_k, params.top_p, params.min_p, params.draw, finite,
        token_ids, keys.shape[1], CHUNK=config.chunk, num_warps=config.num_warps, enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit
def _divisor(temperature: tl.tensor) -> tl.tensor:
    """The divisor of the logits, float32."""
    return tl.maximum(temperature, _LEAST_TEMPERATURE).to(tl.float32)


@triton.jit
def _first_past(
    sums: tl.tensor, weights: tl.tensor, target: tl.tensor, index: tl.tensor, END: tl.constexpr
) -> tl.tensor:
    """The first index at which the running sum exceeds the target, END if there is none.

    A parallel sum may decrease from one index to the next, and so exceed the target first at a weight of 0. Such an
    index is not chosen.
    """
    return tl.min(tl.where((sums > target) & (weights > 0), index, END), 0)


@triton.jit
def _invert(weights: tl.tensor, target: tl.tensor, index: tl.tensor, END: tl.constexpr) -> tl.tensor:
    """The first index at which the running sum of `weights` exceeds the target.

    If the target was rounded up to the total, the last index with a weight.
    """
    passed = _first_past(tl.cumsum(weights, 0), weights, target, index, END)
    return tl.minimum(passed, tl.max(tl.where(weights > 0, index, 0), 0))


@triton.jit
def _chunk_kernel(
    logits: tl.tensor, temperature: tl.tensor, maxima: tl.tensor, masses: tl.tensor, row_stride: tl.tensor,
    VOCAB: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    """maxima[row, c] = max of chunk c, +inf if it has NaN; masses[row, c] = Σ exp((logit - max) / T)."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    values = tl.load(logits + row * row_stride + token, token < VOCAB, other=float("-inf")).to(tl.float32)
    values = tl.where(values != values, float("inf"), values)
    largest = tl.max(values, 0)
    level = tl.where(tl.abs(largest) == float("inf"), 0.0, largest)  # infinity - infinity would be NaN
    weights = tl.exp((values - level) / _divisor(tl.load(temperature + row)))
    place = row * CHUNKS + chunk
    tl.store(maxima + place, largest)
    tl.store(masses + place, tl.sum(weights.to(tl.float64), 0))


@triton.jit
def _choose_kernel(
    logits: tl.tensor, temperature: tl.tensor, draw: tl.tensor, maxima: tl.tensor, masses: tl.tensor,
    token_ids: tl.tensor, finite: tl.tensor, row_stride: tl.tensor, VOCAB: tl.constexpr, CHUNKS: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr, CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    """token_ids[row] = the first maximum, or where the running sum passes draw · Σ: first the chunk, then the token."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, CHUNKS_BLOCK)
    tops = tl.load(maxima + row * CHUNKS + index, index < CHUNKS, other=float("-inf"))
    top = tl.max(tops, 0)
    whole = (top > float("-inf")) & (top < float("inf"))
    tl.store(finite + row, whole)
    if whole:
        heat = tl.load(temperature + row)
        scale = tl.exp((tops - top) / _divisor(heat)).to(tl.float64)
        sums = tl.load(masses + row * CHUNKS + index, index < CHUNKS, other=0.0) * scale
        target = tl.load(draw + row) * tl.sum(sums, 0)
        likeliest = tl.min(tl.where(tops == top, index, CHUNKS), 0)
        chunk = tl.where(heat > 0, _invert(sums, target, index, CHUNKS), likeliest)

        # The chunk's weights are computed as in _chunk_kernel, from its own maximum, so that they add up to its mass.
        level = tl.max(tl.where(index == chunk, tops, float("-inf")), 0)
        target -= tl.sum(tl.where(index < chunk, sums, 0.0), 0)
        target /= tl.sum(tl.where(index == chunk, scale, 0.0), 0)
        inner = tl.arange(0, CHUNK)
        token = chunk * CHUNK + inner
        values = tl.load(logits + row * row_stride + token, token < VOCAB, other=float("-inf")).to(tl.float32)
        weights = tl.exp((values - level) / _divisor(heat)).to(tl.float64)
        first = tl.min(tl.where(values == level, inner, CHUNK), 0)
        chosen = tl.where(heat > 0, _invert(weights, target, inner, CHUNK), first)
        tl.store(token_ids + row, (chunk * CHUNK + chosen).to(tl.int64))
    else:
        tl.store(token_ids + row, tl.full((), 0, tl.int64))


@triton.jit
def _flip(bits: tl.tensor) -> tl.tensor:
    """Map a float32's bits to an int32 of the same order, and back."""
    return bits ^ ((bits >> 31) & _LARGEST)


@triton.jit
def _order(logit: tl.tensor, SHIFT: tl.constexpr) -> tl.tensor:
    """An int32 of the order of logits, whose SHIFT lowest bits of a float32 say nothing."""
    logit = tl.where(logit == 0, 0.0, logit)  # -0.0 equals 0.0, but its bits differ
    return _flip(logit.to(tl.int32, bitcast=True)) >> SHIFT


@triton.jit
def _of_order(order: tl.tensor, SHIFT: tl.constexpr) -> tl.tensor:
    """The logit, float32."""
    bits = order.to(tl.int32)
    if SHIFT:
        bits = (bits << SHIFT) | tl.where(bits < 0, (1 << SHIFT) - 1, 0)
    return _flip(bits).to(tl.float32, bitcast=True)


@triton.jit
def _logit(key: tl.tensor) -> tl.tensor:
    return _flip((key >> 32).to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _key_kernel(
    logits: tl.tensor, cut_rows: tl.tensor, keys: tl.tensor, row_stride: tl.tensor, VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    """keys[i, token] = the logit of row cut_rows[i] in the high half, 2³¹ - 1 - token in the low half.

    No two keys are equal, so every sort gives the same descending order: of equal logits, the lower token first.
    """
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(cut_rows + place)
    token = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    values = tl.load(logits + row * row_stride + token, token < VOCAB, other=0.0).to(tl.float32)
    high = _order(values, 0).to(tl.int64) << 32
    tl.store(keys + place * VOCAB + token, high | (token ^ _LARGEST).to(tl.int64), token < VOCAB)


@triton.jit
def _weigh(keys: tl.tensor, index: tl.tensor, count: tl.tensor, level: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """w = exp((logit - level) / temperature) of the candidates at `index`, float64, 0 from `count` on."""
    values = tl.where(index < count, _logit(tl.load(keys + index, index < count, other=0)), float("-inf"))
    return tl.exp((values - level) / _divisor(temperature)).to(tl.float64)


@triton.jit(do_not_specialize=["candidates"])  # it changes with the batch
def _cut_kernel(
    keys: tl.tensor, cut_rows: tl.tensor, temperature: tl.tensor, top_k: tl.tensor, top_p: tl.tensor, min_p: tl.tensor,
    draw: tl.tensor, finite: tl.tensor, token_ids: tl.tensor, candidates: tl.tensor, CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    """token_ids[row] = where the running sum over the kept tokens, in descending order, passes draw · Σ over them.

    Of the first top_k tokens, those are kept before which the weights add up to less than top_p · Σ, and whose weight
    is at least min_p of the first one's.
    """
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(cut_rows + place)
    if tl.load(finite + row):
        keys += place * candidates
        asked, heat, least = tl.load(top_k + row), tl.load(temperature + row), tl.load(min_p + row)
        count = tl.where(asked > 0, tl.minimum(asked, candidates), candidates).to(tl.int32)
        level = _logit(tl.load(keys))
        inner = tl.arange(0, CHUNK)

        total = tl.full((), 0.0, tl.float64)
        for start in range(0, count, CHUNK):
            total += tl.sum(_weigh(keys, start + inner, count, level, heat), 0)
        limit = tl.load(top_p + row) * total

        # The kept tokens are a prefix of the candidates, because sums rise and weights fall.
        sum_before = tl.full((), 0.0, tl.float64)
        kept = tl.full((), 0, tl.int32)
        mass = tl.full((), 0.0, tl.float64)
        for start in range(0, count, CHUNK):
            weights = _weigh(keys, start + inner, count, level, heat)
            sums = sum_before + tl.cumsum(weights, 0)
            keep = ((sums - weights < limit) & (weights >= least)) | (start + inner == 0)
            kept += tl.sum((keep & (weights > 0)).to(tl.int32), 0)
            mass += tl.sum(tl.where(keep, weights, 0.0), 0)
            sum_before += tl.sum(weights, 0)
        target = tl.load(draw + row) * mass

        sum_before = tl.full((), 0.0, tl.float64)
        chosen = kept - 1  # stays if the target was rounded up to the total
        for start in range(0, kept, CHUNK):
            weights = _weigh(keys, start + inner, kept, level, heat)
            sums = sum_before + tl.cumsum(weights, 0)
            chosen = tl.minimum(chosen, _first_past(sums, weights, target, start + inner, _LARGEST))
            sum_before += tl.sum(weights, 0)
        tl.store(token_ids + row, (tl.load(keys + chosen) & _LARGEST) ^ _LARGEST)


@triton.jit
def _weight(order: tl.tensor, level: tl.tensor, divisor: tl.tensor, SHIFT: tl.constexpr) -> tl.tensor:
    """w = exp((logit - level) / T) of the logit with this order, float64."""
    return tl.exp((_of_order(order, SHIFT) - level) / divisor).to(tl.float64)


@triton.jit
def _mass_above(
    row: tl.tensor, orders: tl.tensor, level: tl.tensor, divisor: tl.tensor, SHIFT: tl.constexpr, VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Σ w over the logits above each of `orders`, (_PROBES,) float64. Of a higher one it is never more."""
    sums = tl.zeros((_PROBES, CHUNK), tl.float64)
    for start in range(0, VOCAB, CHUNK):
        token = start + tl.arange(0, CHUNK)
        logit = tl.load(row + token, token < VOCAB, other=float("-inf")).to(tl.float32)
        weight = tl.exp((logit - level) / divisor).to(tl.float64)
        above = _order(logit, SHIFT).to(tl.int64)[None, :] > orders[:, None]
        sums += tl.where(above, weight[None, :], 0.0)
    return tl.sum(sums, 1)


@triton.jit
def _least_order(
    row: tl.tensor, low: tl.tensor, high: tl.tensor, bound: tl.tensor, level: tl.tensor, divisor: tl.tensor,
    CLOSED: tl.constexpr, SHIFT: tl.constexpr, VOCAB: tl.constexpr, CHUNK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The least order from `low` to `high` above which weights add up to less than `bound`, or CLOSED to no more."""
    while low < high:
        probes = low + (high - low) * (tl.arange(0, _PROBES) + 1) // (_PROBES + 1)
        sums = _mass_above(row, probes, level, divisor, SHIFT, VOCAB, CHUNK)
        few = sums <= bound if CLOSED else sums < bound
        above = tl.max(tl.where(few, low, probes + 1), 0)
        high = tl.min(tl.where(few, probes, high), 0)
        low = above
    return low


@triton.jit
def _least_heavy(
    low: tl.tensor, high: tl.tensor, least: tl.tensor, level: tl.tensor, divisor: tl.tensor, SHIFT: tl.constexpr
) -> tl.tensor:
    """The least order from `low` to `high` whose weight is `least` or more."""
    while low < high:
        middle = low + (high - low) // 2
        heavy = _weight(middle, level, divisor, SHIFT) >= least
        low = tl.where(heavy, low, middle + 1)
        high = tl.where(heavy, middle, high)
    return low


@triton.jit
def _equal_token(
    row: tl.tensor, order: tl.tensor, place: tl.tensor, SHIFT: tl.constexpr, VOCAB: tl.constexpr, CHUNK: tl.constexpr
) -> tl.tensor:
    """The token at `place` among those with this order, or the last of them."""
    passed = tl.full((), 0, tl.int32)
    chosen = tl.full((), 0, tl.int32)
    for start in range(0, VOCAB, CHUNK):
        token = start + tl.arange(0, CHUNK)
        logit = tl.load(row + token, token < VOCAB, other=float("-inf")).to(tl.float32)
        equal = ((_order(logit, SHIFT).to(tl.int64) == order) & (token < VOCAB)).to(tl.int32)
        before = passed + tl.cumsum(equal, 0) - equal
        chosen = tl.maximum(chosen, tl.max(tl.where((equal > 0) & (before <= place), token, 0), 0))
        passed += tl.sum(equal, 0)
    return chosen


@triton.jit
def _search_kernel(
    logits: tl.tensor, cut_rows: tl.tensor, temperature: tl.tensor, top_p: tl.tensor, min_p: tl.tensor, draw: tl.tensor,
    maxima: tl.tensor, finite: tl.tensor, token_ids: tl.tensor, row_stride: tl.tensor, VOCAB: tl.constexpr,
    CHUNKS: tl.constexpr, CHUNKS_BLOCK: tl.constexpr, CHUNK: tl.constexpr, SHIFT: tl.constexpr,
) -> None:  # fmt: skip
    """As `_cut_kernel` without top_k: the tokens kept are those above a logit, and the first few that have this one."""
    place = tl.load(cut_rows + tl.program_id(0))
    if tl.load(finite + place):
        row = logits + place * row_stride
        index = tl.arange(0, CHUNKS_BLOCK)
        level = tl.max(tl.load(maxima + place * CHUNKS + index, index < CHUNKS, other=float("-inf")), 0)
        divisor = _divisor(tl.load(temperature + place))
        high = _order(level, SHIFT).to(tl.int64)
        low = _order(tl.maximum(level - _WEIGHTLESS * divisor, _LOWEST_LOGIT), SHIFT).to(tl.int64)
        first = tl.arange(0, _PROBES) == 0

        last, equals = low, tl.full((), VOCAB, tl.int32)  # kept: what is above `last`, and so many that equal it
        share = tl.load(top_p + place)
        if share < 1.0:
            total = tl.max(_mass_above(row, tl.where(first, low - 1, low), level, divisor, SHIFT, VOCAB, CHUNK), 0)
            limit = share * total
            last = _least_order(row, low, high, limit, level, divisor, False, SHIFT, VOCAB, CHUNK)
            above = tl.max(_mass_above(row, tl.where(first, last, high), level, divisor, SHIFT, VOCAB, CHUNK), 0)
            needed = tl.minimum((limit - above) / _weight(last, level, divisor, SHIFT), VOCAB)
            equals = tl.maximum(tl.ceil(needed), 1.0).to(tl.int32)
        heavy = _least_heavy(low, high, tl.load(min_p + place), level, divisor, SHIFT)
        equals = tl.where(heavy > last, VOCAB, equals)
        last = tl.maximum(last, heavy)

        sums = _mass_above(row, tl.where(first, last - 1, last), level, divisor, SHIFT, VOCAB, CHUNK)
        mass = tl.min(sums, 0) + equals * _weight(last, level, divisor, SHIFT)
        mass = tl.minimum(mass, tl.max(sums, 0))
        target = tl.minimum(tl.load(draw + place) * mass, mass * (1 - 2.0**-52))
        chosen = _least_order(row, last, high, target, level, divisor, True, SHIFT, VOCAB, CHUNK)
        above = tl.max(_mass_above(row, tl.where(first, chosen, high), level, divisor, SHIFT, VOCAB, CHUNK), 0)
        passed = tl.minimum((target - above) / _weight(chosen, level, divisor, SHIFT), VOCAB).to(tl.int32)
        passed = tl.minimum(passed, tl.where(chosen == last, equals, VOCAB) - 1)
        tl.store(token_ids + place, _equal_token(row, chosen, passed, SHIFT, VOCAB, CHUNK).to(tl.int64))
