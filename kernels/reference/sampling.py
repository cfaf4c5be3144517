"""Choosing a token from each row of logits, by the row's own temperature, cuts and uniform number."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.uploads import host_buffer, upload

# A temperature below this makes no more difference.
LEAST_TEMPERATURE = 1e-6


class RowParams(NamedTuple):
    """How each of n rows is sampled; every tensor is on the device of the logits.

    `temperature` (0: the likeliest), `top_p` (1: no cut), `min_p` (0: no cut) and `draw`, in [0, 1), are (n,)
    float64 and `top_k` (0: no cut) is (n,) int64. `cut_rows` int64 are the rows that are drawn with some cut, and
    `candidates` the largest top_k among them, None if one of them has none.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    draw: Tensor
    cut_rows: Tensor
    candidates: int | None

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
        """From numbers on the host, in one copy that a CUDA device is not waited for."""
        rows = enumerate(zip(temperature, top_k, top_p, min_p, strict=True))
        cut = [row for row, (t, k, p, least) in rows if t > 0 and (k > 0 or p < 1.0 or least > 0)]
        candidates = max((top_k[row] for row in cut), default=0) if all(top_k[row] for row in cut) else None
        count = len(temperature)
        # Rows of an even length: 16-byte alignment is part of what a kernel is compiled for.
        width = count + count % 2
        buffer = host_buffer(6 * width, torch.float64, device)
        host = buffer.view(6, width)
        host[:4, :count] = torch.tensor([temperature, top_p, min_p, draw], dtype=torch.float64)
        integers = host[4:].view(torch.int64)
        integers[0, :count] = torch.tensor(top_k, dtype=torch.int64)
        integers[1, : len(cut)] = torch.tensor(cut, dtype=torch.int64)
        numbers = upload(buffer, device).view(6, width)
        integers = numbers[4:].view(torch.int64)
        t, p, least, u = numbers[:4, :count]
        return cls(t, integers[0, :count], p, least, u, integers[1, : len(cut)], candidates)


def sample(logits: Tensor, params: RowParams) -> tuple[Tensor, Tensor]:
    """A token for each row of `logits` (n, vocab), and whether the row had one: int64 and bool, (n,) each.

    With w = exp((logits - max) / temperature): cut by top_k, then by top_p of what is left (a token stays while
    those before it have less than that share), then by min_p of the likeliest; then the token at which the running
    sum of w passes the share `draw` of what is left. The sum runs in the order of the vocabulary where nothing can be
    cut, else in falling order of the logits, the lower of two equal tokens first. With a temperature of 0 it is the
    likeliest token, the lowest of equal ones.

    A row that has NaN or infinity, or nothing but -infinity, has no token; its id is 0. A row's token depends on
    nothing but that row. The divided logits are float32, the rest is float64.
    """
    best = logits.max(-1).values
    finite = torch.isfinite(best)
    token_ids = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    cut = set(params.cut_rows.tolist())
    for row in finite.nonzero().flatten().tolist():
        temperature = float(params.temperature[row])
        if temperature <= 0:
            token_ids[row] = (logits[row] == best[row]).nonzero()[0, 0]
            continue
        scaled = (logits[row].float() - best[row].float()) / max(temperature, LEAST_TEMPERATURE)
        if row in cut:
            # Those that are equal after the division are still in the order of the logits.
            ids = logits[row].sort(descending=True, stable=True).indices
            weights = _cut(scaled[ids].double().exp(), params, row)
            token_ids[row] = ids[_invert(weights, params.draw[row])]
        else:
            token_ids[row] = _invert(scaled.double().exp(), params.draw[row])
    return token_ids, finite


def _cut(weights: Tensor, params: RowParams, row: int) -> Tensor:
    """The falling weights of one row without those that its parameters cut."""
    top_k = int(params.top_k[row])
    left = weights[:top_k] if top_k else weights
    keep = left.cumsum(-1) - left < params.top_p[row] * left.sum()
    keep &= left >= params.min_p[row] * left[0]
    keep[0] = True
    return torch.where(keep, left, 0.0)


def _invert(weights: Tensor, draw: Tensor) -> Tensor:
    """The index at which the running sum of `weights` passes the share `draw` of their total."""
    cumulative = weights.cumsum(-1)
    passed = (cumulative > cumulative[-1] * draw).nonzero()
    return passed[0, 0] if len(passed) else weights.nonzero()[-1, 0]  # the draw was rounded up to the total
