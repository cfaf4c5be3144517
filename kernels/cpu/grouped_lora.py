"""The CPU path of LoRA: y += (x Aᵀ) B + bias for each run, which is consecutive rows under one adapter."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.cpu.replacements import Changes

# If a batch has several runs, numpy computes those of up to this many rows: torch wakes all its threads for each
# product, and numpy takes half the time up to here, for ranks 16 to 192 and 576 to 12,288 features. torch computes the
# only run of a batch: an r16 adapter then adds 29 % to a step of a 135M model, not 36 % (both measured in turn in one
# run; 2 threads, bfloat16).
FEW_ROWS = 16


class PartWeights(NamedTuple):
    """One adapted projection of a stacked site."""

    b: Tensor  # (rank, out), scaled; stored transposed, so that the expand reads it row by row
    columns: slice  # of the site's output
    ranks: slice  # columns of the site's `a`
    bias: Tensor | None  # (out,), scaled


class HostSite(NamedTuple):
    """A site's weights as numpy arrays that share the tensors' memory."""

    a: np.ndarray  # (in, sum of ranks)
    b: tuple[np.ndarray, ...]  # by part
    bias: tuple[np.ndarray | None, ...]  # by part
    columns: slice | None  # the columns of all parts together, None if there is a gap between them


class SiteWeights(NamedTuple):
    """One adapter's weights at one site; without parts `a` is empty, and there are only changes."""

    a: Tensor  # Aᵀ, (in, sum of the parts' ranks), stored rank by rank
    parts: tuple[PartWeights, ...]
    host: HostSite | None = None  # set by `on_host`
    changes: tuple[Changes, ...] = ()  # besides LoRA

    def on_host(self) -> "SiteWeights":
        """The same weights with `host` set; they must be float32 on the CPU."""
        b = tuple(part.b.numpy() for part in self.parts)
        bias = tuple(None if part.bias is None else part.bias.numpy() for part in self.parts)
        gapless = all(left.columns.stop == right.columns.start for left, right in pairwise(self.parts))
        columns = slice(self.parts[0].columns.start, self.parts[-1].columns.stop) if gapless else None
        return self._replace(host=HostSite(self.a.numpy(), b, bias, columns))


class Run(NamedTuple):
    """Consecutive rows of a batch under one adapter."""

    start: int
    stop: int
    sites: Sequence[SiteWeights | None]  # the adapter's weights by site, None for a site that it does not adapt


def grouped_lora(y: Tensor, x: Tensor, site: int, runs: Sequence[Run]) -> None:
    """y[rows, columns] += (x[rows] Aᵀ) B + bias, in place, for every run and every part adapted at the site.

    y is (T, out) and x is (T, in), both in the model's dtype; the products are in the weights' dtype. Rows of no
    run, and columns of no adapted part, keep their bits: rows are selected, never multiplied by a mask, because
    0 · inf is NaN.
    """
    few: list[_HostRun] = []
    for start, stop, sites in runs:
        weights = sites[site]
        if weights is None or not weights.parts:
            continue
        if weights.host is not None and len(runs) > 1 and stop - start <= FEW_ROWS:
            few.append(_HostRun(start, stop, weights.parts, weights.host))
            continue
        rows, out = (x, y) if stop - start == len(y) else (x[start:stop], y[start:stop])
        _expand(out, torch.mm(rows.to(weights.a.dtype), weights.a), weights.parts)
    if few:
        with np.errstate(all="ignore"):  # as torch does; the caller checks the logits for NaN and infinity
            _few_rows(y, x, few)


def embedding_lora(x: Tensor, token_ids: Tensor, site: int, runs: Sequence[Run]) -> None:
    """x[rows] += A[:, token_ids[rows]]ᵀ B, in place: the grouped product of one-hot rows.

    x is (T, out) in the model's dtype, token_ids is (T,). Fast if `a` is stored token by token.
    """
    for start, stop, sites in runs:
        weights = sites[site]
        if weights is not None and weights.parts:
            _expand(x[start:stop], weights.a[token_ids[start:stop]], weights.parts)


class _HostRun(NamedTuple):
    start: int
    stop: int
    parts: tuple[PartWeights, ...]
    host: HostSite


def _expand(y: Tensor, t: Tensor, parts: Sequence[PartWeights]) -> None:
    """y[:, columns] += t[:, ranks] B + bias for each part. No slice is made of a whole tensor: each costs time."""
    for b, columns, ranks, bias in parts:
        part = t if len(parts) == 1 else t[:, ranks]
        delta = torch.mm(part, b) if bias is None else torch.addmm(bias, part, b)
        (y if b.shape[1] == y.shape[1] else y[:, columns]).add_(delta)


def _few_rows(y: Tensor, x: Tensor, few: Sequence[_HostRun]) -> None:
    """`grouped_lora` for runs of few rows: one cast of x and, if there are no gaps between runs, one addition to y."""
    first, last = few[0].start, few[-1].stop
    inputs = x[first:last].float().numpy()
    delta = np.empty((last - first, y.shape[1]), np.float32)
    rows, columns = 0, few[0].host.columns
    for start, stop, parts, host in few:
        rows += stop - start
        columns = columns if host.columns == columns else None
        t = inputs[start - first : stop - first] @ host.a
        for part, b, bias in zip(parts, host.b, host.bias, strict=True):
            product = np.matmul(t[:, part.ranks], b, out=delta[start - first : stop - first, part.columns])
            if bias is not None:
                product += bias
    whole = torch.from_numpy(delta)
    if columns is not None and rows == last - first:
        y[first:last, columns].add_(whole[:, columns])
        return
    for start, stop, parts, host in few:
        for filled in [part.columns for part in parts] if host.columns is None else [host.columns]:
            y[start:stop, filled].add_(whole[start - first : stop - first, filled])
