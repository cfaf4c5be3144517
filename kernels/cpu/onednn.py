"""Matrix products by oneDNN on a CPU; torch's own choice would be MKL or a slower kernel.

oneDNN compiles a product anew for each number of rows, and two caches keep what it has compiled: oneDNN's own and
torch's, each up to 1,024 products of 0.3 MB. Steps of mixed lengths meet every number of rows in time, so that an
engine grew by 500 MB. KEPT is enough for the products of a dozen numbers of rows; to compile one takes less time than
to compute it in the layers of one step.
"""

import os
from functools import cache

import torch
from torch import Tensor

KEPT = 64  # compiled products in each cache
CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # read from the environment at the first product


@cache
def computes(dtype: torch.dtype) -> bool:
    """Whether this build and this CPU have fast kernels for the dtype. Called before the first product."""
    for name in CACHES:
        os.environ.setdefault(name, str(KEPT))
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def packed(weight: Tensor) -> Tensor:
    """`weight` (out, in) in the layout that `linear` reads fastest; only `linear` accepts it."""
    reordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return reordered


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b for x (rows, in), in x's dtype, summed in float32.

    `weight` is (out, in): packed, contiguous or the transpose of a contiguous tensor. With other strides, oneDNN is a
    thousand times slower. In float32 it takes 45 % of the time of MKL (150 x 64 x 4146 on a Zen 5).
    """
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y
