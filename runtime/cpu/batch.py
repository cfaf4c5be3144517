"""The inputs of one step on a CPU: the tokens of all its requests side by side."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.cpu.grouped_lora import Run, SiteWeights, embedding_lora, grouped_lora
from kernels.cpu.paged_attention import AttentionGroup
from kernels.cpu.replacements import Span, replace_embeddings, replace_products, scale_and_shift
from runtime.cpu.adapted_rows import LogitRows, adapted_rows, base_and_adapted, logit_rows
from runtime.models.config import ModelConfig
from runtime.models.layers import RmsNorm
from runtime.request import Request
from runtime.scheduler import Chunk

AdapterSites = Sequence[SiteWeights | None]

# Decode rows share one attention call while padding them to the longest context reads at most this many times the
# tokens that they have.
MAX_PADDING = 2.0


class LoraRows:
    """The rows of a batch under each adapter; the decoder calls it with the input and output of every projection."""

    def __init__(self, model: ModelConfig, runs: list[Run], logit_runs: list[Run]):
        self.model = model
        self.runs = runs
        self.logit_runs = logit_runs

    def apply(self, site: int, x: Tensor, y: Tensor) -> None:
        """Add LoRA(x) to y in place, and make the adapters' other changes, on the rows that carry an adapter."""
        self._apply(site, x, y, self.runs)

    def of_rows(self, rows: Tensor) -> "LoraRows | None":
        """The adapters of some rows, (n,) in ascending order, which lie side by side from now on; None for none."""
        bounds = torch.searchsorted(rows, torch.tensor([[run.start, run.stop] for run in self.runs])).tolist()
        pairs = zip(self.runs, bounds, strict=True)
        runs = [Run(first, last, run.sites) for run, (first, last) in pairs if first < last]
        return LoraRows(self.model, runs, []) if runs else None

    def apply_logits(self, x: Tensor, y: Tensor) -> None:
        """As `apply`, for the rows whose logits are computed."""
        self._apply(self.model.lm_head_site, x, y, self.logit_runs)

    def embed(self, token_ids: Tensor, x: Tensor) -> None:
        site = self.model.embed_site
        spans = _spans(site, self.runs)
        replace_embeddings(x, token_ids, spans)
        embedding_lora(x, token_ids, site, self.runs)
        scale_and_shift(x, spans)

    def norm(self, site: int, norm: RmsNorm, x: Tensor, y: Tensor) -> None:
        """Where an adapter has a norm's weight, y is x normed by it; the last norm is of the rows of logits."""
        for start, stop, changes in _spans(site, self.logit_runs if site == self.model.last_norm_site else self.runs):
            for one in changes:
                if one.weight is not None:
                    y[start:stop] = norm.with_weight(x[start:stop], one.weight)

    def _apply(self, site: int, x: Tensor, y: Tensor, runs: list[Run]) -> None:
        spans = _spans(site, runs)
        replace_products(y, x, spans)
        grouped_lora(y, x, site, runs)
        scale_and_shift(y, spans)


def _spans(site: int, runs: Sequence[Run]) -> list[Span]:
    """The runs whose adapter changes more at a site than LoRA does."""
    return [(run.start, run.stop, own.changes) for run in runs if (own := run.sites[site]) is not None and own.changes]


class Batch(NamedTuple):
    """The input of one forward pass over T tokens."""

    chunks: list[Chunk]  # in row order: decoding ones first, those of one adapter side by side
    token_ids: Tensor  # (T,)
    positions: Tensor  # (T,)
    slots: Tensor  # (T,), the slot mapping: where the K/V of each token are written
    groups: dict[int, list[AttentionGroup]]  # by the window of a layer's attention; 0: the whole context
    logit_rows: Tensor  # (n,), the rows whose logits are computed
    lora: LoraRows | None
    sampling: list[Request]  # one for each of the first of logit_rows; the others score prompts


