"""Grouped LoRA products: y += (x Aᵀ) Bᵀ for runs of rows that carry the same adapter."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class PartWeights(NamedTuple):
    """One adapted projection of a stacked site.

    `b` is (rank, out), scaled, stored transposed so that the expand reads it row by row; `bias` is (out,),
    scaled, or None. `columns` are the projection's columns in the site's output, `ranks` its rows in `a`.
    """

    b: Tensor
    columns: slice
    ranks: slice
    bias: Tensor | None


class SiteWeights(NamedTuple):
    """One adapter's weights at one site: `a` is (sum of the parts' ranks, in)."""

    a: Tensor
    parts: tuple[PartWeights, ...]


class Run(NamedTuple):
    """Consecutive rows of a batch that carry one adapter; `sites[i]` is None where it does not adapt site i."""

    start: int
    stop: int
    sites: Sequence[SiteWeights | None]


def grouped_lora(y: Tensor, x: Tensor, site: int, runs: Sequence[Run]) -> None:
    """y[rows, columns] += (x[rows] Aᵀ) B + bias, in place, for every run and every part adapted at the site.

    y is (T, out) and x is (T, in), both in the model's dtype; the products are in the weights' dtype. Rows of no
    run and columns of no adapted part keep their bits: rows are selected, never multiplied by a mask.
    """
    for start, stop, sites in runs:
        weights = sites[site]
        if weights is None:
            continue
        a, parts = weights
        t = torch.mm(x[start:stop].to(a.dtype), a.t())
        _expand(y[start:stop], t, parts)


def embedding_lora(x: Tensor, token_ids: Tensor, site: int, runs: Sequence[Run]) -> None:
    """x[rows] += A[:, token_ids[rows]]ᵀ B, in place: the grouped product whose input is one-hot.

    x is (T, out) in the model's dtype, token_ids is (T,); A is fast when its columns are contiguous.
    """
    for start, stop, sites in runs:
        weights = sites[site]
        if weights is not None:
            _expand(x[start:stop], weights.a.t()[token_ids[start:stop]], weights.parts)


def _expand(y: Tensor, t: Tensor, parts: Sequence[PartWeights]) -> None:
    """y[:, columns] += t[:, ranks] B + bias for each part."""
    for b, columns, ranks, bias in parts:
        delta = torch.mm(t[:, ranks], b) if bias is None else torch.addmm(bias, t[:, ranks], b)
        y[:, columns].add_(delta)
