"""Grouped LoRA products: y += (x Aᵀ) Bᵀ for runs of rows that carry the same adapter."""

from collections.abc import Sequence
from typing import NamedTuple

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
