"""The fastest measured launch configurations of each kernel on each GPU; `python -m kernels.tune` measures them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from kernels import grouped_lora, kv_write, paged_attention, quantized_product, rms_norm, sampling, silu_mul

NOT_MEASURED = "not measured"


class Tuned(NamedTuple):
    """A launch configuration and the measurement behind it."""

    rows: int  # the largest batch that it was chosen for
    config: Any  # a configuration of the kernel, such as RmsNormConfig
    measurement: str  # times and shape, or NOT_MEASURED


Tables = Mapping[str, Mapping[str, tuple[Tuned, ...]]]  # by CUDA's name of the GPU, then by kernel, in ascending rows

TABLES: Tables = {}  # no GPU has been measured yet

DEFAULTS: dict[str, Any] = {
    "rms_norm": rms_norm.DEFAULT,
    "rms_norm of heads": rms_norm.DEFAULT,
    "add_rms_norm": rms_norm.DEFAULT,
    "silu_mul": silu_mul.DEFAULT,
    "sample": sampling.DEFAULT,
    "sample with cuts": sampling.DEFAULT,
    "qkv_write": kv_write.DEFAULT,
    "paged_decode": paged_attention.DECODE,
    "paged_prefill": paged_attention.PREFILL,
    "decode shrink": grouped_lora.DECODE_SHRINK,
    "decode expand": grouped_lora.DECODE_EXPAND,
    "prefill shrink": grouped_lora.PREFILL_SHRINK,
    "prefill expand": grouped_lora.PREFILL_EXPAND,
    "decode product": quantized_product.DECODE_PRODUCT,
    "prefill product": quantized_product.PREFILL_PRODUCT,
}
FLOAT32 = {
    "paged_decode": paged_attention.FLOAT32_DECODE,
    "paged_prefill": paged_attention.FLOAT32_PREFILL,
    "decode product": quantized_product.FLOAT32_DECODE,
    "prefill product": quantized_product.FLOAT32_PREFILL,
}


def thresholds(gpu: str, tables: Tables = TABLES) -> list[int]:
    """The batches that any kernel's configurations were measured for on a GPU: between two of them none changes."""
    return sorted({tuned.rows for entries in tables.get(gpu, {}).values() for tuned in entries})


def lookup(gpu: str, kernel: str, rows: int, dtype: torch.dtype = torch.bfloat16, tables: Tables = TABLES) -> Tuned:
    """The configuration of a kernel for batches of `rows` rows: of the smallest measured batch that is not smaller.

    For larger batches than any measured one, the largest measured. Without measurements on the GPU, the kernel's
    default, with NOT_MEASURED as its measurement; likewise for float32 if the kernel has a default of its own for
    it. Raises KeyError for an unknown kernel.
    """
    default = Tuned(rows, DEFAULTS[kernel], NOT_MEASURED)
    if dtype == torch.float32 and kernel in FLOAT32:
        return default._replace(config=FLOAT32[kernel])
    measured = tables.get(gpu, {}).get(kernel, ())
    return next((tuned for tuned in measured if rows <= tuned.rows), measured[-1] if measured else default)
