"""Decode steps of the base, and of batches under adapters beside it."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from runtime.gpu.triton_runner import TritonRunner
from runtime.messages import Event, Tokens
from tools.gpu_report.bench import Bench, Unsteady
from tools.gpu_report.plan import LoraCase
from tools.gpu_report.rows import Goal, Row, speed

FORWARD = "forward pass alone"
SPARE_TOKENS = 8  # tokens that each request could still decode after the last timed step, so that none ends earlier

Beside = Callable[[list[Event]], None]  # work between two steps, called with the events of the first


class Decoded(NamedTuple):
    """Times of a decoding batch, in milliseconds."""

    steps: list[float]  # whole engine steps
    forward: list[float]  # the forward pass alone


def start(bench: Bench) -> Iterator[Row]:
    """The engine's start, and the first step of each kind, which may compile kernels."""
    started = time.perf_counter()
    bench.start()
    yield Row(name="weights, K/V, kernels and graphs", unit="s", rounds=[[time.perf_counter() - started]])
    started = time.perf_counter()
    plan = bench.plan
    (adapter,) = bench.adapters(1, plan.rank)
    bench.load([adapter])
    for tokens in (plan.max_batch_tokens, *plan.prefill):
        for name in (None, adapter):
            bench.first_token(bench.prompt(min(tokens, plan.max_model_len - 1)), name)
    yield Row(name="first steps of each kind", unit="s", rounds=[[time.perf_counter() - started]])


def base(bench: Bench) -> Iterator[Row]:
    """Base-only batches."""
    plan, goals = bench.plan, dict(bench.plan.decode_goals)
    prompts = contexts(bench, max(plan.batches))
    for batch in plan.batches:
        rounds = [decode(bench, prompts[:batch]) for _ in range(plan.rounds)]
        floor = bench.floors.decode(batch, plan.context)
        row = Row(name=f"bs {batch}", rounds=[each.steps for each in rounds], floor=floor)
        if batch in goals:
            row.goal = Goal("ms a step", row.median, goals[batch])
        yield row
        yield Row(name=f"bs {batch}, {FORWARD}", rounds=[each.forward for each in rounds], floor=floor)


def adapted(bench: Bench) -> Iterator[Row]:
    """Each case and a base-only batch of the same contexts, measured in turn; the order changes every round."""
    prompts = contexts(bench, max(case.batch for case in bench.plan.lora))
    for case in bench.plan.lora:
        yield from _idle(bench, case, prompts) if case.adapters == 0 else _beside_base(bench, case, prompts)


def contexts(bench: Bench, count: int) -> list[list[int]]:
    """Prompts that reach the plan's context in the middle of the timed steps; the same at every call."""
    plan = bench.plan
    if len(bench.contexts) < count:
        length = max(plan.context - plan.warm_up - plan.steps // 2, 1)
        bench.contexts += [bench.prompt(length) for _ in range(count - len(bench.contexts))]
    return bench.contexts[:count]


def _idle(bench: Bench, case: LoraCase, prompts: Sequence[list[int]]) -> Iterator[Row]:
    """A base-only batch with the device full of unused adapters, and with none on it.

    Both run the graph of the base, which is the only one of an engine without LoRA.
    """
    digests = bench.adapters(bench.plan.tier, case.rank)
    bench.load(digests, "host")

    def empty() -> Decoded:
        bench.unload(bench.engine.adapters.device.adapters)
        return decode(bench, prompts[: case.batch])

    def full() -> Decoded:
        bench.load(digests)
        return decode(bench, prompts[: case.batch])

    yield from _pair(bench, case, f"{len(digests)} adapters idle, bs {case.batch}", empty, full)


def _beside_base(bench: Bench, case: LoraCase, prompts: Sequence[list[int]]) -> Iterator[Row]:
    digests = bench.adapters(case.adapters, case.rank)
    bench.load(digests)
    mine = prompts[: case.batch]
    name = f"{case.adapters}×r{case.rank}, bs {case.batch}"
    yield from _pair(bench, case, name, lambda: decode(bench, mine), lambda: decode(bench, mine, digests))


def _pair(
    bench: Bench, case: LoraCase, name: str, plain: Callable[[], Decoded], under_test: Callable[[], Decoded]
) -> Iterator[Row]:
    plain_rounds: list[Decoded] = []
    rounds: list[Decoded] = []
    for number in range(bench.plan.rounds):
        for into, measure in ((plain_rounds, plain), (rounds, under_test))[:: -1 if number % 2 else 1]:
            into.append(measure())
    steps, plain_steps = [each.steps for each in rounds], [each.steps for each in plain_rounds]
    floor = bench.floors.decode(case.batch, bench.plan.context, case.adapters, case.rank)
    least = 100 * bench.floors.decode(case.batch, bench.plan.context) / floor
    goal = Goal("% of the base's speed", 100 * speed(steps, plain_steps), case.goal, at_least=True)
    note = f"the floors' share: {least:.1f} %"
    yield Row(name=name, rounds=steps, base=plain_steps, floor=floor, goal=goal, note=note)
    forward, plain_forward = [each.forward for each in rounds], [each.forward for each in plain_rounds]
    yield Row(name=f"{name}, {FORWARD}", rounds=forward, base=plain_forward, floor=floor)


def decode(
    bench: Bench,
    prompts: Sequence[list[int]],
    adapters: Sequence[str] = (),
    *,
    steps: int = 0,
    beside: Beside = lambda events: None,
) -> Decoded:
    """Time `steps` steps (by default the plan's) in which all prompts decode, row i under adapter i modulo n.

    Adapters apply from the last prompt token on. The K/V before it are the base's and hit the prefix cache; a decode
    step reads the same bytes either way. `beside` is called before each step, and its time counts as the step's.
    """
    steps = steps or bench.plan.steps
    for prompt in prompts:
        bench.submit(prompt, 1)
    bench.finish()  # the contexts are in the prefix cache now
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
    """The times between the ends of steps, each of which returns one token for each request.

    The host waits for the device before the first and after the last step only: after each, the device would idle
    while the host prepares the next one.
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
