"""Prefixes that are held: how many blocks, until when, and beside which requests."""

import pytest

from runtime.messages import Failed, Generate, HoldPrefix, PrefixEnded, PrefixHeld, SamplingParams
from runtime.request import RequestRefused
from tests.runtime.tiny_engine import ADAPTER_CONFIG, adapter_tensors, engines, prompt, run

ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)


@pytest.fixture
def start(tmp_path):
    with engines(tmp_path) as start:
        yield start


def hold(name, length, seed=0, **fields):
    return HoldPrefix(request_id=f"hold {name}", prefix_id=name, token_ids=prompt(length, seed), **fields)


def steps(engine):
    events = engine.step()
    while engine.busy:
        events += engine.step()
        engine.check()
    return events


def held(engine, *args, **fields):
    engine.hold_prefix(hold(*args, **fields))
    [event] = [event for event in steps(engine) if isinstance(event, PrefixHeld | Failed)]
    return event


def cached(engine, length, seed=0, **fields):
    """How many tokens of a prompt are found."""
    before = engine.tallies.cached_tokens
    run(engine, Generate(request_id="ask", token_ids=prompt(length, seed), params=ONE_TOKEN, **fields))
    return engine.tallies.cached_tokens - before


def flood(engine, seeds=range(100, 130)):
    """Prompts that no test uses, for more blocks than there are."""
    for seed in seeds:
        run(engine, Generate(request_id="flood", token_ids=prompt(60, seed), params=ONE_TOKEN))


def test_a_prefix_is_computed_and_found_to_its_last_token(start):
    engine = start()
    assert held(engine, "p", 37) == PrefixHeld(request_id="hold p", prefix_id="p", tokens=37, blocks=3, cached_tokens=0)
    assert (engine.stats().blocks_held, engine.stats().blocks_used) == (3, 3)
    assert cached(engine, 37) == 36
    assert cached(engine, 60) == 37
    engine.release_prefix("p")
    assert (engine.stats().blocks_held, engine.stats().blocks_used) == (0, 0)


def test_it_outlives_any_number_of_other_requests_until_it_is_released(start):
    engine = start(blocks=21)
    held(engine, "p", 37)
    flood(engine)
    assert cached(engine, 60) == 37
    engine.release_prefix("p")
    flood(engine)
    assert cached(engine, 60) < 37


def test_prefixes_share_a_beginning_and_say_what_was_computed_before(start):
    engine = start()
    held(engine, "p", 37)
    assert held(engine, "q", 50).cached_tokens == 37
    assert engine.stats().blocks_held == 2 + 1 + 2, "whole blocks are shared, a part of one is copied"
    engine.release_prefix("p")
    assert cached(engine, 50) == 49
    engine.release_prefix("q")


def test_prefixes_hold_at_most_half_of_the_blocks(start):
    engine = start(blocks=21)
    assert engine.prefixes.limit == 10
    held(engine, "a", 80)
    engine.hold_prefix(hold("b", 64, seed=1))
    with pytest.raises(RequestRefused, match="hold 10 and 9 are taken") as refused:
        engine.hold_prefix(hold("c", 32, seed=2))
    assert refused.value.code == "prefixes_full"
    steps(engine)
    engine.hold_prefix(hold("d", 16, seed=3))
    steps(engine)
    assert engine.stats().blocks_held == 10
    engine.release_prefix("a")
    engine.hold_prefix(hold("c", 80, seed=2))
    for name in "bcd":
        engine.release_prefix(name)
    steps(engine)


