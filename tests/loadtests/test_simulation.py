"""The simulation of many replicas: nothing is lost, a seed repeats it, and queues are as theory has them."""

import itertools
import json
import random
import statistics
from pathlib import Path

import pytest

from loadtests.simulate import costs as cost_tables
from loadtests.simulate.costs import Costs, Limits, StepCosts, Transfer
from loadtests.simulate.figures import Goal, figures, first_seconds
from loadtests.simulate.memory import AdapterMemory
from loadtests.simulate.routers import NAMES, Affinity, Asked, View, by_name, homes, least_loaded, power_of_two
from loadtests.simulate.simulation import Cluster, Outcome, Simulation
from loadtests.simulate.traffic import BASE, Conversation, Lengths, Traffic, Turn, conversations, popular

CASES = json.loads((Path(__file__).parent / "routing_cases.json").read_text())
MB = 1e6
COSTS = Costs(
    about="of tests",
    measured=False,
    conditions=(),
    steps=StepCosts(((1, 0.010), (64, 0.020), (256, 0.050)), 0.0001, 0.0001, 0.0005, 1e-7, 1e-8),
    beside=None,
    request_seconds=0.002,
    loads_at_once=2,
    copy=Transfer(0.001, 1e9),
    read=Transfer(0.002, 1e9),
    download=Transfer(0.020, 1e9),
    kv_bytes_per_token=1000,
    adapter_bytes=10 * MB,
    limits=Limits(
        max_running=8,
        max_waiting=40,
        max_batch_tokens=256,
        device_bytes=45 * MB,
        host_bytes=100 * MB,
        disk_bytes=200 * MB,
        kv_bytes=6 * MB,
    ),
)
TRAFFIC = Traffic(
    adapters=30, requests_per_second=24.0, seconds=30.0, prompt=Lengths(150, 0.8, 1500), answer=Lengths(30, 0.7, 200)
)


def cluster(replicas: int = 3, **more: object) -> Cluster:
    return Cluster(replicas, COSTS, [COSTS.adapter_bytes] * TRAFFIC.adapters, range(10), **more)


def simulated(router: str = "ours", seed: int = 1, **more: object) -> Outcome:
    return Simulation(cluster(**more), by_name(router), seed).run(conversations(TRAFFIC, seed))


def whole(outcome: Outcome) -> list[tuple[object, ...]]:
    return [(r.conversation.number, r.turn, r.replica, r.first, r.ended, r.cached) for r in outcome.requests]


@pytest.mark.parametrize("router", NAMES)
def test_every_request_ends_once_and_bytes_add_up_under_every_router(router: str) -> None:
    simulation = Simulation(cluster(), by_name(router), 1)
    arriving = list(conversations(TRAFFIC, 1))
    simulation.begin(iter(arriving))
    while simulation.step():
        if simulation.events % 50 == 0:
            for replica in simulation.replicas:
                replica.check()
    outcome = simulation.outcome
    assert all(replica.load == 0 for replica in outcome.replicas)
    ended = [(request.conversation.number, request.turn) for request in outcome.requests]
    assert len(set(ended)) == len(ended)
    cut_short = {request.conversation.number for request in outcome.requests if request.refused}
    for conversation in arriving:
        if conversation.number not in cut_short:
            assert {(conversation.number, turn) for turn in range(len(conversation.turns))} <= set(ended)
    for request in outcome.requests:
        assert request.refused or request.arrived < request.first <= request.ended
        assert request.refused or request.computed == request.prompt > request.cached >= 0
    answered = [request for request in outcome.requests if not request.refused]
    computed = sum(replica.computed_tokens for replica in outcome.replicas)
    assert computed == sum(request.prompt - request.cached for request in answered)
    counted = outcome.counted
    assert counted.moved == tuple(COSTS.adapter_bytes * times for times in counted.times)
    assert counted.times.downloaded <= counted.times.read
    evicted = sum(replica.memory.device.evictions for replica in outcome.replicas)
    assert counted.times.copied - evicted == sum(len(replica.memory.device.sizes) for replica in outcome.replicas)
    assert counted.hits + counted.misses == sum(request.adapter != BASE for request in answered)


