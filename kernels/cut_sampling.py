"""Sampling from rows that are cut by top_k, top_p or min_p: the candidates are sorted, then one program draws."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.inversion import divisor, first_past
from kernels.reference.sampling import RowParams

_LARGEST = tl.constexpr(2**31 - 1)


def sample_cut_rows(
    logits: Tensor, params: RowParams, finite: Tensor, token_ids: Tensor, chunk: int, num_warps: int
) -> None:
    """Writes the tokens of `params.cut_rows` that are finite to `token_ids`, as kernels.reference.sampling.sample.

    `logits` are (n, vocab) with rows without gaps, `finite` and `token_ids` (n,) bool and int64.
    """
    rows, vocab = len(params.cut_rows), logits.shape[1]
    keys = torch.empty((rows, vocab), dtype=torch.int64, device=logits.device)
    _key_kernel[(rows, triton.cdiv(vocab, chunk))](
        logits, params.cut_rows, keys, logits.stride(0), VOCAB=vocab, CHUNK=chunk, num_warps=num_warps,
        enable_fp_fusion=True,
    )  # fmt: skip
    if params.candidates is None or params.candidates >= vocab:
        keys = keys.sort(-1, descending=True).values
    else:
        keys = keys.topk(params.candidates, -1).values
    _cut_kernel[(rows,)](
        keys, params.cut_rows, params.temperature, params.top_k, params.top_p, params.min_p, params.draw, finite,
        token_ids, keys.shape[1], CHUNK=chunk, num_warps=num_warps, enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit
def _flip(bits: tl.tensor) -> tl.tensor:
    """Maps a float32's bits to an int32 of the same order, and back."""
    return bits ^ ((bits >> 31) & _LARGEST)


@triton.jit
def _logit(key: tl.tensor) -> tl.tensor:
    return _flip((key >> 32).to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _key_kernel(
    logits: tl.tensor, cut_rows: tl.tensor, keys: tl.tensor, row_stride: tl.tensor, VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    """keys[i, token] = the logit of row cut_rows[i] in the high half, 2³¹ - 1 - token in the low one.

    No two are equal, so that falling order is one order, whatever sorts them: of equal logits the lower token first.
    """
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(cut_rows + place)
    token = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    values = tl.load(logits + row * row_stride + token, token < VOCAB, other=0.0).to(tl.float32)
    values = tl.where(values == 0, 0.0, values)  # -0.0 is equal to 0.0, its bits are not
    high = _flip(values.to(tl.int32, bitcast=True)).to(tl.int64) << 32
    tl.store(keys + place * VOCAB + token, high | (token ^ _LARGEST).to(tl.int64), token < VOCAB)


@triton.jit
def _weigh(keys: tl.tensor, index: tl.tensor, count: tl.tensor, level: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """w = exp((logit - level) / temperature) of the candidates at `index`, float64, 0 from `count` on."""
    values = tl.where(index < count, _logit(tl.load(keys + index, index < count, other=0)), float("-inf"))
    return tl.exp((values - level) / divisor(temperature)).to(tl.float64)


@triton.jit(do_not_specialize=["candidates"])  # it changes with the batch
def _cut_kernel(
    keys: tl.tensor, cut_rows: tl.tensor, temperature: tl.tensor, top_k: tl.tensor, top_p: tl.tensor, min_p: tl.tensor,
    draw: tl.tensor, finite: tl.tensor, token_ids: tl.tensor, candidates: tl.tensor, CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    """token_ids[row] = where the running sum of what is kept passes draw · Σ of it, in falling order of the keys.

    Kept are, of the first top_k, those before which there is less than top_p · Σ, and which weigh min_p of the first.
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

        # What is kept is the beginning of the candidates, for sums rise and weights fall.
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
        chosen = kept - 1  # where the target was rounded up to the total
        for start in range(0, kept, CHUNK):
            weights = _weigh(keys, start + inner, kept, level, heat)
            sums = sum_before + tl.cumsum(weights, 0)
            chosen = tl.minimum(chosen, first_past(sums, weights, target, start + inner, _LARGEST))
            sum_before += tl.sum(weights, 0)
        tl.store(token_ids + row, (tl.load(keys + chosen) & _LARGEST) ^ _LARGEST)