def build_batch(
    chunks: Sequence[Chunk],
    model: ModelConfig,
    block_size: int,
    lookup: Callable[[str], AdapterSites],
    dtype: torch.dtype,
    device: torch.device,
) -> Batch:
    """Lay out the chunks of one step. `lookup` returns the resident weights of an adapter, by digest."""
    ordered = sorted(chunks, key=lambda chunk: (chunk.length > 1, chunk.request.adapter or "", len(chunk.request)))
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    for request, start, length, _ in ordered:
        places, blocks = range(start, start + length), request.blocks
        token_ids += request.token_ids[start : start + length]
        positions += places
        slots += [blocks[place // block_size] * block_size + place % block_size for place in places]
    rows = logit_rows(ordered)
    decodes = [chunk for chunk in ordered if chunk.length == 1]
    prefills = ordered[len(decodes) :]
    windows = set(model.windows or [0])
    groups = {window: _attention(decodes, prefills, block_size, dtype, window) for window in windows}
    return Batch(
        chunks=ordered,
        token_ids=torch.tensor(token_ids, device=device),
        positions=torch.tensor(positions, device=device),
        slots=torch.tensor(slots, device=device),
        groups=groups,
        logit_rows=torch.tensor(rows.all, dtype=torch.int64, device=device),
        lora=_lora_rows(ordered, rows, model, lookup),
        sampling=[chunk.request for chunk in ordered if chunk.samples],
    )


def _attention(
    decodes: list[Chunk], prefills: list[Chunk], block_size: int, dtype: torch.dtype, window: int
) -> list[AttentionGroup]:
    """The attention of each chunk over the last `window` tokens of its context, 0 for all of them."""
    groups: list[AttentionGroup] = []
    for first, last in pairwise(_group_bounds([_seen(chunk.start + 1, window) for chunk in decodes])):
        rows = decodes[first:last]
        lengths = torch.tensor([_seen(chunk.start + 1, window) for chunk in rows])
        slots = _slots(rows, block_size, window)
        visible = torch.arange(slots.shape[1]) < lengths[:, None]
        slots = torch.where(visible, slots, 0)
        mask = None if bool(visible.all()) else _additive(visible, dtype)[:, None, None, :]
        groups.append(AttentionGroup(slice(first, last), len(rows), 1, slots, mask))
    row = len(decodes)
    for chunk in prefills:
        slots = _slots([chunk], block_size)
        for first, last in pairwise(base_and_adapted(chunk)):
            begin = max(first + 1 - window, 0) if window else 0
            keys, queries = torch.arange(begin, last), torch.arange(first, last)[:, None]
            visible = keys <= queries
            if window:
                visible &= keys > queries - window
            mask = _additive(visible, dtype)[None, None]
            rows_of = slice(row, row + last - first)
            groups.append(AttentionGroup(rows_of, 1, last - first, slots[:, begin:last], mask, window > 0))
            row += last - first
    return groups


def _seen(length: int, window: int) -> int:
    return min(length, window) if window else length


def _group_bounds(lengths: list[int]) -> list[int]:
    """The bounds of consecutive groups of decode rows, none of which is padded beyond MAX_PADDING."""
    if not lengths:
        return []
    bounds, total, longest = [0], 0, 0
    for row, length in enumerate(lengths):
        total, longest = total + length, max(longest, length)
        if longest * (row + 1 - bounds[-1]) > MAX_PADDING * total:
            bounds.append(row)
            total = longest = length
    return [*bounds, len(lengths)]


def _slots(chunks: list[Chunk], block_size: int, window: int = 0) -> Tensor:
    """The slots of each request's context, chunk included: (b, longest), padded with slots of the null block.

    With a window, for chunks of one token, those of the last tokens that it sees.
    """
    longest = max(chunk.start + chunk.length for chunk in chunks)
    width = -(-longest // block_size)
    tables = torch.tensor(
        [chunk.request.blocks[:width] + [0] * (width - len(chunk.request.blocks)) for chunk in chunks]
    )
    slots = (tables[:, :, None] * block_size + torch.arange(block_size)).flatten(1)[:, :longest]
    if not window or longest <= window:
        return slots
    begins = torch.tensor([max(chunk.start + chunk.length - window, 0) for chunk in chunks])
    return slots.gather(1, begins[:, None] + torch.arange(window))


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))


def _lora_rows(
    chunks: list[Chunk], of_logits: LogitRows, model: ModelConfig, lookup: Callable[[str], AdapterSites]
) -> LoraRows | None:
    """Runs of rows under one adapter; None if no row has an adapter, and then no LoRA code runs at all."""
    runs = adapted_rows(chunks)
    if not runs:
        return None
    rows, logits = (
        [Run(first, last, lookup(adapter)) for first, last, adapter in each] for each in (runs, of_logits.adapted(runs))
    )
    return LoraRows(model, rows, logits)
