"""The specification of kernels.expert_rows."""

import torch
from torch import Tensor

from kernels.lora_tiles import EXPERT, FIRST_ROW, ROWS, Tiles


def expert_matmul(x: Tensor, weight: Tensor, bias: Tensor | None, tiles: Tiles) -> Tensor:
    """y[rows] = x[rows] W[expert]ᵀ + bias[expert] for every tile, in float32, rounded once to the dtype of x.

    Arguments as in kernels.expert_rows.expert_matmul.
    """
    y = torch.empty((len(x), weight.shape[1]), dtype=x.dtype, device=x.device)
    for tile in tiles.fields.tolist():
        rows = slice(tile[FIRST_ROW], tile[FIRST_ROW] + tile[ROWS])
        product = x[rows].float() @ weight[tile[EXPERT]].float().T
        y[rows] = (product if bias is None else product + bias[tile[EXPERT]].float()).to(y.dtype)
    return y
