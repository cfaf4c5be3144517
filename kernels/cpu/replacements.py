"""The CPU path of what adapters change besides LoRA: weights of their own, rows of the vocabulary, gains and biases.

A run is consecutive rows under one adapter. With all of it, y = (W x + LoRA) · gain + bias, where W, or some rows of
it, may be the adapter's. Rows are selected, never multiplied by a mask, because 0 · inf is NaN.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Changes(NamedTuple):
    """What one adapter changes of one projection, embedding or norm; None for what it leaves as it is."""

    columns: slice  # of the site's output
    weight: Tensor | None = (
        None  # (out, in) instead of the base's; of the embedding (vocabulary, out), of a norm (out,)
    )
    tokens: Tensor | None = None  # (n,) int64, ascending: the rows of the embedding or the head that `rows` replaces
    rows: Tensor | None = None  # (n, hidden)
    gain: Tensor | None = None  # (out,)
    bias: Tensor | None = None  # (out,)


Span = tuple[int, int, Sequence[Changes]]  # first row, last row (exclusive) and what their adapter changes at the site


def replace_products(y: Tensor, x: Tensor, spans: Iterable[Span]) -> None:
    """y[rows, columns] = x[rows] Wᵀ with the adapters' own W, in place; y (T, out), x (T, in)."""
    for start, stop, changes in spans:
        for one in changes:
            out, rows = y[start:stop, one.columns], x[start:stop]
            if one.weight is not None:
                out.copy_(F.linear(rows.to(one.weight.dtype), one.weight))
            if one.tokens is not None and one.rows is not None:
                out[:, one.tokens] = F.linear(rows.to(one.rows.dtype), one.rows).to(y.dtype)


def replace_embeddings(x: Tensor, token_ids: Tensor, spans: Iterable[Span]) -> None:
    """x[rows] = W[token_ids[rows]] with the adapters' own W, in place; x is (T, hidden), token_ids is (T,)."""
    for start, stop, changes in spans:
        for one in changes:
            ids = token_ids[start:stop]
            if one.weight is not None:
                x[start:stop] = one.weight[ids].to(x.dtype)
            if one.tokens is not None and one.rows is not None:
                places = torch.searchsorted(one.tokens, ids).clamp_(max=len(one.tokens) - 1)
                (own,) = torch.nonzero(one.tokens[places] == ids, as_tuple=True)
                x[start + own] = one.rows[places[own]].to(x.dtype)


def scale_and_shift(y: Tensor, spans: Iterable[Span]) -> None:
    """y[rows, columns] = y · gain + bias, in place and rounded once."""
    for start, stop, changes in spans:
        for one in changes:
            if one.gain is None and one.bias is None:
                continue
            out = y[start:stop, one.columns]
            exact = out.float() if one.gain is None else out.float() * one.gain
            out.copy_(exact if one.bias is None else exact + one.bias)