def test_a_seed_repeats_a_run_and_another_one_does_not() -> None:
    assert whole(simulated(seed=1)) == whole(simulated(seed=1))
    assert whole(simulated(seed=1)) != whole(simulated(seed=2))


def test_every_router_gets_the_same_conversations() -> None:
    one, other = simulated("random"), simulated("ours")
    firsts = [
        {(r.conversation.number, r.arrived, r.prompt, r.answer) for r in outcome.requests if r.turn == 0}
        for outcome in (one, other)
    ]
    assert firsts[0] == firsts[1]


@pytest.mark.parametrize("kind", ["exponential", "constant"])
def test_a_replica_that_serves_one_at_a_time_waits_as_queueing_theory_says(kind: str) -> None:
    """Exactly as Lindley's recursion, and in the mean as M/M/1: λ·E[S²] / 2(1 − ρ), and half of that as M/D/1."""
    rng, step, mean, utilisation = random.Random(7), 0.001, 40, 0.5
    flat = StepCosts(((1, step), (2, step)), 0.0, 0.0, 0.0, 0.0, 0.0)
    costs = COSTS._replace(steps=flat, request_seconds=0.0, limits=Limits(max_running=1, max_waiting=10_000))
    rate = utilisation / (mean * step)
    arriving, now = [], 0.0
    for number in range(8000):
        now += rng.expovariate(rate)
        answer = max(1, round(rng.expovariate(1 / mean))) if kind == "exponential" else mean
        arriving.append(Conversation(number, BASE, now, [Turn(1, answer, 0.0)]))
    outcome = Simulation(Cluster(1, costs, []), by_name("random")).run(iter(arriving))
    waits = [request.first - step - request.arrived for request in outcome.requests]
    services = [request.answer * step for request in outcome.requests]
    waited = 0.0
    for wait, service, one, other in zip(waits, services, arriving, arriving[1:], strict=False):
        assert wait == pytest.approx(waited, abs=1e-6)
        waited = max(0.0, waited + service - (other.begins - one.begins))
    squares = 2 * (mean * step) ** 2 if kind == "exponential" else (mean * step) ** 2
    expected = rate * squares / 2 / (1 - utilisation)
    assert statistics.fmean(waits) == pytest.approx(expected, rel=0.18)  # three standard errors at 8,000 of M/M/1
    assert outcome.replicas[0].busy_seconds == pytest.approx(sum(services))


def test_a_lone_request_takes_what_its_steps_cost() -> None:
    arriving = [Conversation(0, 3, 1.0, [Turn(300, 11, 0.0)])]
    request = Simulation(cluster(1), by_name("random")).run(iter(arriving)).requests[0]
    rows = COSTS.steps.table(256)
    prompt = rows[256] + rows[44] + 300 * 1e-4 + 2 * 5e-4 + (256 * 128 + 44 * (256 + 22)) * 1e-8
    load = 0.002 + 0.01 + 0.001 + 0.01  # from disk to the host, and to the device
    assert first_seconds(request) == pytest.approx(0.002 + load + prompt)
    decoding = 10 * (rows[1] + 1e-4 + 1e-4 + 5e-4) + sum(300 + n for n in range(10)) * 1e-7
    assert request.ended - request.first == pytest.approx(decoding)


def test_one_that_comes_while_others_decode_starts_with_the_next_step() -> None:
    arriving = [Conversation(0, BASE, 0.0, [Turn(1, 100, 0.0)]), Conversation(1, BASE, 0.5, [Turn(1, 1, 0.0)])]
    first, second = Simulation(cluster(1), by_name("random")).run(iter(arriving)).requests
    assert second.arrived + 0.002 < second.first < second.arrived + 0.002 + 2 * 0.0115
    assert first.ended > second.ended


def test_a_later_turn_computes_only_what_is_new_where_the_conversation_was() -> None:
    arriving = [Conversation(0, BASE, 0.0, [Turn(400, 10, 0.0), Turn(30, 10, 1.0)])]
    _, later = Simulation(cluster(1), by_name("random")).run(iter(arriving)).requests
    assert (later.prompt, later.cached) == (440, 409)
    two = Simulation(cluster(2), by_name("round robin")).run(iter(arriving)).requests
    assert [request.cached for request in two] == [0, 0]


