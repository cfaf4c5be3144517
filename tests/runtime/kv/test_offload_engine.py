"""An engine that offloads K/V to host memory: they are reloaded to the token, and for their own namespace."""

import pytest

from runtime.messages import Generate, SamplingParams
from tests.runtime.adapters.peft_engine import GREEDY, INVOCATIONS, PeftOracle, engines
from tests.runtime.tiny_engine import BLOCK_BYTES, prompt, run

ROOM = 100 * BLOCK_BYTES


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    return PeftOracle(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def start(oracle):
    with engines(oracle) as start:
        yield start


@pytest.fixture(scope="module")
def uncached(start):
    return start(prefix_cache=False)


@pytest.fixture
def engine(start):
    return start(blocks=9, host_kv_bytes=ROOM, max_batch_tokens=32, max_running=4)


def ask(engine, tokens, name=None, **options):
    [completion] = engine.generate([tokens], GREEDY, engine.digests[name], **options)
    engine.check()
    return completion


def overflow(engine, seed=100):
    """Use every block for something else, twice over."""
    for more in range(2):
        ask(engine, prompt(110, seed + more))


def invoked(tokens, name):
    return [*tokens, *INVOCATIONS[name]]


@pytest.mark.parametrize("length", [16, 17, 31, 32, 45])
@pytest.mark.parametrize("name", [None, "plain", "attention"])
def test_what_was_evicted_comes_back_to_the_last_token(engine, uncached, name, length):
    tokens = prompt(length) if name is None else invoked(prompt(length), "attention")
    invocation_start = [length if name == "attention" else 0]
    talk = [*tokens, *ask(engine, tokens, name).token_ids]
    overflow(engine)
    again = ask(engine, [*talk, 50], name, invocation_starts=invocation_start)
    assert again.cached_tokens == len(talk) - 1
    assert again.token_ids == ask(uncached, [*talk, 50], name, invocation_starts=invocation_start).token_ids
    assert engine.stats().host_kv.loads >= len(talk) // 16


def test_without_host_memory_it_does_not(start):
    engine = start(blocks=9)
    tokens = prompt(40)
    ask(engine, tokens)
    overflow(engine)
    assert ask(engine, tokens).cached_tokens < 39
    assert engine.stats().host_kv.bytes_total == 0


def test_namespaces_and_tenants_stay_apart_there(engine):
    def request(name, adapter=None, salt=""):
        params = SamplingParams(max_tokens=2, temperature=0.0)
        digest = engine.digests[adapter]
        invocation_start = 37 if adapter == "attention" else 0
        return Generate(
            request_id=name,
            token_ids=tokens,
            params=params,
            adapter=digest,
            invocation_start=invocation_start,
            cache_salt=salt,
        )

    tokens = invoked(prompt(37), "attention")
    run(engine, request("plain", "plain"))
    run(engine, request("tenant", salt="one"))
    overflow(engine)
    found = engine.tallies.cached_tokens
    for name, adapter, salt in (("a", None, ""), ("b", "attention", "two"), ("c", "plain", "one")):
        run(engine, request(name, adapter, salt))
        assert engine.tallies.cached_tokens == found, name
    run(engine, request("d", "attention", "one"))
    assert engine.tallies.cached_tokens == found + 37, "what the tenant's base computed, up to the invocation"
    run(engine, request("e", "plain"))
    assert engine.tallies.cached_tokens == found + 37 + len(tokens) - 1


def test_dropping_a_namespace_and_retiring_an_adapter_reach_it_there(engine):
    def blocks(name):
        share = engine.stats().namespaces.get(engine.digests[name] or "")
        return share.blocks_host if share else 0

    names = ("attention", "linears", "plain")
    tokens = {name: invoked(prompt(37), name if INVOCATIONS[name] else "attention") for name in names}
    for name in names:
        ask(engine, tokens[name], name)
    overflow(engine)
    assert all(map(blocks, names))
    engine.retire_adapter(engine.digests["attention"])
    assert not blocks("attention")
    assert blocks("linears")
    engine.drop_namespace(None)
    assert not blocks(None)
    assert not blocks("linears"), "they came after the base's"
    assert blocks("plain")
    assert ask(engine, tokens["linears"]).cached_tokens == 0
    assert ask(engine, tokens["plain"], "plain").cached_tokens == len(tokens["plain"]) - 1


def test_a_sequence_that_is_preempted_finds_its_kv_again(start, uncached):
    engine = start(blocks=13, host_kv_bytes=ROOM, max_running=4, max_batch_tokens=64)
    params = SamplingParams(max_tokens=70, temperature=0.0, ignore_eos=True)
    prompts = [prompt(40, seed) for seed in range(3)]
    outputs = engine.generate(prompts, params)
    assert engine.scheduler.preemptions > 0
    assert engine.stats().host_kv.loads > 0
    for tokens, output in zip(prompts, outputs, strict=True):
        assert output.token_ids == uncached.generate([tokens], params)[0].token_ids


def test_one_that_is_ended_while_its_kv_come_back_leaves_nothing_held(engine):
    tokens = prompt(40)
    ask(engine, tokens)
    overflow(engine)
    params = SamplingParams(max_tokens=2, temperature=0.0)
    engine.add_request(Generate(request_id="r", token_ids=tokens, params=params))
    engine.step()
    assert engine.offload.held, "its blocks are being reloaded"
    assert not engine.scheduler.running
    engine.abort("r")
    engine.check()
    while engine.offload.held:
        engine.wait(timeout=1.0)
        engine.step()
    assert engine.blocks.used == 0
    assert ask(engine, tokens).cached_tokens == 39, "they have come all the same"


def test_two_that_want_the_same_wait_for_the_same_blocks(engine):
    tokens = prompt(40)
    ask(engine, tokens)
    overflow(engine)
    params = SamplingParams(max_tokens=2, temperature=0.0)
    loads = engine.stats().host_kv.loads
    outputs = engine.generate([tokens, tokens, [*tokens[:33], 50]], params)
    assert [output.cached_tokens for output in outputs] == [39, 39, 33]
    assert engine.stats().host_kv.loads == loads + 3


def test_host_memory_keeps_no_more_than_it_may(start):
    engine = start(blocks=9, host_kv_bytes=5 * BLOCK_BYTES + 1)
    for seed in range(6):
        ask(engine, prompt(60, seed))
    kept = engine.stats().host_kv
    assert (kept.bytes_total, kept.bytes_used, kept.blocks) == (5 * BLOCK_BYTES, 5 * BLOCK_BYTES, 5)
    assert kept.stores - kept.loads - kept.evictions == 5


def test_a_step_that_fails_leaves_what_is_on_its_way(engine):
    tokens = prompt(40)
    ask(engine, tokens)
    overflow(engine)
    engine.add_request(Generate(request_id="r", token_ids=tokens, params=GREEDY))
    engine.step()
    assert [failed.request_id for failed in engine.fail_all("engine_error", "it broke")] == ["r"]
    while engine.offload.held:
        engine.wait(timeout=1.0)
        engine.step()
    assert ask(engine, tokens).cached_tokens == 39
