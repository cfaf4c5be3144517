"""Rates and requests at one time: a key's own, and told with the time to come again."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.errors import RequestError
from service.keys.limits import KeyUsage, Limits
from service.keys.metrics import MAX_KEYS, KeyMetrics
from tests.service.keys.keyed_server import Keyed, keyed_server, refusal
from tests.service.live_server import wait_until

MINUTE = 60.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def refused(usage: KeyUsage, clock: Clock) -> tuple[str, int | None] | None:
    """What a request is refused with, and when it may come again; None for one that is let in."""
    try:
        usage.require_tokens()
        usage.enter()
    except RequestError as error:
        return error.code, error.retry_seconds
    return None


def test_requests_come_at_their_rate_after_a_minutes_worth(clock: Clock) -> None:
    usage = KeyUsage(Limits(requests_per_minute=30), clock)
    assert [refused(usage, clock) for _ in range(31)] == [None] * 30 + [("requests_per_minute_exceeded", 2)]
    clock.now += 2
    assert [refused(usage, clock) for _ in range(2)] == [None, ("requests_per_minute_exceeded", 2)]
    clock.now += 10 * MINUTE
    assert [refused(usage, clock) for _ in range(31)].count(None) == 30


def test_tokens_beyond_the_rate_are_made_up_for(clock: Clock) -> None:
    usage = KeyUsage(Limits(tokens_per_minute=600), clock)
    usage.spend(1000)  # 400 more than there were
    assert refused(usage, clock) == ("tokens_per_minute_exceeded", 41)
    clock.now += 40
    assert refused(usage, clock) == ("tokens_per_minute_exceeded", 1)
    clock.now += 0.2
    assert refused(usage, clock) is None


def test_over_any_time_a_key_gets_its_rate_and_no_more(clock: Clock) -> None:
    """However it asks: each request of 250 tokens, as soon as it is let in, for an hour."""
    usage, begun = KeyUsage(Limits(tokens_per_minute=100), clock), clock.now
    while clock.now < begun + 60 * MINUTE:
        if (found := refused(usage, clock)) is None:
            usage.spend(250)
        else:
            assert found[1] is not None
            clock.now += found[1]
    assert 100 * 60 <= usage.tokens <= 100 * 61 + 250


def test_requests_at_one_time_are_those_that_have_not_ended(clock: Clock) -> None:
    usage = KeyUsage(Limits(concurrent_requests=2), clock)
    assert [refused(usage, clock) for _ in range(3)] == [None, None, ("concurrent_requests_exceeded", None)]
    usage.leave(200)
    assert (refused(usage, clock), usage.in_flight) == (None, 2)


def test_other_limits_hold_at_once_and_what_was_used_still_counts(clock: Clock) -> None:
    usage = KeyUsage(Limits(requests_per_minute=2), clock)
    assert [refused(usage, clock) for _ in range(2)] == [None, None]
    usage.limit(Limits(requests_per_minute=60))
    assert refused(usage, clock) == ("requests_per_minute_exceeded", 1)
    clock.now += 1
    assert refused(usage, clock) is None
    usage.limit(Limits())
    assert [refused(usage, clock) for _ in range(1000)] == [None] * 1000


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    keys = {
        "few-requests": {"requests_per_minute": 3},
        "few-tokens": {"tokens_per_minute": 20},
        "few-prefixes": {"tokens_per_minute": 20},
        "few-at-once": {"concurrent_requests": 1},
        "free": {"scopes": ["generate", "admin"]},
    }
    with keyed_server(tiny_model, tmp_path_factory.mktemp("keyed"), keys, share_cache_between_keys=True) as keyed:
        yield keyed


def test_a_key_beyond_its_requests_is_told_when_to_come_again(server: Keyed) -> None:
    answers = [server["few-requests"].get("/v1/models") for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert refusal(answers[-1]) == (429, "requests_per_minute_exceeded")
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 20
    assert answers[-1].json()["error"]["type"] == "rate_limit_error"
    assert server["free"].get("/v1/models").status_code == 200


def test_tokens_of_prompts_and_answers_count_also_of_streams(server: Keyed) -> None:
    client = server["few-tokens"]
    assert client.complete([5] * 8, max_tokens=4).status_code == 200
    assert client.complete([5] * 4, max_tokens=8, stream=True, n=2).status_code == 200
    answer = client.complete([5])
    assert refusal(answer) == (429, "tokens_per_minute_exceeded")
    assert "20 tokens a minute" in answer.json()["error"]["message"]
    waits = (8 + 4 + 4 + 16 - 20 + 1) * MINUTE / 20
    assert waits - 20 < int(answer.headers["retry-after"]) <= waits
    assert client.get("/v1/models").status_code == 200
    text = server["free"].get("/metrics").text
    assert re.search(r'^rootstock_key_tokens_total\{key="few-tokens"\} 32.0$', text, re.M)
    assert re.search(r'^rootstock_key_requests_total\{key="few-tokens",status="429"\} 1.0$', text, re.M)


def test_tokens_of_prefixes_count_as_well(server: Keyed) -> None:
    asked = {"model": "tiny", "prompt": [5] * 40, "pin": False}
    answers = [server["few-prefixes"].post("/kv/prefixes", json=asked) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 429]


def test_a_stream_is_under_way_until_its_client_has_gone(server: Keyed) -> None:
    client = server["few-at-once"]
    asked = {"model": "tiny", "prompt": "hello", "max_tokens": 50, "stream": True, "cache_salt": "hold"}
    with client.stream("POST", "/v1/completions", json=asked) as held:
        lines = held.iter_lines()  # a stream whose lines nobody reads any more is closed
        assert next(lines).startswith("data: ")
        answer = client.complete()
        assert refusal(answer) == (429, "concurrent_requests_exceeded")
        assert answer.headers["retry-after"] == "1"
    wait_until(lambda: client.complete().status_code == 200)
    assert json.loads(client.complete().content)["usage"]["completion_tokens"] == 3


def test_keys_with_series_of_their_own_are_bounded_and_nothing_is_left_out() -> None:
    usage = {f"key-{number}": KeyUsage() for number in range(MAX_KEYS + 50)}
    for each in usage.values():
        each.enter()
        each.leave(200)
        each.spend(7)
    shown = {metric.name: metric.samples for metric in KeyMetrics(usage, KeyUsage(), {"key-0": (5, 3)}).collect()}
    answers, tokens = shown["rootstock_key_requests"], shown["rootstock_key_tokens"]
    assert len(answers) == len(tokens) == MAX_KEYS + 1
    assert (sum(each.value for each in answers), sum(each.value for each in tokens)) == (150, 150 * 7)
    assert [each.value for each in tokens if each.labels == {"key": "_others"}] == [50 * 7]
    assert [shown[f"rootstock_key_{what}_bytes"][0].value for what in ("disk", "pinned")] == [5, 3]
