"""Sampling on the device of the logits, so that the next step can be launched before the host has the tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import sampling, tuned
from kernels.row_params import RowParams
from runtime.gpu.adjustments import Adjustments
from runtime.messages import Generate, SamplingParams
from runtime.request import Request
from runtime.sampler import Sampled, adjusts, logprobs_of, uniform

NO_TOKEN = -1  # the result for a row whose logits are not finite


class DeviceSamples:
    """The sampled tokens of a step: on the device at once, on the host after `wait`."""

    def __init__(self, logits: Tensor, requests: Sequence[Request], gpu: str):
        self._logits, self._requests = logits, requests
        self.chosen = choose_on_device(logits, requests, gpu)  # (n,) int64 on the device
        self._on_host = self.chosen
        if logits.is_cuda:
            self._on_host = torch.empty(self.chosen.shape, dtype=self.chosen.dtype, pin_memory=True)
            self._on_host.copy_(self.chosen, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    @property
    def needs_logits(self) -> bool:
        """Whether `wait` reads the logits, for log-probabilities."""
        return any(request.params.logprobs is not None for request in self._requests)

    def wait(self) -> list[Sampled]:
        """Wait for the copy to the host; return the choice of each row."""
        if self._logits.is_cuda:
            self._copied.synchronize()
        return [self._sampled(row, token_id) for row, token_id in enumerate(self._on_host.tolist())]

    def _sampled(self, row: int, token_id: int) -> Sampled:
        if token_id == NO_TOKEN:
            return Sampled(None)
        alternatives = self._requests[row].params.logprobs
        logprobs = None if alternatives is None else logprobs_of(self._logits[row].float(), token_id, alternatives)
        return Sampled(token_id, logprobs)


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
    cut = "sample with cuts" if len(params.cut_rows) else "sample"
    token_ids, _ = sampling.sample(logits, params, tuned.lookup(gpu, cut, len(requests)).config)
    return torch.where(finite, token_ids, NO_TOKEN)


def warm_up_sampling(logits: Tensor, gpu: str) -> None:
    """Compile the kernels of every kind of row, by sampling from any `logits`."""
    # Kernels are compiled for each dtype, and adjusted logits are float32 for every model dtype.
    adjusted = SamplingParams(top_p=0.5, repetition_penalty=2.0, min_tokens=1, stop_token_ids=(0,))
    for params in (SamplingParams(), SamplingParams(top_k=2), SamplingParams(top_p=0.5), adjusted):
        request = Request(Generate(request_id="", token_ids=[0], params=params), max_tokens=2)
        choose_on_device(logits[:1], [request], gpu)


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
