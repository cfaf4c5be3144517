"""The tuner's cases of products with quantised weights."""

from functools import partial

import torch
from torch import Tensor

from kernels import quantized_product
from kernels.quantized_product import BLOCK, HALF
from kernels.reference import quantized_product as reference
from kernels.tune.choosing import Case
from kernels.tune.rows import ModelShape

GROUP = 128
ROUNDING = {torch.bfloat16: 2**-14, torch.float16: 2**-14, torch.float32: 2**-18}  # of sums, in float32 or TF32's place


def product_cases(model: ModelShape, rows: int, kind: str) -> list[Case]:
    """A projection to the MLP's inner width, in integers of 8 and of 4 bits; `kind` is decode or prefill."""
    case = partial(
        Case,
        kernel=f"{kind} product",
        rows=rows,
        candidates=quantized_product.DECODE if kind == "decode" else quantized_product.PREFILL,
        launch=quantized_product.quantized_product,
        twin=reference.quantized_product,
        written=(),
        cold=True,
        rtol=ROUNDING[model.dtype],
        atol=ROUNDING[model.dtype],
    )
    shape = f"in={model.hidden}, out={model.intermediate}"
    return [case(shape=f"{shape}, {bits} bits", prepare=partial(_prepare, model, rows, bits)) for bits in (8, 4)]


def _prepare(model: ModelShape, rows: int, bits: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None, int]:
    generator = torch.Generator(model.device).manual_seed(seed)
    blocks, groups = -(-model.hidden // BLOCK), -(-model.hidden // GROUP)

    def integers(low: int, high: int, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, device=model.device, dtype=dtype)

    four = bits == 4
    codes = (
        integers(0, 256, blocks, model.intermediate, HALF, dtype=torch.uint8)
        if four
        else integers(-128, 128, blocks, model.intermediate, BLOCK, dtype=torch.int8)
    )
    zeros = integers(0, 16, groups, model.intermediate, dtype=torch.int8) if four else None
    scales = model.random(seed + 1, groups, model.intermediate).float().abs() / 2**bits
    return model.random(seed, rows, model.hidden), codes, scales, zeros, GROUP