def test_prefixes_leave_what_the_longest_request_needs(start):
    engine = start(blocks=10)
    assert engine.prefixes.limit == 1
    held(engine, "p", 16)
    tokens, reason = run(engine, Generate(request_id="long", token_ids=prompt(127, 5), params=ONE_TOKEN))["long"]
    assert (len(tokens), reason) == (1, "length")
    engine.release_prefix("p")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"token_ids": [5] * 128}, "context_length_exceeded"),
        ({"token_ids": []}, "empty_prompt"),
        ({"prefix_id": "known"}, "duplicate_prefix"),
        ({"adapter": "unknown"}, "adapter_failed"),
        ({"invocation_start": 99}, "invalid_invocation_start"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_prefix_that_cannot_be_held_is_refused_and_leaves_nothing_behind(start, change, code):
    engine = start()
    held(engine, "known", 20)
    fields = {"request_id": "r", "prefix_id": "p", "token_ids": [5, 6]} | change
    with pytest.raises(RequestRefused) as refused:
        engine.hold_prefix(HoldPrefix(**fields))
    assert refused.value.code == code
    engine.check()
    assert not engine.busy
    engine.release_prefix("known")


def test_the_queue_is_bounded_for_prefixes_too_and_nothing_is_held_without_a_prefix_cache(start):
    engine = start(max_running=1, max_waiting=0)
    engine.hold_prefix(hold("a", 20))
    with pytest.raises(RequestRefused) as refused:
        engine.hold_prefix(hold("b", 20))
    assert refused.value.code == "queue_full"
    steps(engine)
    engine.release_prefix("a")
    with pytest.raises(RequestRefused) as refused:
        start(prefix_cache=False).hold_prefix(hold("a", 20))
    assert refused.value.code == "prefix_cache_off"


def test_an_abort_or_a_release_ends_one_that_is_still_computed(start):
    engine = start(max_batch_tokens=16, max_running=4)
    engine.hold_prefix(hold("a", 60))
    engine.hold_prefix(hold("b", 60))
    engine.step()
    engine.abort("hold a")
    engine.release_prefix("b")
    assert not engine.busy
    [failed] = engine.step()
    assert (failed.request_id, failed.code) == ("hold b", "prefix_released")
    engine.check()


def test_dropping_a_namespace_ends_the_prefixes_of_it_and_no_others(start):
    engine = start()
    one, two = (engine.add_adapter(adapter_tensors(seed), ADAPTER_CONFIG) for seed in range(2))
    held(engine, "base", 40)
    held(engine, "straddling", 40, adapter=one, invocation_start=20)
    held(engine, "plain", 40, adapter=two)
    engine.drop_namespace(one)
    assert engine.step() == [PrefixEnded(prefix_id="straddling", reason="dropped")]
    assert cached(engine, 40) == 39
    engine.drop_namespace(None)
    assert engine.step() == [PrefixEnded(prefix_id="base", reason="dropped")]
    assert (cached(engine, 40), cached(engine, 40, adapter=two)) == (0, 39)
    engine.retire_adapter(two)
    assert PrefixEnded(prefix_id="plain", reason="adapter_retired") in engine.step()
    assert engine.stats().blocks_held == 0


def test_what_is_dropped_while_it_is_computed_is_not_said_to_be_held(start):
    engine = start(max_batch_tokens=16, max_running=4)
    engine.hold_prefix(hold("p", 60))
    engine.step()
    engine.drop_namespace(None)
    [failed] = steps(engine)
    assert (failed.code, engine.stats().blocks_held) == ("prefix_dropped", 0)


def test_a_prefix_of_an_adapter_is_found_by_it_and_up_to_its_invocation_by_all(start):
    engine = start()
    digest = engine.add_adapter(adapter_tensors(), ADAPTER_CONFIG)
    held(engine, "p", 37, adapter=digest, invocation_start=21)
    assert cached(engine, 40, adapter=digest, invocation_start=21) == 37
    assert cached(engine, 40) == 21
    engine.release_prefix("p")


def test_stats_tell_whose_the_blocks_and_the_hits_are(start):
    engine = start()
    digest = engine.add_adapter(adapter_tensors(), ADAPTER_CONFIG)
    cached(engine, 40)
    cached(engine, 40, adapter=digest, invocation_start=35)
    held(engine, "p", 40, adapter=digest)
    stats = engine.stats().namespaces
    base, adapter = stats[""], stats[digest]
    assert (base.query_tokens, base.hit_tokens) == (40 + 35, 35)
    assert (adapter.query_tokens, adapter.hit_tokens) == (5 + 40, 0)
    assert (base.blocks_used, base.blocks_cached) == (0, 3)
    assert (adapter.blocks_used, adapter.blocks_cached) == (3, 1)
    assert engine.stats().blocks_cached == 4
    engine.retire_adapter(digest)
    assert set(engine.stats().namespaces) == {""}