def test_kv_come_from_another_replica_only_where_that_is_faster() -> None:
    arriving = [Conversation(0, BASE, 0.0, [Turn(400, 10, 0.0), Turn(30, 10, 1.0)])]
    for link, cached in ((Transfer(0.001, 1e9), 409), (Transfer(1.0, 1e9), 0), (Transfer(0.001, 1000.0), 0)):
        outcome = Simulation(cluster(2, kv_link=link), by_name("round robin")).run(iter(arriving))
        assert [request.cached for request in outcome.requests] == [0, cached]
        assert [request.fetched for request in outcome.requests] == [0, cached]


# Eviction


def loaded(memory: AdapterMemory, adapter: int, waiting: dict[int, int] | None = None) -> list[int]:
    """Load an adapter to the device; return those that left it."""
    memory.ask(adapter, place=adapter + 1)
    victims: list[int] = []
    for _ in range(2):
        for start in memory.advance(waiting or {}):
            victims += start.victims
            memory.finish(start.load)
    return victims


def test_the_least_recently_used_leaves_the_device_and_stays_on_the_host() -> None:
    memory = AdapterMemory(COSTS, [10 * MB] * 20, range(20))
    assert [loaded(memory, adapter) for adapter in range(4)] == [[]] * 4  # 45 MB
    memory.acquire(0)
    memory.release(0)
    assert loaded(memory, 4) == [1]
    assert memory.on_host(1)
    memory.ask(1, 100)
    [start] = memory.advance({})
    assert (start.load.stage, start.victims) == ("copy", [2])
    memory.check()


def test_what_is_used_or_waited_for_by_an_earlier_one_does_not_leave() -> None:
    memory = AdapterMemory(COSTS, [10 * MB] * 20, range(20))
    for adapter in range(4):
        loaded(memory, adapter)
    for adapter in (0, 2):
        memory.acquire(adapter)
    assert loaded(memory, 10, {1: 3, 3: 50}) == [3]  # place 11: that of 3 is later
    memory.acquire(10)
    assert loaded(memory, 11, {1: 3}) == []
    assert not memory.has(11)
    memory.release(0)
    [start] = memory.advance({1: 3})
    assert start.victims == [0]
    memory.check()


def test_a_disk_that_is_full_forgets_and_downloads_again() -> None:
    memory = AdapterMemory(COSTS, [10 * MB] * 40)
    for adapter in range(25):
        loaded(memory, adapter)
    assert (len(memory.disk.sizes), memory.times.downloaded) == (20, 25)
    loaded(memory, 0)
    assert memory.times == (26, 26, 26)
    memory.check()


# Routers


@pytest.mark.parametrize("case", CASES["cases"], ids=lambda case: case["name"])
def test_affinity_chooses_as_the_table_of_cases_says(case: dict) -> None:
    servers, adapter = case["servers"], CASES["adapter"]

    def where(*tiers: str) -> dict[str, list[int]]:
        return {adapter: [number for number, each in enumerate(servers) if each.get("holds") in tiers]}

    kept = {number: each["cached"] for number, each in enumerate(servers) if "cached" in each}
    names = tuple(each["id"] for each in servers)
    view = View(
        names,
        64,
        [each.get("in_flight", 0) for each in servers],
        [each.get("queue_seconds", 0.0) for each in servers],
        where("device"),
        where("device", "host"),
        {CASES["heads"][1]: kept},
    )
    asked = Asked(adapter if case["adapter"] else None, CASES["heads"][1])
    for relative, chosen in ((False, case["chosen"]), (True, case.get("relatively", case["chosen"]))):
        rule = Affinity(CASES["spread"], CASES["queue_seconds"], relative=relative, by_load=relative)
        assert names[rule.choose(asked, view, random.Random(0))] == chosen


def test_by_load_the_least_loaded_of_those_that_have_the_adapter_is_chosen() -> None:
    view = View(("a", "b", "c"), 64, [12, 3, 0], [0.0] * 3, {"it": [0, 1]}, {"it": [0, 1, 2]}, {})
    assert Affinity(by_load=True).choose(Asked("it", "-"), view, random.Random(0)) == 1


