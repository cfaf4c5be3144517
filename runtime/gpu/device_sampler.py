"""Sampling where the logits are, so that the next step can begin before anybody here knows the tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import sampling, tuned
from kernels.reference.sampling import RowParams
from runtime.gpu.adjustments import Adjustments
from runtime.messages import Generate, SamplingParams
from runtime.request import Request
from runtime.sampler import Sampled, adjusts, logprobs_of, uniform

NOTHING = -1  # the token of a row whose logits are not finite


class DeviceSamples:
    """The tokens that a step has chosen, on the device and, a little later, here."""

    def __init__(self, logits: Tensor, requests: Sequence[Request], gpu: str):
        self._logits, self._requests = logits, requests
        self.chosen = choose_on_device(logits, requests, gpu)
        self._here = self.chosen
        if logits.is_cuda:
            self._here = torch.empty(self.chosen.shape, dtype=self.chosen.dtype, pin_memory=True)
            self._here.copy_(self.chosen, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    @property
    def needs_logits(self) -> bool:
        """Whether `wait` reads the logits once more."""
        return any(request.params.logprobs is not None for request in self._requests)

    def wait(self) -> list[Sampled]:
        """A choice for each row, when it has been made."""
        if self._logits.is_cuda:
            self._arrived.synchronize()
        return [self._sampled(row, token_id) for row, token_id in enumerate(self._here.tolist())]

    def _sampled(self, row: int, token_id: int) -> Sampled:
        if token_id == NOTHING:
            return Sampled(None)
        alternatives = self._requests[row].params.logprobs
        logprobs = None if alternatives is None else logprobs_of(self._logits[row].float(), token_id, alternatives)
        return Sampled(token_id, logprobs)


def choose_on_device(logits: Tensor, requests: Sequence[Request], gpu: str) -> Tensor:
    """One token for each row of `logits` (n, vocab), as `runtime.sampler.sample` chooses it; NOTHING where it cannot.

    Waits for nothing on the device. There are two uploads at most: the rows' parameters, and adjustments if any.
    """
    if not requests:
        return torch.empty(0, dtype=torch.int64, device=logits.device)
    finite = torch.isfinite(logits.amax(-1))
    if any(adjusts(request) for request in requests):
        logits = Adjustments.build(requests, logits.shape[1], logits.device).apply(logits)
    params = _row_params(requests, logits.shape[1], logits.device)
    cut = "sample with cuts" if len(params.cut_rows) else "sample"
    token_ids, _ = sampling.sample(logits, params, tuned.lookup(gpu, cut, len(requests)).config)
    return torch.where(finite, token_ids, NOTHING)


def warm_up_sampling(logits: Tensor, gpu: str) -> None:
    """Compile what rows of every kind are sampled by, on whatever logits there are."""
    # Adjusted logits are float32 whatever the model's are, and kernels are compiled for each dtype.
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
