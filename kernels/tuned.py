"""The launch configurations that were measured to be best, for each GPU; `python -m kernels.tune` prints them."""

from typing import Any, NamedTuple

import torch

from kernels import kv_write, lora_configs, paged_attention, rms_norm, sampling, silu_mul

NOT_MEASURED = "not measured"


class Tuned(NamedTuple):
    """A configuration for batches of up to `rows` rows, and the measurement that it was chosen by."""

    rows: int
    config: Any
    measurement: str


# By the name that CUDA gives the GPU, then by kernel, in rising order of rows. No GPU has been measured yet.
TABLES: dict[str, dict[str, tuple[Tuned, ...]]] = {}

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
    "decode shrink": lora_configs.DECODE_SHRINK,
    "decode expand": lora_configs.DECODE_EXPAND,
    "prefill shrink": lora_configs.PREFILL_SHRINK,
    "prefill expand": lora_configs.PREFILL_EXPAND,
}
FLOAT32 = {"paged_decode": paged_attention.FLOAT32_DECODE, "paged_prefill": paged_attention.FLOAT32_PREFILL}


def lookup(
    gpu: str,
    kernel: str,
    rows: int,
    dtype: torch.dtype = torch.bfloat16,
    tables: dict[str, dict[str, tuple[Tuned, ...]]] = TABLES,
) -> Tuned:
    """The configuration of a kernel for batches of `rows` rows, the largest one measured where that is less.

    Where nothing was measured on the GPU it is the kernel's default, with NOT_MEASURED for its measurement; so it is
    for float32 where the kernel has another default for it. A kernel that there is none of is a KeyError.
    """
    default = Tuned(rows, DEFAULTS[kernel], NOT_MEASURED)
    if dtype == torch.float32 and kernel in FLOAT32:
        return default._replace(config=FLOAT32[kernel])
    measured = tables.get(gpu, {}).get(kernel, ())
    return next((tuned for tuned in measured if rows <= tuned.rows), measured[-1] if measured else default)
