"""The device samples a batch as the CPU samples each of its rows, and the host does not wait for it."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="needs triton")

import triton

from runtime.gpu.adjustments import Adjustments
from runtime.gpu.device_sampler import NO_TOKEN, DeviceSamples, choose_on_device
from runtime.messages import Generate, SamplingParams
from runtime.request import Request
from runtime.sampler import adjust, sample
from tests.runtime.gpu import device_trace
from tests.runtime.gpu.device_trace import DeviceTrace

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB = 60
OPTIONS = {
    "repetition_penalty": (1.3, 0.7, 10.0, 1e-300, 1e300),
    "presence_penalty": (0.37, -1.9, 2.0),
    "frequency_penalty": (0.13, -0.71, 2.0),
    "min_tokens": (1, 4, 50),
    "stop_token_ids": ((3,), (59, 0), tuple(range(0, VOCAB, 3)), tuple(range(VOCAB))),
    "logit_bias": ({5: 3.25}, {0: -100.0, 13: 1e35, 59: -0.0}),
    "allowed_token_ids": ((4,), tuple(range(1, VOCAB, 2)), (59,)),
    "bad_words": (((7,),), ((8,), (9, 10), (10, 11, 12))),
}


def request(rng, **params):
    """A request with each option or without it, unless `params` say; its few tokens come up again and again."""
    chosen = {name: rng.choice(values) for name, values in OPTIONS.items() if rng.random() < 0.4}
    prompt = [rng.randrange(12) for _ in range(rng.randrange(1, 30))]
    command = Generate(request_id="", token_ids=prompt, params=SamplingParams(max_tokens=99, **chosen | params))
    made = Request(command, max_tokens=999, eos_token_ids=(VOCAB - 1,))
    generate(made, rng, rng.choice((0, 1, 15)))
    return made


def generate(made, rng, count):
    for _ in range(count):
        made.advance(1, samples=True)
        made.append(rng.randrange(8, 20))


def extreme_logits(rows, seed):
    """Logits of every kind that may be met, infinite ones among them."""
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(rows, VOCAB, generator=generator)
    for value in (0.0, -0.0, 1e35, -1e35, -torch.inf, 1e-40):
        logits[torch.rand(logits.shape, generator=generator) < 0.04] = value
    return logits


def bits(values):
    """Bits for a comparison. On a GPU all NaN count as equal, since its operations give other NaN than a CPU's."""
    return (values if DEVICE == "cpu" else values.masked_fill(values.isnan(), torch.nan)).view(torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(10))
def test_a_batch_is_adjusted_to_the_bit_as_its_rows_are_one_by_one(seed, dtype):
    rng = random.Random(seed)
    requests = [request(rng) for _ in range(rng.randrange(1, 40))]
    for step in range(4):
        logits = extreme_logits(len(requests), 10 * seed + step).to(dtype)
        before, there = logits.clone(), logits.to(DEVICE)
        adjusted = Adjustments.build(requests, VOCAB, DEVICE).apply(there).cpu()
        rows = zip(logits.float(), requests, strict=True)
        expected = torch.stack([adjust(row, each) for row, each in rows])
        torch.testing.assert_close(bits(adjusted), bits(expected), rtol=0, atol=0)
        assert torch.equal(there.cpu(), before)
        for each in requests:
            generate(each, rng, rng.randrange(3))


@pytest.mark.parametrize("seed", range(3))
def test_a_batch_is_chosen_from_as_its_rows_are_one_by_one(seed):
    """Rows that are not finite are among them; a draw is a matter of rounding, and tested elsewhere."""
    rng = random.Random(seed)
    requests = [request(rng, temperature=0.0) for _ in range(30)]
    logits = torch.randn(30, VOCAB, generator=torch.Generator().manual_seed(seed))
    logits[rng.randrange(30), 5] = torch.nan
    logits[rng.randrange(30), 5] = torch.inf
    logits[rng.randrange(30)] = -torch.inf
    expected = [NO_TOKEN if each.token_id is None else each.token_id for each in sample(logits, requests)]
    with np.errstate(over="ignore", invalid="ignore"):  # the interpreter is numpy
        assert choose_on_device(logits.to(DEVICE), requests, "cpu").tolist() == expected


def mixed(rows):
    """Requests of every kind, one of them penalised and cut for certain."""
    rng = random.Random(rows)
    kinds = [{"temperature": 0.0}, {"temperature": 1.0}, {"top_p": 0.5}, {"top_k": 5}, {"min_p": 0.1}]
    certain = request(
        rng,
        temperature=1.0,
        repetition_penalty=1.5,
        frequency_penalty=0.1,
        top_p=0.9,
        logit_bias={5: 1.0},
        allowed_token_ids=(5, 6),
    )
    return [certain] + [request(rng, **rng.choice(kinds)) for _ in range(rows - 1)]


@pytest.mark.parametrize("rows", [1, 2, 7, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_operation_waits_and_the_uploads_are_four_whatever_the_rows(monkeypatch, rows, dtype):
    logits = torch.empty(rows, VOCAB, dtype=dtype, device=device_trace.DEVICE)
    trace = DeviceTrace(logits)
    monkeypatch.setattr(type(triton.jit(len)), "run", trace.launch)  # the class of every kernel
    requests = mixed(rows)
    with trace:
        chosen = choose_on_device(logits, requests, "cpu")
    assert (chosen.shape, chosen.device) == ((rows,), device_trace.DEVICE)
    ranked = any(each.params.top_k for each in requests)
    assert (trace.uploads, trace.launches) == (4, 3 + 2 * ranked)


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_log_probabilities_of_all_rows_are_one_call_that_reads_the_logits_at_once(rows):
    """They are those of the rows one by one, and the next step may overwrite the logits."""
    rng = random.Random(rows)
    requests = [request(rng, temperature=0.0, logprobs=rng.choice((None, 0, 3, 5))) for _ in range(rows - 1)]
    requests.append(request(rng, temperature=0.0, logprobs=2))
    logits = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(rows)).to(DEVICE)
    expected = sample(logits.cpu(), requests)
    with Operations() as counted:
        samples = DeviceSamples(logits, requests, "cpu")
    alone = Operations()
    with alone:
        DeviceSamples(logits[-1:], requests[-1:], "cpu")
    assert abs(counted.names["logsumexp"] - alone.names["logsumexp"]) == 0
    assert counted.names["topk"] <= 2
    logits.fill_(torch.nan)
    for ours, theirs in zip(samples.wait(), expected, strict=True):
        assert ours.token_id == theirs.token_id
        assert (ours.logprobs is None) == (theirs.logprobs is None)
        if ours.logprobs is not None:
            assert ours.logprobs.logprob == pytest.approx(theirs.logprobs.logprob, abs=1e-5)
            assert ours.logprobs.top_ids == theirs.logprobs.top_ids
            assert ours.logprobs.top_logprobs == pytest.approx(theirs.logprobs.top_logprobs, abs=1e-5)


class Operations(TorchDispatchMode):
    """Counts torch's operations by name."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names[operation.overloadpacket.__name__] += 1
        return operation(*args, **kwargs or {})


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device: whether the host waits for one shows nowhere else")
def test_nothing_waits_for_a_cuda_device():
    logits, requests = torch.randn(40, VOCAB, device=DEVICE), mixed(40)
    choose_on_device(logits, requests, "")
    torch.cuda.set_sync_debug_mode("error")
    try:
        choose_on_device(logits, requests, "")
    finally:
        torch.cuda.set_sync_debug_mode("default")
