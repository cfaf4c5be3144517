"""The specification of kernels.quantized_product."""

import torch
from torch import Tensor


def quantized_product(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, group: int, book: Tensor | None = None
) -> Tensor:
    """y = x Wᵀ with W[o][i] = (code − zero) · scale, (T, out) float32.

    Arguments as in kernels.quantized_product.quantized_product.
    """
    if codes.dtype == torch.uint8:
        codes = torch.cat((codes & 15, codes >> 4), 2)
    inputs = x.shape[1]
    places = codes.transpose(1, 2).flatten(0, 1)[:inputs]  # (in, out)
    weight = places.float() if book is None else book[places.int()]
    groups = torch.arange(inputs, device=x.device) // group
    if zeros is not None:
        weight = weight - zeros.float()[groups]
    return x.float() @ (weight * scales[groups])
