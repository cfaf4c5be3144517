"""The expected wait of a new request: its place among those that wait, by how fast others started of late."""

import pytest

from runtime.fair_queue import FairQueue
from runtime.messages import Generate, SamplingParams
from runtime.request import Request
from service.engine.backlog import WINDOW_SECONDS, Backlog


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def command(name: str, salt: str = "", adapter: str | None = None, call: str = "") -> Generate:
    params = SamplingParams()
    return Generate(request_id=name, token_ids=[1], params=params, cache_salt=salt, adapter=adapter, call=call)


def test_nobody_waits_while_there_are_places() -> None:
    clock = Clock()
    backlog = Backlog(2, clock)
    backlog.queued(command("first"))
    clock.now += 60
    assert backlog.wait_seconds("", None) == 0.0
    backlog.queued(command("second"))
    assert backlog.wait_seconds("", None) > 0.0
    backlog.ended("second")
    assert backlog.wait_seconds("", None) == 0.0


def test_a_wait_is_the_place_in_the_queue_by_the_starts_a_second() -> None:
    clock = Clock()
    backlog = Backlog(1, clock)
    for index in range(13):
        backlog.queued(command(f"r{index}"))
    for index in range(3):  # one in two seconds
        clock.now += 2
        backlog.started(f"r{index}")
        backlog.started(f"r{index}")
        backlog.ended(f"r{index}")
    assert backlog.wait_seconds("", None) == pytest.approx(10 * 6 / 4), (
        "9 wait beside the one that runs, and 3 started in 6 s"
    )
    clock.now += WINDOW_SECONDS + 1
    assert backlog.wait_seconds("", None) == pytest.approx(10 * WINDOW_SECONDS), "none started in the window"
    for index in range(3, 13):
        backlog.ended(f"r{index}")
    assert backlog.wait_seconds("", None) == 0.0


def test_a_place_is_never_before_that_in_the_engines_queue_and_not_behind_all_others() -> None:
    commands = [command(f"many {index}", call="many") for index in range(7)]
    commands += [command(f"hot {index}", adapter="hot") for index in range(5)]
    commands += [command(f"theirs {index}", salt="tenant", adapter="hot" if index % 2 else None) for index in range(4)]
    for (tenant, adapter), place in {
        ("", None): 8,  # a turn of the many and its own, as many of the adapter, as many of the other tenant
        ("", "hot"): 16,
        ("", "cold"): 6,
        ("tenant", "cold"): 6,
        ("tenant", None): 10,
        ("new", None): 3,
    }.items():
        clock = Clock()
        backlog, queue = Backlog(1, clock), FairQueue()
        for each in commands:
            backlog.queued(each)
            queue.append(Request(each, max_tokens=10))
        clock.now += 1  # a second without a start: the wait is the place
        queue.append(new := Request(command("new", tenant, adapter), max_tokens=10))
        assert backlog.wait_seconds(tenant, adapter) == place, (tenant, adapter)
        assert list(queue).index(new) < place
