"""The specification of kernels.sampling: the token of each row by its temperature, cuts and uniform number."""

import torch
from torch import Tensor

from kernels.cpu.sampling import invert
from kernels.row_params import LEAST_TEMPERATURE, RowParams


def sample(logits: Tensor, params: RowParams) -> tuple[Tensor, Tensor]:
    """A token for each row of `logits` (n, vocab), and whether the row had one: int64 and bool, (n,) each.

    The weights are w = exp((logit - max) / temperature). Cuts apply in this order: top_k keeps the heaviest tokens;
    top_p keeps a token while the tokens before it hold less than that share of the rest; min_p keeps tokens of at
    least that share of the heaviest weight. The sampled token is the first one at which the running sum of w exceeds
    the share `draw` of the sum over the kept tokens. Sums run in the order of the vocabulary in a row without cuts,
    otherwise in descending order of the logits, of equal logits the lower token first. A temperature of 0 gives the
    likeliest token, of equal ones the lowest.

    A row that has NaN or infinity, or only -infinity, has no token; its id is 0. A row's token depends on that row
    alone. The scaled logits are float32, everything after them float64.
    """
    best = logits.max(-1).values
    finite = torch.isfinite(best)
    token_ids = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    cut = {*params.ranked_rows.tolist(), *params.cut_rows.tolist()}
    for row in finite.nonzero().flatten().tolist():
        temperature, draw = float(params.temperature[row]), float(params.draw[row])
        if temperature <= 0:
            token_ids[row] = (logits[row] == best[row]).nonzero()[0, 0]
            continue
        scaled = ((logits[row].float() - best[row].float()) / max(temperature, LEAST_TEMPERATURE)).cpu()
        if row in cut:
            # Sorted by the logits: tokens that are equal only after the division keep the order of their logits.
            ids = logits[row].sort(descending=True, stable=True).indices.cpu()
            weights = _cut(scaled[ids].double().exp(), params, row)
            token_ids[row] = ids[invert(weights, draw)]
        else:
            token_ids[row] = invert(scaled.double().exp(), draw)
    return token_ids, finite


def _cut(weights: Tensor, params: RowParams, row: int) -> Tensor:
    """The descending weights of one row, with 0 for the tokens that its parameters cut."""
    top_k = int(params.top_k[row])
    kept = weights[:top_k] if top_k else weights
    keep = kept.cumsum(-1) - kept < float(params.top_p[row]) * kept.sum()
    keep &= kept >= float(params.min_p[row]) * kept[0]
    keep[0] = True
    return torch.where(keep, kept, 0.0)