def test_rendezvous_moves_only_the_adapters_of_the_replica_that_is_gone() -> None:
    names = tuple(map(str, range(10)))
    before, after = ([homes(f"a{adapter}", among)[0] for adapter in range(2000)] for among in (names, names[:9]))
    assert all(old == new for old, new in zip(before, after, strict=True) if old != 9)
    counts = [before.count(replica) for replica in range(10)]
    assert min(counts) > 150
    assert max(counts) < 250


def test_the_least_loaded_is_the_least_and_round_robin_takes_turns() -> None:
    view, rng = View(("a", "b", "c", "d"), 64, [3, 1, 4, 1], [0.0] * 4, {}, {}, {}), random.Random(0)
    asked = Asked("it", "-")
    assert {least_loaded(asked, view, rng) for _ in range(30)} == {1, 3}
    in_turn = by_name("round robin")
    assert [in_turn.choose(asked, view, rng) for _ in range(5)] == [0, 1, 2, 3, 0]
    two = [power_of_two(asked, view, rng) for _ in range(400)]
    assert two.count(2) < 60 < two.count(1)  # 2 only if it was drawn twice
    with pytest.raises(ValueError, match="no router 'best'"):
        by_name("best")


def test_adapters_that_fit_onto_all_devices_together_stay_where_they_are() -> None:
    """Each of three devices holds four of nine adapters: at random, most loads evict one that is asked for again."""
    calm = list(conversations(TRAFFIC._replace(adapters=9, requests_per_second=3.0, seconds=120.0), 1))
    ours, other = (Simulation(cluster(), by_name(name)).run(iter(calm)).counted for name in ("ours", "random"))
    assert ours.times.copied <= 3 * 9
    assert other.times.copied > 3 * ours.times.copied


# What comes in, and what comes out


def test_traffic_has_the_rate_and_the_popularity_that_were_asked_for() -> None:
    traffic = Traffic(adapters=100, requests_per_second=200.0, seconds=50.0, base_share=0.2)
    found = list(conversations(traffic, 3))
    assert sum(len(each.turns) for each in found) == pytest.approx(200 * 50, rel=0.05)
    with_adapter = [each.adapter for each in found if each.adapter != BASE]
    assert len(with_adapter) == pytest.approx(0.8 * len(found), rel=0.03)
    share = 1 / sum(1 / rank for rank in range(1, 101))
    assert with_adapter.count(popular(traffic, 3)[0]) == pytest.approx(share * len(with_adapter), rel=0.1)
    assert found == list(conversations(traffic, 3))
    bursty = [each.begins for each in conversations(traffic._replace(burst=4.0), 3)]
    gaps = [later - earlier for earlier, later in itertools.pairwise(bursty)]
    assert statistics.pvariance(gaps) / statistics.fmean(gaps) ** 2 == pytest.approx(4.0, rel=0.15)


def test_goodput_counts_requests_that_met_both_goals_while_it_was_warm() -> None:
    outcome = simulated("random")
    warm, until = 5.0, 30.0
    goal = Goal(0.5, 0.05)
    found = figures(outcome, goal, warm, until)
    counted = [request for request in outcome.requests if warm <= request.arrived < until]
    assert (found.requests, found.offered) == (len(counted), len(counted) / 25)
    met = [
        each
        for each in counted
        if not each.refused
        and each.first - each.arrived <= 0.5
        and (each.answer == 1 or (each.ended - each.first) / (each.answer - 1) <= 0.05)
    ]
    assert 0 < len(met) < len(counted)
    assert found.goodput == pytest.approx(len(met) / 25)
    assert figures(outcome, Goal(1e9, 1e9), warm, until).met == pytest.approx(1 - found.refused / found.requests)


def test_a_table_of_costs_is_read_as_it_was_written_and_a_bad_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(cost_tables.as_fields(COSTS)))
    again = cost_tables.read(path)
    assert again.steps.table(300) == COSTS.steps.table(300)
    assert again._replace(steps=COSTS.steps, conditions=()) == COSTS
    path.write_text(json.dumps({"about": "nothing else"}))
    with pytest.raises(ValueError, match="'measured'"):
        cost_tables.read(path)
    with pytest.raises(ValueError, match="no table of costs"):
        cost_tables.read("nothing")
    for table in cost_tables.TABLES.glob("*.json"):
        assert ("ASSUMED" in cost_tables.read(table.stem).about) != cost_tables.read(table.stem).measured
