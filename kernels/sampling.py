"""Sampling on the device: nothing is waited for, and the logits are read once."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cut_sampling import sample_cut_rows
from kernels.inversion import divisor, invert
from kernels.reference.sampling import RowParams


class SamplingConfig(NamedTuple):
    """How sampling is launched: the vocabulary, or the candidates, are taken `chunk` tokens at a time."""

    chunk: int
    num_warps: int


CANDIDATES = [
    SamplingConfig(chunk, num_warps)
    for chunk, num_warps in [(2048, 4), (1024, 4), (1024, 2), (2048, 8), (4096, 4), (4096, 8), (8192, 8), (8192, 16)]
]
DEFAULT = CANDIDATES[0]


def sample(logits: Tensor, params: RowParams, config: SamplingConfig = DEFAULT) -> tuple[Tensor, Tensor]:
    """A token for each row of `logits` (n, vocab), and whether the row had one: int64 and bool, (n,) each.

    See kernels.reference.sampling.sample. Weights are float32 here and running sums float64, so a draw may land on
    a neighbour where it lies within the weights' rounding of the border between them. Rows are without gaps. A
    row with top_k costs a search for its candidates, one with top_p or min_p alone a sort of the vocabulary, and of
    all `cut_rows` in its batch.
    """
    (rows, vocab), device = logits.shape, logits.device
    assert (logits.stride(1), len(params.draw)) == (1, rows)
    token_ids = torch.empty(rows, dtype=torch.int64, device=device)
    finite = torch.empty(rows, dtype=torch.bool, device=device)
    if not rows:
        return token_ids, finite
    chunks = triton.cdiv(vocab, config.chunk)
    maxima = torch.empty((rows, chunks), dtype=torch.float32, device=device)
    masses = torch.empty((rows, chunks), dtype=torch.float64, device=device)
    _chunk_kernel[(rows, chunks)](
        logits, params.temperature, maxima, masses, logits.stride(0), VOCAB=vocab, CHUNKS=chunks, CHUNK=config.chunk,
        num_warps=config.num_warps, enable_fp_fusion=True,
    )  # fmt: skip
    _choose_kernel[(rows,)](
        logits, params.temperature, params.draw, maxima, masses, token_ids, finite, logits.stride(0), VOCAB=vocab,
        CHUNKS=chunks, CHUNKS_BLOCK=triton.next_power_of_2(chunks), CHUNK=config.chunk, num_warps=config.num_warps,
        enable_fp_fusion=True,
    )  # fmt: skip
    if len(params.cut_rows):
        sample_cut_rows(logits, params, finite, token_ids, config.chunk, config.num_warps)
    return token_ids, finite


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
    level = tl.where(tl.abs(largest) == float("inf"), 0.0, largest)  # infinity less itself would be NaN
    weights = tl.exp((values - level) / divisor(tl.load(temperature + row)))
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
        scale = tl.exp((tops - top) / divisor(heat)).to(tl.float64)
        sums = tl.load(masses + row * CHUNKS + index, index < CHUNKS, other=0.0) * scale
        target = tl.load(draw + row) * tl.sum(sums, 0)
        likeliest = tl.min(tl.where(tops == top, index, CHUNKS), 0)
        chunk = tl.where(heat > 0, invert(sums, target, index, CHUNKS), likeliest)

        # The chunk's weights again as _chunk_kernel had them, by its own maximum, so that they sum up to its mass.
        level = tl.max(tl.where(index == chunk, tops, float("-inf")), 0)
        target -= tl.sum(tl.where(index < chunk, sums, 0.0), 0)
        target /= tl.sum(tl.where(index == chunk, scale, 0.0), 0)
        inner = tl.arange(0, CHUNK)
        token = chunk * CHUNK + inner
        values = tl.load(logits + row * row_stride + token, token < VOCAB, other=float("-inf")).to(tl.float32)
        weights = tl.exp((values - level) / divisor(heat)).to(tl.float64)
        first = tl.min(tl.where(values == level, inner, CHUNK), 0)
        chosen = tl.where(heat > 0, invert(weights, target, inner, CHUNK), first)
        tl.store(token_ids + row, (chunk * CHUNK + chosen).to(tl.int64))
    else:
        tl.store(token_ids + row, tl.full((), 0, tl.int64))
