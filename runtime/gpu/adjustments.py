"""Penalties, biases and forbidden tokens of a batch: prepared on the host, uploaded, and applied on the device."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.host_to_device import host_buffer, upload
from runtime.messages import SamplingParams
from runtime.request import Request
from runtime.sampler import FORBIDDEN, LARGEST_LOGIT, LEAST_DIVISOR, adjusts, allowed_tokens


class Adjustments(NamedTuple):
    """The changes that `runtime.sampler.adjust` makes to each of n rows of logits, as tensors on their device.

    They apply in the order of the fields. A place is an index into the flattened logits.
    """

    places: Tensor  # (k,) int64, the places of penalised tokens, all different
    divisors: Tensor  # (k,) float32; a positive logit is divided by it, another one multiplied
    amounts: Tensor  # (k,) float32, subtracted afterwards
    limits: Tensor  # (n,) float32; a row's logits are clamped to ± this, infinite for rows without changes
    forbidden: Tensor  # int64, the places of forbidden tokens, in rows without a mask
    bias: "Bias | None"  # added before the clamp
    masks: "Masks | None"

    @classmethod
    def build(cls, requests: Sequence[Request], vocab: int, device: torch.device | str) -> "Adjustments":
        """The changes for one row of each request. The host does not wait for the uploads.

        There is one copy, and one more each where there are biases and masks.
        """
        penalised = [
            (row * vocab, request.params, request.penalised)
            for row, request in enumerate(requests)
            if request.has_penalty
        ]
        masks = {row: mask for row, each in enumerate(requests) if (mask := allowed_tokens(each, vocab)) is not None}
        forbidden = [
            row * vocab + token_id
            for row, each in enumerate(requests)
            if row not in masks
            for token_id in each.forbidden_ids
        ]
        sizes = sum(len(tokens.ids) for *_, tokens in penalised), len(forbidden), len(requests)
        buffer = host_buffer(_length(*sizes), torch.int64, device)
        places, divisors, amounts, limits, last = (part.numpy() for part in _parts(buffer, *sizes))
        limits[:] = [LARGEST_LOGIT if adjusts(request) else np.inf for request in requests]
        last[:] = forbidden
        start = 0
        for first, params, tokens in penalised:
            entries = slice(start, start + len(tokens.ids))
            np.add(tokens.ids, first, out=places[entries])
            with np.errstate(over="ignore"):  # numbers too large for float32 become infinite, as in torch
                divisors[entries] = max(params.repetition_penalty, LEAST_DIVISOR)
                amounts[entries] = _amounts(np.asarray(tokens.counts), params)
            start = entries.stop
        return cls(
            *_parts(upload(buffer, device), *sizes),
            bias=Bias.build(requests, vocab, device),
            masks=Masks.build(masks, vocab, device),
        )

    def apply(self, logits: Tensor) -> Tensor:
        """A changed float32 copy of `logits` (n, vocab), equal to the bit to `adjust` on a CPU. Waits for nothing."""
        adjusted = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        flat, limits = adjusted.view(-1), self.limits[:, None]
        values = flat[self.places]
        values = torch.where(values > 0, values / self.divisors, values * self.divisors)
        flat[self.places] = values - self.amounts
        if self.bias is not None:
            flat[self.bias.places] += self.bias.amounts
        adjusted.clamp_(-limits, limits)
        flat.index_fill_(0, self.forbidden, FORBIDDEN)
        if self.masks is not None:
            rows = self.masks.rows
            adjusted[rows] = torch.where(self.masks.allowed, adjusted[rows], FORBIDDEN)
        return adjusted


class Bias(NamedTuple):
    """What requests add to the logits of tokens."""

    places: Tensor  # (k,) int64
    amounts: Tensor  # (k,) float32

    @classmethod
    def build(cls, requests: Sequence[Request], vocab: int, device: torch.device | str) -> "Bias | None":
        biased = [
            (row * vocab + token_id, amount)
            for row, request in enumerate(requests)
            for token_id, amount in request.params.logit_bias.items()
        ]
        if not biased:
            return None
        buffer = host_buffer(2 * len(biased), torch.int64, device)
        places, amounts = buffer.numpy()[: len(biased)], buffer[len(biased) :].view(torch.float32).numpy()
        places[:], amounts[: len(biased)] = zip(*biased, strict=True)
        there = upload(buffer, device)
        return cls(there[: len(biased)], there[len(biased) :].view(torch.float32)[: len(biased)])


class Masks(NamedTuple):
    """The tokens that rows may choose among."""

    rows: Tensor  # (m,) int64
    allowed: Tensor  # (m, vocab) bool

    @classmethod
    def build(cls, masks: dict[int, NDArray[np.bool_]], vocab: int, device: torch.device | str) -> "Masks | None":
        if not masks:
            return None
        buffer = host_buffer(len(masks) * (8 + vocab), torch.uint8, device)
        rows, allowed = buffer.split([8 * len(masks), len(masks) * vocab])
        rows.view(torch.int64).numpy()[:] = list(masks)
        np.stack(list(masks.values()), out=allowed.view(torch.bool).view(len(masks), vocab).numpy())
        rows, allowed = upload(buffer, device).split([8 * len(masks), len(masks) * vocab])
        return cls(rows.view(torch.int64), allowed.view(torch.bool).view(len(masks), vocab))


def _amounts(counts: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Presence and frequency penalties of tokens, rounded to float32 at the operations where `adjust` rounds."""
    presence, frequency = np.float32(params.presence_penalty), np.float32(params.frequency_penalty)
    return np.where(counts > 0, presence + frequency * counts.astype(np.float32), np.float32(0))


def _length(entries: int, forbidden: int, rows: int) -> int:
    """The length of the buffer in 8-byte integers; two floats share one."""
    return entries + forbidden + -(-(2 * entries + rows) // 2)


def _parts(buffer: Tensor, entries: int, forbidden: int, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The first fields of Adjustments as views of a buffer."""
    floats = buffer[entries + forbidden :].view(torch.float32)
    divisors, amounts, limits = floats[: 2 * entries + rows].split([entries, entries, rows])
    return buffer[:entries], divisors, amounts, limits, buffer[entries : entries + forbidden]
