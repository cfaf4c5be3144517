"""Times the steps of a batch that decodes, whole and their forward pass alone."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from runtime.gpu.triton_runner import TritonRunner
from runtime.messages import Event, Tokens
from tools.gpu_report.bench import Bench, Unsteady

SPARE_TOKENS = 8  # that a sequence could still decode when the last step has been timed: none may end before

Beside = Callable[[list[Event]], None]


class Decoded(NamedTuple):
    """Milliseconds: of whole engine steps, and of the forward pass alone."""

    steps: list[float]
    forward: list[float]


def decode(
    bench: Bench,
    prompts: Sequence[list[int]],
    adapters: Sequence[str] = (),
    *,
    steps: int = 0,
    beside: Beside = lambda events: None,
) -> Decoded:
    """Time `steps` steps, the plan's by default, in which all prompts decode, row i under adapter i modulo n.

    Adapters apply from the last prompt token on, so that the K/V before are the base's and are found in the prefix
    cache: what a decode step reads does not depend on that. `beside` is called before each step with the events of
    the one before, and counts as part of the step.
    """
    steps = steps or bench.plan.steps
    for prompt in prompts:
        bench.submit(prompt, 1)
    bench.finish()  # the contexts are in the cache now
    tokens = steps + bench.plan.warm_up + len(prompts) + SPARE_TOKENS
    names = [adapters[row % len(adapters)] if adapters else None for row in range(len(prompts))]
    each = zip(prompts, names, strict=True)
    requests = [bench.submit(prompt, tokens, name, max(len(prompt) - 1, 0)) for prompt, name in each]
    try:
        waiting = set(requests)
        while waiting:
            waiting -= {event.request_id for event in bench.step() if isinstance(event, Tokens)}
        for _ in range(bench.plan.warm_up):
            bench.step()
        return Decoded(_timed_steps(bench, steps, len(prompts), beside), _timed_forward(bench))
    finally:
        for request_id in requests:
            bench.engine.abort(request_id)


def _timed_steps(bench: Bench, steps: int, batch: int, beside: Beside) -> list[float]:
    """The times between the ends of steps, each of which returns tokens that the device has computed.

    The device is waited for before and after all of them: after each, it would idle while the next is laid out.
    """
    bench.synchronize()
    times: list[float] = []
    events: list[Event] = []
    started = time.perf_counter()
    for number in range(steps):
        beside(events)
        events = bench.step()
        if number == steps - 1:
            bench.synchronize()
        ended = time.perf_counter()
        times.append(1e3 * (ended - started))
        started = ended
        if (got := sum(isinstance(event, Tokens) for event in events)) != batch:
            raise Unsteady(f"a step gave {got} tokens where {batch} sequences decode")
    return times


@torch.inference_mode()
def _timed_forward(bench: Bench) -> list[float]:
    """Repeat the forward pass of the last step, by its graph if it has one."""
    runner = bench.engine.runner
    assert isinstance(runner, TritonRunner)
    call = runner.forward_pass()
    if runner.device.type != "cuda":
        return [_milliseconds(call) for _ in range(bench.plan.forwards)]
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(bench.plan.forwards)]
    for start, stop in events:
        start.record()
        call()
        stop.record()
    bench.synchronize()
    return [start.elapsed_time(stop) for start, stop in events]


def _milliseconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - started)
