"""Sampling where the logits are: one wait for the chosen tokens of all rows."""

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from kernels import sampling, tuned
from kernels.reference.sampling import RowParams
from runtime.sampler import Sampled, adjust, adjusts, logprobs_of, uniform
from runtime.sequence import Sequence


def sample_on_device(logits: Tensor, sequences: Seq[Sequence], gpu: str) -> list[Sampled]:
    """One token for each row of `logits` (n, vocab), as `runtime.sampler.sample` chooses it."""
    if not sequences:
        return []
    finite = torch.isfinite(logits.amax(-1))
    adjusting = [row for row, sequence in enumerate(sequences) if adjusts(sequence)]
    adjusted = logits
    if adjusting:
        adjusted = logits.float() if logits.dtype != torch.float32 else logits.clone()
        for row in adjusting:
            adjusted[row] = adjust(adjusted[row], sequences[row])
    params = _row_params(sequences, logits.shape[1], logits.device)
    cut = "sample with cuts" if len(params.cut_rows) else "sample"
    token_ids, _ = sampling.sample(adjusted, params, tuned.lookup(gpu, cut, len(sequences)).config)
    chosen = torch.where(finite, token_ids, -1).tolist()
    return [
        Sampled(token_id, logprobs_of(logits[row].float(), token_id, sequences[row].params.logprobs))
        if token_id >= 0
        else Sampled(None)
        for row, token_id in enumerate(chosen)
    ]


def _row_params(sequences: Seq[Sequence], vocab: int, device: torch.device) -> RowParams:
    params = [sequence.params for sequence in sequences]
    return RowParams.build(
        temperature=[each.temperature for each in params],
        top_k=[min(each.top_k, vocab) for each in params],
        top_p=[each.top_p for each in params],
        min_p=[each.min_p for each in params],
        draw=[uniform(each.seed, each.params.choice, each.num_generated) for each in sequences],
        device=device,
    )
