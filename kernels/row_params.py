"""Sampling parameters of a batch, as tensors beside the logits: the input of kernels.sampling and of its reference."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.host_to_device import host_buffer, upload

LEAST_TEMPERATURE = 1e-6  # a lower temperature above 0 samples as this one does


class RowParams(NamedTuple):
    """How each of n rows is sampled; every tensor is on the device of the logits."""

    temperature: Tensor  # (n,) float64; 0 takes the likeliest token
    top_k: Tensor  # (n,) int64; 0 cuts nothing
    top_p: Tensor  # (n,) float64; 1 cuts nothing
    min_p: Tensor  # (n,) float64; 0 cuts nothing
    draw: Tensor  # (n,) float64, the uniform number of the row, in [0, 1)
    ranked_rows: Tensor  # int64, the rows with a temperature above 0 and a top_k
    cut_rows: Tensor  # int64, those without a top_k that have another cut
    candidates: int  # the largest top_k of the ranked rows, 0 without any

    @classmethod
    def build(
        cls,
        temperature: Sequence[float],
        top_k: Sequence[int],
        top_p: Sequence[float],
        min_p: Sequence[float],
        draw: Sequence[float],
        device: torch.device | str = "cpu",
    ) -> "RowParams":
        """Upload numbers from the host in one copy. The host does not wait for a CUDA device."""
        rows = enumerate(zip(temperature, top_k, top_p, min_p, strict=True))
        cut = [row for row, (t, k, p, least) in rows if t > 0 and (k > 0 or p < 1.0 or least > 0)]
        ranked = [row for row in cut if top_k[row]]
        cut = [row for row in cut if not top_k[row]]
        candidates = max((top_k[row] for row in ranked), default=0)
        count = len(temperature)
        # An even width aligns every row to 16 bytes: Triton compiles a kernel once more for other alignments.
        width = count + count % 2
        buffer = host_buffer(7 * width, torch.float64, device)
        host = buffer.numpy().reshape(7, width)
        host[:4, :count] = temperature, top_p, min_p, draw
        ids = host[4:].view(np.int64)
        ids[0, :count], ids[1, : len(ranked)], ids[2, : len(cut)] = top_k, ranked, cut
        numbers = upload(buffer, device).view(7, width)
        integers = numbers[4:].view(torch.int64)
        t, p, least, u = numbers[:4, :count]
        return cls(t, integers[0, :count], p, least, u, integers[1, : len(ranked)], integers[2, : len(cut)], candidates)
