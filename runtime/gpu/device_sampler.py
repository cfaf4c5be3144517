"""Sampling on the device of the logits, so that the next step can be launched before the host has the tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from msgspec.structs import replace
from torch import Tensor

from kernels import sampling, tuned
from kernels.host_to_device import host_buffer, upload
from kernels.row_params import RowParams
from runtime.gpu.adjustments import Adjustments
from runtime.messages import Generate, SamplingParams, TokenLogprobs
from runtime.request import Request
from runtime.sampler import Sampled, adjusts, uniform

NO_TOKEN = -1  # the result for a row whose logits are not finite


class DeviceSamples:
    """The sampled tokens of a step: on the device at once, on the host after `wait`.

    All that reads the logits is launched at once, so that the next step may overwrite them.
    """

    def __init__(self, logits: Tensor, requests: Sequence[Request], gpu: str):
        self._requests = requests
        self.chosen = choose_on_device(logits, requests, gpu)  # (n,) int64 on the device
        self._tokens, self._logprobs = _to_host(self.chosen), _Logprobs.of(logits, requests, self.chosen)
        self._copied: torch.cuda.Event | None = None
        if logits.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def wait(self) -> list[Sampled]:
        """Wait for the copy to the host; return the choice of each row."""
        token_ids = self.token_ids
        logprobs = {} if self._logprobs is None else self._logprobs.by_row()
        return [
            Sampled(None) if token_id == NO_TOKEN else Sampled(token_id, logprobs.get(row))
            for row, token_id in enumerate(token_ids)
        ]

    @property
    def token_ids(self) -> list[int]:
        """The choice of each row, NO_TOKEN where the logits are not finite, after waiting for the copy to the host."""
        if self._copied is not None:
            self._copied.synchronize()
        found: list[int] = self._tokens.tolist()
        return found


class _Logprobs(NamedTuple):
    """Log-probabilities of chosen tokens and of the likeliest ones, on their way to the host."""

    alternatives: dict[int, int]  # of each row that asks for them, in order
    numbers: Tensor  # (rows, 1 + 2 most) float64: of the chosen token, of the likeliest, and their ids

    @classmethod
    def of(cls, logits: Tensor, requests: Sequence[Request], chosen: Tensor) -> "_Logprobs | None":
        """Of the rows that ask for them, from logits before penalties; None if no row does."""
        asked = ((row, request.params.logprobs) for row, request in enumerate(requests))
        alternatives = {row: most for row, most in asked if most is not None}
        if not alternatives:
            return None
        buffer = host_buffer(len(alternatives), torch.int64, logits.device)
        buffer.numpy()[:] = list(alternatives)
        rows = upload(buffer, logits.device)
        picked = logits.index_select(0, rows).float()
        totals = picked.logsumexp(-1, keepdim=True)
        own = picked.gather(1, chosen.index_select(0, rows).clamp(min=0)[:, None])
        values, ids = picked.topk(max(alternatives.values()))
        numbers = torch.cat((own - totals, values - totals), 1).double()
        return cls(alternatives, _to_host(torch.cat((numbers, ids.double()), 1)))

    def by_row(self) -> dict[int, TokenLogprobs]:
        """Of each row that asked for them, once the copy to the host has ended."""
        most = (self.numbers.shape[1] - 1) // 2
        each = zip(self.alternatives.items(), self.numbers.tolist(), strict=True)
        return {
            row: TokenLogprobs(numbers[0], [int(id) for id in numbers[1 + most :][:count]], numbers[1 : 1 + count])
            for (row, count), numbers in each
        }


def _to_host(numbers: Tensor) -> Tensor:
    """A copy on the host that is under way, or on a CPU the numbers themselves."""
    if not numbers.is_cuda:
        return numbers
    there = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    return there.copy_(numbers, non_blocking=True)


def choose_on_device(logits: Tensor, requests: Sequence[Request], gpu: str) -> Tensor:
    """One token for each row of `logits` (n, vocab), as `runtime.sampler.sample` chooses it; NO_TOKEN if not finite.

    The host does not wait for the device. There are at most two uploads: sampling parameters, and adjustments if any.
    """
    if not requests:
        return torch.empty(0, dtype=torch.int64, device=logits.device)
    finite = torch.isfinite(logits.amax(-1))
    if any(adjusts(request) for request in requests):
        logits = Adjustments.build(requests, logits.shape[1], logits.device).apply(logits)
    params = _row_params(requests, logits.shape[1], logits.device)
    cut = "sample with cuts" if len(params.ranked_rows) else "sample"
    token_ids, _ = sampling.sample(logits, params, tuned.lookup(gpu, cut, len(requests)).config)
    return torch.where(finite, token_ids, NO_TOKEN)


def warm_up_sampling(logits: Tensor, gpu: str) -> None:
    """Compile the kernels of every kind of row, by sampling from any `logits`, one request for each row."""
    # Kernels are compiled for each dtype, and adjusted logits are float32 for every model dtype.
    plain = SamplingParams(), SamplingParams(top_k=2), SamplingParams(top_p=0.5)
    adjusted = [replace(each, repetition_penalty=2.0, min_tokens=1, stop_token_ids=(0,)) for each in plain]
    for params in (*plain, *adjusted):
        request = Request(Generate(request_id="", token_ids=[0], params=params), max_tokens=2)
        choose_on_device(logits, [request] * len(logits), gpu)


def _row_params(requests: Sequence[Request], vocab: int, device: torch.device) -> RowParams:
    params = [request.params for request in requests]
    return RowParams.build(
        temperature=[each.temperature for each in params],
        top_k=[min(each.top_k, vocab) for each in params],
        top_p=[each.top_p for each in params],
        min_p=[each.min_p for each in params],
        draw=[uniform(each.seed, each.params.choice, each.num_generated) for each in requests],
        device=device,
    )
