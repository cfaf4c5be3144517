"""Whose turn it is: no tenant, adapter or call waits for all of another's requests."""

import itertools

import pytest

from runtime.fair_queue import FairQueue
from runtime.scheduler import QueueFull
from tests.runtime.scheduler_fakes import FakeAdapters, request, scheduler, step


def steps_until(s, condition, most=200):
    """How many steps it takes until something is so."""
    for count in range(most):
        if condition():
            return count
        step(s)
    raise AssertionError(f"not in {most} steps")


def test_turns_go_round_tenants_then_adapters_then_calls_and_a_call_is_in_order():
    queue = FairQueue()
    many = [request(4, call="many") for _ in range(3)]
    single, hot = request(4), [request(4, adapter="a", call=f"hot {index}") for index in range(2)]
    other = request(4, salt="another tenant")
    for each in (*many, single, *hot, other):
        queue.append(each)
    assert list(queue) == [many[0], other, hot[0], single, hot[1], many[1], many[2]]
    taken = []
    while queue:
        taken.append(next(iter(queue)))
        queue.take(taken[-1])
        queue.check()
    assert taken == [many[0], other, hot[0], single, hot[1], many[1], many[2]]


def test_a_request_that_is_passed_over_keeps_its_turn():
    queue = FairQueue()
    first, second, third = request(4), request(4), request(4)
    for each in (first, second, third):
        queue.append(each)
    for each in queue:
        if each is second:
            queue.take(each)
    queue.append(late := request(4))
    assert list(queue) == [first, third, late]
    queue.appendleft(second)
    assert list(queue) == [second, first, third, late]
    queue.prefer(late)
    assert list(queue) == [late, second, first, third]
    queue.check()


# What one client sends first, many of them, and what another one sends then
OTHERS = {
    "call": ({"call": "many"}, {}),
    "adapter": ({"adapter": "a"}, {"adapter": "b"}),
    "tenant": ({}, {"salt": "another tenant"}),
}


@pytest.mark.parametrize("whose", OTHERS)
@pytest.mark.parametrize("shortage", ["places", "blocks", "tokens"])
def test_one_token_of_another_comes_within_a_few_steps(whose, shortage):
    theirs, ours = OTHERS[whose]
    sizes = {
        "places": {"running": 4, "blocks": 400},
        "blocks": {"running": 40, "blocks": 40},
        "tokens": {"running": 40, "blocks": 400, "budget": 40},
    }
    s = scheduler(waiting=200, **{"budget": 64, **sizes[shortage]})
    prompt, answer = (30, 2) if shortage == "tokens" else (8, 40)
    hogs = [request([index] * prompt, max_tokens=answer, limit=100, **theirs) for index in range(20)]
    for each in hogs:
        s.add(each)
    for _ in range(3):
        step(s)
    assert s.running
    s.add(single := request([99] * 4, max_tokens=1, **ours))
    assert steps_until(s, lambda: single not in s) <= {"places": 3, "tokens": 4, "blocks": 6}[shortage]
    assert single.num_generated == 1
    steps_until(s, lambda: not s.requests, most=2000)
    assert {each.num_generated for each in hogs} == {answer}, "whoever gave a place away finishes as well"
    assert s.block_manager.pool.used == 0


def test_tenants_share_the_places_and_nobody_loses_the_last_one():
    s = scheduler(running=4, waiting=200, blocks=400, budget=64)
    for salt in ("one", "two", "three"):
        for index in range(10):
            s.add(request([index] * 4, max_tokens=60, limit=100, salt=salt))
        for _ in range(6):
            step(s)
    placed = sorted(len(list(group)) for _, group in itertools.groupby(sorted(r.groups[0] for r in s.running)))
    assert placed == [1, 1, 2]
    swaps = s.preemptions
    for _ in range(5):
        step(s)
    assert s.preemptions == swaps, "those who have a place do not take another's"


def test_one_call_does_not_fill_the_queue_for_others_but_may_have_as_many_as_one_sends():
    s = scheduler(running=8, waiting=1024, blocks=4000)
    for _ in range(1024):
        s.add(request(1, call="many"))
    with pytest.raises(QueueFull):
        s.add(request(1, call="many"))
    for _ in range(8):
        s.add(request(1))
    with pytest.raises(QueueFull):
        s.add(request(1))
    s.check()


def test_a_client_alone_is_served_in_order_and_never_set_back():
    s = scheduler(running=4, waiting=200, blocks=400, budget=64)
    alone = [request([index] * 4, max_tokens=5, call="alone") for index in range(20)]
    for each in alone:
        s.add(each)
    started = []
    while s.requests:
        step(s)
        started += [each for each in alone if each.started_at is not None and each not in started]
    assert started == alone
    assert s.preemptions == 0


def test_nobody_is_set_back_for_a_request_that_could_not_start():
    adapters = FakeAdapters()
    s = scheduler(running=2, waiting=20, blocks=400, adapters=adapters)
    for index in range(4):
        s.add(request([index] * 4, max_tokens=30, call="many"))
    step(s)
    s.add(slow := request(4, adapter="slow", max_tokens=1))
    for _ in range(5):
        step(s)
    assert s.preemptions == 0
    adapters.resident.add("slow")
    assert steps_until(s, lambda: slow not in s) <= 3
    assert s.preemptions == 1


def test_a_step_is_not_launched_ahead_of_one_that_sets_a_request_back():
    s = scheduler(running=2, waiting=20, blocks=400)
    for index in range(4):
        s.add(request([index] * 4, max_tokens=30, call="many"))
    step(s)
    assert s.can_schedule_ahead
    s.add(single := request([9] * 4))
    step(s)
    assert not s.can_schedule_ahead
    step(s)
    assert single in s.running
    assert s.can_schedule_ahead
    s.add(gone := request([8] * 4, salt="another tenant"))
    step(s)
    s.remove(gone)
    step(s)
    assert s.preemptions == 1, "who was to get the place has ended meanwhile"
