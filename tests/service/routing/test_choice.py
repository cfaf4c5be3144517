"""Which server a request goes to."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest

from service.routing.choice import QUEUE_SECONDS, SPREAD, Server, Wanted, ranked
from service.routing.wanted import wanted_of

POET = Wanted(("poet",))


def order(wanted: Wanted, *servers: Server) -> str:
    return "".join(server.id for server in ranked(wanted, servers))


def test_memory_on_the_device_comes_before_the_host_and_that_before_nothing() -> None:
    far, host, device = (
        Server("a", places=8),
        Server("b", places=8, adapters={"poet": "host"}),
        Server("c", places=8, adapters={"poet": "device", "other": "device"}),
    )
    assert order(POET, far, host, device) == "cba"
    assert order(POET, far, host, device._replace(in_flight=1)) == "cba", "a little more work is no reason to load"
    assert order(Wanted(("poet@12345678", "poet")), far, host, device) == "cba"


def test_a_server_that_is_not_ready_comes_last_and_counts_for_no_load() -> None:
    restarting = Server("a", ready=False, places=8, adapters={"poet": "device"})
    assert order(POET, restarting, Server("b", places=8, in_flight=7)) == "ba"
    assert [server.id for server in ranked(POET, [restarting])] == ["a"], "better than none"


@pytest.mark.parametrize(
    "crowded", [{"in_flight": 2}, {"in_flight": 8}, {"queue_seconds": QUEUE_SECONDS * 2}, {"in_flight": 9}]
)
def test_a_hot_adapter_gets_another_home_when_its_own_is_crowded(crowded: dict[str, float]) -> None:
    home = Server("a", places=8, adapters={"poet": "device"}, **crowded)
    assert order(POET, home, Server("b", places=8, adapters={"poet": "host"}), Server("c", places=8)) == "bca"


def test_a_hot_adapter_spreads_over_all_servers_and_a_cold_one_stays() -> None:
    """A burst that lasts: each request goes to the first choice, which then holds the adapter."""
    servers = {name: Server(name, places=16) for name in "abcd"}
    for _ in range(48):
        first = ranked(POET, list(servers.values()))[0]
        servers[first.id] = first._replace(in_flight=first.in_flight + 1, adapters={"poet": "device"})
    spread = Counter({name: server.in_flight for name, server in servers.items()})
    assert sum(spread.values()) == 48
    assert max(spread.values()) - min(spread.values()) <= 4, spread
    for name in servers:
        servers[name] = servers[name]._replace(in_flight=0)
    chosen = {ranked(POET, list(servers.values()))[0].id for _ in range(10)}
    assert len(chosen) == 1


def test_where_all_but_one_are_crowded_the_shortest_queue_comes_first() -> None:
    home = Server("a", places=4, in_flight=9, queue_seconds=3.0, adapters={"poet": "device"})
    other = Server("b", places=4, in_flight=7, queue_seconds=2.0)
    assert order(POET, home, other) == "ba"
    assert order(POET, home, other._replace(queue_seconds=3.0, in_flight=9)) == "ab"


CASES = json.loads((Path(__file__).parents[2] / "loadtests" / "routing_cases.json").read_text())


@pytest.mark.parametrize("case", CASES["cases"], ids=lambda case: case["name"])
def test_the_rule_is_that_of_the_simulation(case: dict[str, Any]) -> None:
    """Whose figures chose its constants; `tests/loadtests/test_simulation.py` has the same table."""
    assert (CASES["spread"], CASES["queue_seconds"]) == (SPREAD, QUEUE_SECONDS)
    wanted = Wanted((CASES["adapter"],) if case["adapter"] else (), tuple(CASES["heads"]))
    servers = [
        Server(
            id=each["id"],
            places=64,
            in_flight=each.get("in_flight", 0),
            queue_seconds=each.get("queue_seconds", 0.0),
            adapters={CASES["adapter"]: each["holds"]} if "holds" in each else {},
            heads=CASES["heads"][: each.get("cached", 0)],
        )
        for each in case["servers"]
    ]
    assert ranked(wanted, servers)[0].id == case.get("relatively", case["chosen"])


def test_names_without_a_home_get_one_each_that_only_few_lose_when_a_server_comes() -> None:
    servers = [Server(name, places=8) for name in "abcd"]
    names = [f"adapter-{number}" for number in range(400)]
    homes = {name: ranked(Wanted((name,)), servers)[0].id for name in names}
    counts = Counter(homes.values())
    assert all(60 <= counts[server] <= 140 for server in "abcd"), counts
    more = {name: ranked(Wanted((name,)), [*servers, Server("e", places=8)])[0].id for name in names}
    moved = [name for name in names if more[name] != homes[name]]
    assert all(more[name] == "e" for name in moved)
    assert 40 <= len(moved) <= 130, "about a fifth"


def test_a_conversation_stays_and_goes_back_to_the_longest_part_of_it_that_is_cached() -> None:
    def said(*texts: str) -> Wanted:
        messages = [{"role": "user", "content": text} for text in texts]
        return wanted_of(
            "/v1/chat/completions", {}, msgspec.json.encode({"messages": messages, "model": "tiny"}), "tiny"
        )

    servers = [Server(name, places=8) for name in "abcd"]
    homes = {ranked(said("system", f"question {number}"), servers)[0].id for number in range(40)}
    assert homes == set("abcd"), "conversations with one system prompt spread"
    first, later = said("system", "one"), said("system", "one", "two", "three")
    assert ranked(first, servers)[0].id == ranked(later, servers)[0].id
    short, long = Server("a", places=8, heads={later.heads[1]}), Server("b", places=8, heads={later.heads[2]})
    assert order(later, Server("c", places=8), short, long)[:2] == "ba"
    assert order(later, Server("c", places=8), short, long._replace(in_flight=2))[0] == "a", "within the same load only"


def test_what_a_request_asks_for_is_read_from_where_clients_write_it() -> None:
    def of(path: str = "/v1/completions", headers: dict[str, str] | None = None, **body: object) -> tuple[str, ...]:
        return wanted_of(path, headers or {}, msgspec.json.encode(body), "tiny").adapters

    assert of(model="poet") == ("poet",)
    assert of(model="tiny:poet") == ("poet",)
    assert of(model="poet@0123abcd") == ("poet@0123abcd", "poet")
    assert of(model="tiny", lora_path=[None, "poet"]) == ("poet",)
    assert of(model="tiny", adapter_id="poet") == ("poet",)
    assert of(model="tiny", adapters={"poet": 1.0, "other": 0.5}) == ("poet",)
    assert of("/invocations", {"x-amzn-sagemaker-adapter-identifier": "poet"}, inputs="hello") == ("poet",)
    assert of("/v1/load_lora_adapter", lora_name="poet", lora_path="/x") == ("poet",)
    assert of(model="tiny") == of() == ()
    assert wanted_of("/adapters/org/poet/load", {}, b"{}", "tiny").adapters == ("org/poet",)
    for body in (b"", b"no json", b"[1]", b'{"model": 5}', b"[" * 100_000):
        assert wanted_of("/v1/completions", {}, body, "tiny") == Wanted()
