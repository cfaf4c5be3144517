"""K/V are reused to the last token, by every request that may (rules by number: test_block_keys.py)."""

import pytest

from runtime.messages import Generate, SamplingParams
from tests.runtime.adapters.peft_engine import GREEDY, INVOCATIONS, MODULES, PeftOracle, engines, forget
from tests.runtime.tiny_engine import prompt, run


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    return PeftOracle(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def start(oracle):
    with engines(oracle) as start:
        yield start


@pytest.fixture(scope="module")
def roomy(start):
    return start()


@pytest.fixture
def engine(roomy):
    forget(roomy)
    return roomy


@pytest.fixture(scope="module")
def uncached(start):
    return start(prefix_cache=False)


def ask(engine, tokens, name=None, **options):
    [completion] = engine.generate([tokens], GREEDY, engine.digests[name], **options)
    return completion


def invoked(tokens, name):
    return [*tokens, *INVOCATIONS[name]]


def conversation(engine, length, seed=0, name=None):
    """A prompt and the answer to it, whose last token has no K/V yet."""
    tokens = prompt(length, seed)
    return tokens + ask(engine, tokens, name).token_ids


@pytest.mark.parametrize("length", range(20, 37))
def test_rule_6_an_alora_reuses_a_base_conversation_to_its_last_computed_token(engine, uncached, oracle, length):
    talk = conversation(engine, length)
    for name in ("attention", "linears"):
        check = ask(engine, invoked(talk, name), name)
        assert check.cached_tokens == len(talk) - (name == "attention"), "the first check computes the last token's"
        assert check.token_ids == ask(uncached, invoked(talk, name), name).token_ids
        assert oracle.agrees(name, invoked(talk, name), check.token_ids)


@pytest.mark.parametrize("length", range(20, 37))
def test_rule_8_the_base_and_other_adapters_reuse_what_an_alora_computed_before_its_invocation(
    engine, uncached, oracle, length
):
    talk = prompt(length)
    ask(engine, invoked(talk, "attention"), "attention")
    for name in (None, "linears"):
        tokens = [*talk, 50, 51] if name is None else invoked(talk, name)
        got = ask(engine, tokens, name)
        assert got.cached_tokens == length
        assert got.token_ids == ask(uncached, tokens, name).token_ids
        assert oracle.agrees(name, tokens, got.token_ids)
    base = ask(engine, invoked(talk, "attention"))
    assert base.cached_tokens == length, "adapted invocation tokens are not the base's"


def test_a_later_turn_moves_the_invocation_and_finds_the_conversation_before_it(engine, uncached):
    talk = conversation(engine, 30)
    first = ask(engine, invoked(talk, "attention"), "attention")
    later = [*invoked(talk, "attention"), *first.token_ids, 60, 61, *INVOCATIONS["attention"]]
    second = ask(engine, later, "attention")
    assert second.cached_tokens == len(talk), "the earlier invocation and its output are the base's now"
    assert second.token_ids == ask(uncached, later, "attention").token_ids


def test_the_same_request_again_reuses_all_but_its_last_token(engine, uncached):
    for name in (None, "plain", "attention"):
        tokens = prompt(37) if name is None else invoked(prompt(37), "attention")
        cold = ask(engine, tokens, name)
        warm = ask(engine, tokens, name)
        assert warm.cached_tokens == len(tokens) - 1
        assert warm.token_ids == cold.token_ids == ask(uncached, tokens, name).token_ids


@pytest.mark.parametrize("name", [None, "plain"])
def test_each_turn_of_a_chat_finds_all_that_was_computed_of_the_turns_before(engine, uncached, name):
    talk, computed = prompt(13), 0
    for turn in range(5):
        answer = ask(engine, talk, name)
        assert answer.token_ids == ask(uncached, talk, name).token_ids
        assert answer.cached_tokens == computed
        computed = len(talk) + len(answer.token_ids) - 1
        talk = [*talk, *answer.token_ids, *prompt(5, seed=turn)]


def test_rule_3_two_invocations_of_one_adapter_share_what_is_before_both(engine, uncached):
    tokens = prompt(60)
    ask(engine, tokens, "linears", invocation_starts=[37])
    for invocation_start, found in ((37, 59), (41, 37), (35, 35), (60, 41)):
        got = ask(engine, tokens, "linears", invocation_starts=[invocation_start])
        assert got.cached_tokens == found
        assert got.token_ids == ask(uncached, tokens, "linears", invocation_starts=[invocation_start]).token_ids


def test_rule_3_adapters_that_begin_at_one_token_share_what_is_before_it(engine, uncached):
    """As where the invocation is the assistant's own header: only the namespace tells their K/V apart."""
    tokens = prompt(60)
    names = ("attention", "linears", None)
    for name, found in zip(names, (0, 37, 37), strict=True):
        got = ask(engine, tokens, name, invocation_starts=[37])
        assert got.cached_tokens == found
        assert got.token_ids == ask(uncached, tokens, name, invocation_starts=[37]).token_ids
    assert [ask(engine, tokens, name, invocation_starts=[37]).cached_tokens for name in names] == [59] * 3


def test_rule_4_plain_adapters_and_the_base_share_nothing(engine):
    tokens = invoked(prompt(37), "attention")
    ask(engine, tokens, "plain")
    for name in (None, "attention"):
        assert ask(engine, tokens, name).cached_tokens == 0
        forget_all_but(engine, "plain")


def forget_all_but(engine, name):
    for other, digest in engine.digests.items():
        if other != name:
            engine.drop_namespace(digest)


def test_rule_5_tenants_share_nothing_before_the_invocation_either(engine):
    def request(name, salt, adapter=None):
        tokens = invoked(prompt(37), "attention")
        invocation_start = 37 if adapter else 0
        params = SamplingParams(max_tokens=2, temperature=0.0)
        digest = engine.digests[adapter]
        return Generate(
            request_id=name,
            token_ids=tokens,
            params=params,
            adapter=digest,
            invocation_start=invocation_start,
            cache_salt=salt,
        )

    run(engine, request("a", "one"))
    found = engine.tallies.cached_tokens
    run(engine, request("b", "two", "attention"))
    run(engine, request("c", ""))
    assert engine.tallies.cached_tokens == found
    run(engine, request("d", "two"))
    assert engine.tallies.cached_tokens == found + 37


def test_rule_7_a_full_hit_computes_the_last_token_under_the_weights_of_its_position(engine, oracle):
    tokens = [*prompt(31), *INVOCATIONS["head"]]  # two whole blocks, and the adapter begins with the last token
    cold = ask(engine, tokens, "head")
    base = ask(engine, tokens)
    warm = ask(engine, tokens, "head")
    assert (base.cached_tokens, warm.cached_tokens) == (31, 31)
    assert oracle.agrees("head", tokens, warm.token_ids)
    assert oracle.agrees(None, tokens, base.token_ids)
    assert warm.token_ids == cold.token_ids != base.token_ids


def test_rule_11_retiring_an_adapter_drops_its_own_blocks_only(start, oracle):
    engine = start()
    talk = conversation(engine, 30)
    for name in ("attention", "linears"):
        ask(engine, invoked(talk, name), name)
    engine.retire_adapter(engine.digests["attention"])
    assert ask(engine, [*talk, 50]).cached_tokens == len(talk)
    assert ask(engine, invoked(talk, "linears"), "linears").cached_tokens == len(talk) + 2
    engine.digests["attention"] = engine.add_adapter(*oracle.adapter("attention"))
    assert ask(engine, invoked(talk, "attention"), "attention").cached_tokens == len(talk)


def test_rule_11_what_runs_on_an_adapter_while_it_is_retired_leaves_nothing_behind(start, oracle):
    engine = start()
    digest = engine.digests["attention"]
    ask(engine, [*INVOCATIONS["attention"], 50], "attention")  # it is resident from here on
    tokens = invoked(prompt(20), "attention")
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    engine.add_request(Generate(request_id="r", token_ids=tokens, params=params, adapter=digest, invocation_start=20))
    engine.step()
    assert engine.requests["r"].num_generated > 0
    engine.retire_adapter(digest)
    assert run(engine)["r"][1] == "length"
    assert digest not in engine.stats().namespaces
    assert engine.add_adapter(*oracle.adapter("attention")) == digest
    assert ask(engine, tokens, "attention").cached_tokens == 16, "the block that straddles was the adapter's"


def test_adapters_that_leave_k_and_v_alone_share_with_the_base_and_still_apply(engine, oracle):
    talk = conversation(engine, 30)
    got = ask(engine, [*talk, 50], "last_layer")
    assert got.cached_tokens == len(talk) - 1
    assert oracle.agrees("last_layer", [*talk, 50], got.token_ids)
    base = ask(engine, [*talk, 50, *got.token_ids])
    assert base.cached_tokens == len(talk) + len(got.token_ids), "what the adapter generated is the base's K/V too"


@pytest.mark.parametrize("name", MODULES)
def test_warm_equals_cold_for_every_adapter_at_every_length(engine, uncached, name):
    for length in range(14, 35, 3):
        base = conversation(engine, length, seed=length)
        tokens = invoked(base, name if INVOCATIONS[name] else "attention")
        assert ask(engine, tokens, name).token_ids == ask(uncached, tokens, name).token_ids


@pytest.mark.parametrize(("budget", "found"), [(64, 32), (100, 32), (256, 0)])
def test_an_adapter_that_breaks_reaches_no_kv_that_the_base_shares(start, uncached, oracle, budget, found):
    """Its own tokens share a chunk with the base's before them, which sees them under a mask only."""
    engine = start(max_batch_tokens=budget)
    tensors, config = oracle.adapter("linears")
    broken = engine.add_adapter({name: tensor * 1e18 for name, tensor in tensors.items()}, config)
    engine.adapters.load(broken, "device")
    while not engine.adapters.device.holds(broken):
        engine.wait(timeout=1.0)
        engine.step()
    talk = prompt(70)
    params = SamplingParams(max_tokens=2, temperature=0.0)
    request = Generate(
        request_id="r", token_ids=[*talk, *prompt(50, 1)], params=params, adapter=broken, invocation_start=37
    )
    assert run(engine, request)["r"] == ([], "non_finite_logits")
    after = ask(engine, talk)
    assert after.cached_tokens == found, "the block that straddles was the adapter's, and what fails leaves nothing"
    assert after.token_ids == ask(uncached, talk).token_ids
