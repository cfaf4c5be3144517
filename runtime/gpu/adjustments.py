"""Penalties and forbidden tokens of a batch: prepared on the host, uploaded in one copy, applied on the device."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.host_to_device import host_buffer, upload
from runtime.messages import SamplingParams
from runtime.request import Request
from runtime.sampler import FORBIDDEN, LARGEST_LOGIT, LEAST_DIVISOR, adjusts


class Adjustments(NamedTuple):
    """The changes that `runtime.sampler.adjust` makes to each of n rows of logits, as tensors on their device.

    They apply in the order of the fields. A place is an index into the flattened logits.
    """

    places: Tensor  # (k,) int64, the places of penalised tokens, all different
    divisors: Tensor  # (k,) float32; a positive logit is divided by it, another one multiplied
    amounts: Tensor  # (k,) float32, subtracted afterwards
    limits: Tensor  # (n,) float32; a row's logits are clamped to ± this, infinite for rows without changes
    forbidden: Tensor  # int64, the places of forbidden tokens

    @classmethod
    def build(cls, requests: Sequence[Request], vocab: int, device: torch.device | str) -> "Adjustments":
        """The changes for one row of each request, uploaded in one copy. The host does not wait for it."""
        penalised = [
            (row * vocab, request.params, request.penalised)
            for row, request in enumerate(requests)
            if request.needs_tokens
        ]
        forbidden = [row * vocab + token_id for row, each in enumerate(requests) for token_id in each.forbidden_ids]
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
        return cls(*_parts(upload(buffer, device), *sizes))

    def apply(self, logits: Tensor) -> Tensor:
        """A changed float32 copy of `logits` (n, vocab), equal to the bit to `adjust` on a CPU. Waits for nothing."""
        adjusted = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        flat, limits = adjusted.view(-1), self.limits[:, None]
        values = flat[self.places]
        values = torch.where(values > 0, values / self.divisors, values * self.divisors)
        flat[self.places] = values - self.amounts
        adjusted.clamp_(-limits, limits)
        flat.index_fill_(0, self.forbidden, FORBIDDEN)
        return adjusted


def _amounts(counts: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Presence and frequency penalties of tokens, rounded to float32 at the operations where `adjust` rounds."""
    presence, frequency = np.float32(params.presence_penalty), np.float32(params.frequency_penalty)
    return np.where(counts > 0, presence + frequency * counts.astype(np.float32), np.float32(0))


def _length(entries: int, forbidden: int, rows: int) -> int:
    """The length of the buffer in 8-byte integers; two floats share one."""
    return entries + forbidden + -(-(2 * entries + rows) // 2)


def _parts(buffer: Tensor, entries: int, forbidden: int, rows: int) -> tuple[Tensor, ...]:
    """The fields of Adjustments as views of a buffer."""
    floats = buffer[entries + forbidden :].view(torch.float32)
    divisors, amounts, limits = floats[: 2 * entries + rows].split([entries, entries, rows])
    return buffer[:entries], divisors, amounts, limits, buffer[entries : entries + forbidden]
