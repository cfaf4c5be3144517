"""The tuner's cases of the kernels that work row by row: norms, the gated SiLU and sampling."""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import rms_norm, sampling, silu_mul
from kernels.reference import rms_norm as reference_norm
from kernels.reference import sampling as reference_sampling
from kernels.reference import silu_mul as reference_silu
from kernels.row_params import RowParams
from kernels.tune.choosing import Case

# Relative: the rounding of the kernel's result and of the reference's, and the roundings of float32 before them.
ROUNDINGS = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 2**-18}
PEAKS = 64


class ModelShape(NamedTuple):
    """The sizes of a model and its dtype; Qwen3-8B's by default."""

    hidden: int = 4096
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    intermediate: int = 12288
    vocab: int = 151936
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"

    def random(self, seed: int, *shape: int) -> Tensor:
        """Normally distributed numbers in the model's dtype, on its device."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device).to(self.dtype)


def row_cases(model: ModelShape, rows: int) -> list[Case]:
    """The norms and the gated SiLU for a batch of `rows` rows."""
    hidden, head_dim, heads = model.hidden, model.head_dim, model.q_heads + model.kv_heads
    floor = torch.tensor(0.1, device=model.device)
    rounding = ROUNDINGS[model.dtype]
    case = partial(Case, rows=rows, rtol=rounding, atol=rounding / 16)
    norm = partial(case, candidates=rms_norm.CANDIDATES, launch=rms_norm.rms_norm, twin=reference_norm.rms_norm)

    def weight(seed: int, size: int) -> Tensor:
        return model.random(seed + 1000, size).float() * math.sqrt(size)

    return [
        norm(
            kernel="rms_norm",
            shape=f"n={hidden}",
            prepare=lambda seed: (model.random(seed, rows, hidden), weight(seed, hidden), floor),
            written=(),
        ),
        norm(
            kernel="rms_norm of heads",
            shape=f"{heads} heads, n={head_dim}",
            prepare=lambda seed: (model.random(seed, rows, heads, head_dim), weight(seed, head_dim), floor),
            written=(),
        ),
        case(
            kernel="add_rms_norm",
            shape=f"n={hidden}",
            candidates=rms_norm.CANDIDATES,
            prepare=lambda seed: (*model.random(seed, 2, rows, hidden), 1.0, weight(seed, hidden), floor),
            launch=rms_norm.add_rms_norm,
            twin=reference_norm.add_rms_norm,
            written=(0,),
        ),
        case(
            kernel="silu_mul",
            shape=f"n={model.intermediate}",
            candidates=silu_mul.CANDIDATES,
            prepare=lambda seed: (model.random(seed, rows, 2 * model.intermediate),),
            launch=silu_mul.silu_mul,
            twin=reference_silu.silu_mul,
            written=(),
        ),
    ]


def sampling_cases(model: ModelShape, rows: int) -> list[Case]:
    """A batch without cuts, and one with top_k and top_p."""

    def prepare(top_k: int, top_p: float, seed: int) -> tuple[Tensor, RowParams]:
        return _peaks(model, rows, seed), _params(model, rows, seed, top_k, top_p)

    return [
        Case(
            kernel=kernel,
            rows=rows,
            shape=f"vocab {model.vocab}, top_k {top_k}, top_p {top_p}",
            candidates=sampling.CANDIDATES,
            prepare=partial(prepare, top_k, top_p),
            launch=sampling.sample,
            twin=reference_sampling.sample,
            written=(),
            rtol=0.0,
            atol=0.0,
            eager=True,
        )
        for kernel, top_k, top_p in (("sample", 0, 1.0), ("sample with cuts", 20, 0.77))
    ]


def _peaks(model: ModelShape, rows: int, seed: int) -> Tensor:
    """Float32 logits of which PEAKS are equal and so high that the other tokens weigh nothing."""
    logits = model.random(seed, rows, model.vocab).float()
    tokens = logits.argsort(-1)[:, :PEAKS]
    return logits.scatter_(1, tokens, 40.0)


def _params(model: ModelShape, rows: int, seed: int, top_k: int, top_p: float) -> RowParams:
    """Draws in the middle of a peak, so that rounding moves none to another token."""
    peaks = torch.randint(PEAKS, (rows,), generator=torch.Generator().manual_seed(seed))
    draws = ((peaks + 0.5) / PEAKS).tolist()
    return RowParams.build([0.7] * rows, [top_k] * rows, [top_p] * rows, [0.0] * rows, draws, model.device)
