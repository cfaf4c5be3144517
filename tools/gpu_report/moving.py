"""Times of adapter loads: from host memory to the device, and from tensors in memory, alone and beside a batch."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future

from runtime.library import PreparedAdapter
from runtime.messages import Event
from tools.gpu_report.bench import Bench
from tools.gpu_report.decoding import Beside, contexts, decode
from tools.gpu_report.rows import Goal, Rounds, Row, percentile

LOAD_MS = 2.5
UPDATE_MS = 10.0
P99_MORE = 2.0  # %
UPDATE_NUMBERS = 1 << 12  # the number of the first adapter that only this section uses
UPDATE_EVERY = 20  # steps


def load(bench: Bench) -> Iterator[Row]:
    """Load an adapter from page-locked host memory until a request could use it."""
    plan, floors = bench.plan, bench.floors
    for rank, goal in ((plan.rank, LOAD_MS), (plan.wide_rank, None)):
        (digest,) = bench.adapters(1, rank)
        bench.load([digest], "host")
        usable, copies = [], []
        for _ in range(plan.loads):
            bench.unload([digest] if bench.engine.adapters.device.holds(digest) else [])
            milliseconds, stages = bench.timed_load(digest)
            usable.append(milliseconds)
            copies.append(1e3 * stages["copy"])
        row = Row(name=f"r{rank}, until usable", rounds=[usable], floor=floors.load(rank))
        row.goal = Goal("ms until usable", row.median, goal) if goal else None
        yield row
        yield Row(name=f"r{rank}, the copy alone", rounds=[copies], floor=floors.load(rank))
    yield from _load_beside(bench)


def _load_beside(bench: Bench) -> Iterator[Row]:
    """Load one adapter again and again beside a batch of the base, and compare the batch's step times."""
    plan = bench.plan
    (digest,) = bench.adapters(1, plan.rank)
    adapters = bench.engine.adapters
    usable: list[float] = []
    started: list[float] = []

    def reload(events: list[Event]) -> None:
        if adapters.device.holds(digest):
            if started:
                usable.append(1e3 * (time.perf_counter() - started.pop()))
            adapters.unload("bench-unload", digest, "device")
        elif not started:
            started.append(time.perf_counter())
            adapters.load(digest, "device")

    times, plain = _beside(bench, lambda: reload, started.clear)
    floor = bench.floors.load(plan.rank)
    name = f"r{plan.rank} beside bs {plan.beside_batch}"
    note = "seen only between two steps"
    if usable:
        yield Row(name=f"{name}, until usable", rounds=[usable], floor=floor, note=note)
    yield _p99(f"bs {plan.beside_batch} beside loads", times, plain, bench)


def update(bench: Bench) -> Iterator[Row]:
    """Register an adapter version from tensors in the caller's memory, load it to the device, then retire it.

    It is prepared in the background; what the engine's thread does is to register it and to start and end its load.
    """
    plan, floors = bench.plan, bench.floors
    prepared, known, usable = [], [], []
    stages: dict[str, list[float]] = {"read": [], "pack": [], "copy": []}
    for number in range(plan.updates):
        tensors = bench.tensors(plan.rank, UPDATE_NUMBERS + number)
        started = time.perf_counter()
        adapter = bench.prepare(tensors, plan.rank).result()
        prepared.append(1e3 * (time.perf_counter() - started))
        started = time.thread_time()
        digest = bench.engine.add_prepared(adapter)
        milliseconds, seconds = bench.timed_load(digest)
        known.append(1e3 * (time.thread_time() - started))
        usable.append(prepared[-1] + milliseconds)
        for stage, times in stages.items():
            times += [1e3 * seconds[stage]] if stage in seconds else []
        bench.engine.retire_adapter(digest)
    row = Row(name=f"r{plan.rank}, tensors until usable", rounds=[usable], floor=floors.load(plan.rank))
    yield row
    row = Row(name="of that, CPU time of the engine's thread", rounds=[known])
    row.goal = Goal("ms of the engine's thread", row.median, UPDATE_MS)
    yield row
    yield Row(name="of that, preparing in the background", rounds=[prepared])
    for stage, times in stages.items():
        if times:
            yield Row(name=f"of that, the stage {stage}", rounds=[times])
    yield from _update_beside(bench)


def _update_beside(bench: Bench) -> Iterator[Row]:
    plan = bench.plan
    numbers = iter(range(UPDATE_NUMBERS + plan.updates, 2 * UPDATE_NUMBERS))
    added: list[str] = []

    def updating() -> Beside:
        versions = iter([bench.tensors(plan.rank, next(numbers)) for _ in range(0, plan.beside_steps, UPDATE_EVERY)])
        due = iter(range(plan.beside_steps))
        preparing: list[Future[PreparedAdapter]] = []

        def each_step(events: list[Event]) -> None:
            if next(due) % UPDATE_EVERY == 0:
                preparing.append(bench.prepare(next(versions), plan.rank))
            if preparing and preparing[0].done():
                digest = bench.engine.add_prepared(preparing.pop(0).result())
                bench.engine.adapters.load(digest, "device")
                added.append(digest)

        return each_step

    def retire() -> None:
        while added:
            bench.engine.retire_adapter(added.pop())

    times, plain = _beside(bench, updating, retire)
    longest, usual = [[max(each)] for each in times], [[max(each)] for each in plain]
    name = f"longest gap between tokens, bs {plan.beside_batch}"
    yield Row(name=name, rounds=longest, base=usual, note=f"an update every {UPDATE_EVERY} steps")
    yield _p99(f"bs {plan.beside_batch} beside updates", times, plain, bench)


def _beside(bench: Bench, hook: Callable[[], Beside], after: Callable[[], None]) -> tuple[Rounds, Rounds]:
    """Step times of a batch with work beside it, and without; both are measured in turn."""
    plan = bench.plan
    prompts = contexts(bench, plan.beside_batch)
    times: dict[bool, Rounds] = {True: [], False: []}
    for number in range(plan.rounds):
        for busy in (False, True)[:: -1 if number % 2 else 1]:
            beside = hook() if busy else lambda events: None
            times[busy].append(decode(bench, prompts, steps=plan.beside_steps, beside=beside).steps)
            after()
    return times[True], times[False]


def _p99(name: str, times: Rounds, plain: Rounds, bench: Bench) -> Row:
    slow, usual = (percentile([step for each in rounds for step in each], 0.99) for rounds in (times, plain))
    goal = Goal("% that the 99th percentile is longer", 100 * (slow / usual - 1), P99_MORE)
    floor = bench.floors.decode(bench.plan.beside_batch, bench.plan.context)
    return Row(name=name, rounds=times, base=plain, floor=floor, goal=goal, note=f"p99 {slow:.3g} and {usual:.3g} ms")
