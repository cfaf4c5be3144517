"""Decode steps of the base, and of batches under adapters beside it."""

import time
from collections.abc import Callable, Iterator, Sequence

from tools.gpu_report.bench import Bench
from tools.gpu_report.decode_timing import Decoded, decode
from tools.gpu_report.plan import LoraCase
from tools.gpu_report.rows import Goal, Row, speed

FORWARD = "forward pass alone"


def start(bench: Bench) -> Iterator[Row]:
    """The engine's start, and the first of each kind of step, which compile kernels."""
    started = time.perf_counter()
    bench.start()
    yield Row(name="weights, K/V, kernels and graphs", unit="s", rounds=[[time.perf_counter() - started]])
    started = time.perf_counter()
    plan = bench.plan
    (adapter,) = bench.adapters(1, plan.rank)
    bench.bring([adapter])
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
    """Each case beside the base's batch of the same contexts, round by round, each in turn the first."""
    prompts = contexts(bench, max(case.batch for case in bench.plan.lora))
    for case in bench.plan.lora:
        yield from _idle(bench, case, prompts) if case.adapters == 0 else _beside_base(bench, case, prompts)


def contexts(bench: Bench, count: int) -> list[list[int]]:
    """Prompts whose context is the plan's in the middle of the timed steps; the same at every call."""
    plan = bench.plan
    if len(bench.contexts) < count:
        length = max(plan.context - plan.warm_up - plan.steps // 2, 1)
        bench.contexts += [bench.prompt(length) for _ in range(count - len(bench.contexts))]
    return bench.contexts[:count]


def _idle(bench: Bench, case: LoraCase, prompts: Sequence[list[int]]) -> Iterator[Row]:
    """A device full of adapters that nobody uses, beside an empty one. A base-only batch runs the graph of the base:
    there is no other in an engine without LoRA."""
    digests = bench.adapters(bench.plan.tier, case.rank)
    bench.bring(digests, "host")

    def empty() -> Decoded:
        bench.unload(bench.engine.adapters.device.adapters)
        return decode(bench, prompts[: case.batch])

    def full() -> Decoded:
        bench.bring(digests)
        return decode(bench, prompts[: case.batch])

    yield from _pair(bench, case, f"{len(digests)} adapters idle, bs {case.batch}", empty, full)


def _beside_base(bench: Bench, case: LoraCase, prompts: Sequence[list[int]]) -> Iterator[Row]:
    digests = bench.adapters(case.adapters, case.rank)
    bench.bring(digests)
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
