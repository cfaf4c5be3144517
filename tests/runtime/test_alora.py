"""aLoRA token for token against PEFT, in fp32: wherever the invocation stands, in any batch and any chunks."""

import pytest

from runtime.messages import SamplingParams
from runtime.request import RequestRefused
from tests.runtime.adapters.peft_engine import GREEDY, INVOCATIONS, TOKENS, PeftOracle, engines, forget
from tests.runtime.tiny_engine import prompt

A, L = INVOCATIONS["attention"], INVOCATIONS["linears"]
ALORAS = ("attention", "linears", "head")


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    return PeftOracle(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def start(oracle):
    with engines(oracle) as start:
        yield start


@pytest.fixture(scope="module")
def roomy(start):
    """An engine with room for everything, for tests that forget what it has cached."""
    return start()


@pytest.fixture
def engine(roomy):
    forget(roomy)
    return roomy


def invoked(name, before, after, seed=0):
    """A prompt with the invocation of an adapter after `before` tokens, and `after` tokens after it."""
    text = [token + 20 for token in prompt(before + after, seed) if token < 280]
    text += [99] * (before + after - len(text))
    return [*text[:before], *INVOCATIONS[name], *text[before:]]


def outputs(engine, prompts, names, **options):
    completions = engine.generate(prompts, GREEDY, [engine.digests[name] for name in names], **options)
    return [completion.token_ids for completion in completions]


def assert_peft(oracle, names, prompts, got):
    for name, tokens, output in zip(names, prompts, got, strict=True):
        assert len(output) == TOKENS
        assert oracle.agrees(name, tokens, output), f"{name} differs from PEFT"


@pytest.mark.parametrize("name", ALORAS)
def test_each_place_of_the_invocation_gives_pefts_output(engine, oracle, name):
    places = [(0, 20), (0, 0), (20, 0), (37, 3), *((16 + offset, 9) for offset in range(16))]
    prompts = [invoked(name, *place, seed=index) for index, place in enumerate(places)]
    alone = [outputs(engine, [each], [name])[0] for each in prompts]
    assert_peft(oracle, [name] * len(prompts), prompts, alone)
    base = outputs(engine, prompts, [None] * len(prompts))
    assert sum(one != other for one, other in zip(base, alone, strict=True)) > len(prompts) / 2, "it changes something"
    forget(engine)
    assert outputs(engine, prompts, [name] * len(prompts)) == alone


PLACES = {
    "several times": [*A, 50, 51, *A, *range(60, 80), *A, 52],
    "partial at the end": [50, *A, *range(60, 80), 7, 8],
    "partial before": [7, 8, 7, 8, 9, *range(60, 80)],
}


@pytest.mark.parametrize("tokens", PLACES.values(), ids=PLACES.keys())
def test_the_last_full_match_counts(engine, oracle, tokens):
    assert_peft(oracle, ["attention"], [tokens], outputs(engine, [tokens], ["attention"]))


def test_matches_may_overlap(engine, oracle):
    tokens = [*range(60, 75), 11, 12, 11, 12, 11, 50]
    got = outputs(engine, [tokens], ["linears"])
    assert_peft(oracle, ["linears"], [tokens], got)
    assert got == outputs(engine, [tokens], ["linears"], invocation_starts=[17])


def test_without_its_invocation_a_request_is_refused_and_told_what_is_missing(engine):
    for tokens in ([7, 8], [50, 51], [7, 8, 50, 9]):
        with pytest.raises(RequestRefused, match=r"\[7, 8, 9\]") as refused:
            outputs(engine, [tokens], ["attention"])
        assert refused.value.code == "alora_invocation_missing"
    assert not engine.busy


def test_an_explicit_invocation_is_where_the_adapter_begins(engine, oracle):
    tokens = prompt(30)
    for invocation_start in (0, 1, 15, 16, 17, 29):
        [output] = outputs(engine, [tokens], ["linears"], invocation_starts=[invocation_start])
        assert oracle.agrees("linears", tokens, output, invocation_start)
    [after] = outputs(engine, [tokens], ["linears"], invocation_starts=[30])
    assert after[0] == outputs(engine, [tokens], [None])[0][0], "the prompt is all the base's"
    assert oracle.agrees("linears", tokens, after, 30)
    for wrong in (-1, 31):
        with pytest.raises(RequestRefused) as refused:
            outputs(engine, [tokens], ["linears"], invocation_starts=[wrong])
        assert refused.value.code == "invalid_invocation_start"


NAMES = [None, "attention", "linears", "plain", "head", "attention", None, "linears", "last_layer", "head"]


def mixed(names):
    return [
        invoked(name if INVOCATIONS.get(name) else "attention", 11 + 3 * index, index % 4, seed=index)
        for index, name in enumerate(names)
    ]


@pytest.mark.parametrize("budget", [11, 64, 512])
def test_rule_9_base_lora_and_several_aloras_in_one_batch_give_each_its_own(start, oracle, budget):
    engine = start(max_batch_tokens=budget, max_running=len(NAMES))
    prompts = mixed(NAMES)
    cold = outputs(engine, prompts, NAMES)
    assert_peft(oracle, NAMES, prompts, cold)
    assert outputs(engine, prompts, NAMES) == cold


@pytest.mark.parametrize("name", ["attention", "linears"])
def test_rule_9_chunks_may_end_anywhere_around_the_invocation(start, oracle, name):
    tokens = invoked(name, 21, 7)
    expected = None
    for budget in [1, 2, 3, 5, 10, *range(18, 28)]:
        [output] = outputs(start(max_batch_tokens=budget, max_running=1, prefix_cache=False), [tokens], [name])
        expected = expected or output
        assert output == expected, f"in chunks of {budget}"
    assert oracle.agrees(name, tokens, expected)


@pytest.mark.parametrize("prefix_cache", [True, False], ids=["found again", "recomputed"])
@pytest.mark.parametrize("names", [ALORAS * 3, NAMES], ids=["aloras", "mixed"])
def test_preempted_sequences_keep_their_invocation(start, oracle, names, prefix_cache):
    tight = start(blocks=14, prefix_cache=prefix_cache)
    params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    prompts, digests = mixed(names), [tight.digests[name] for name in names]
    got = [completion.token_ids for completion in tight.generate(prompts, params, digests)]
    assert tight.scheduler.preemptions > 0
    for name, tokens, output in zip(names, prompts, got, strict=True):
        assert len(output) == 30
        assert oracle.agrees(name, tokens, output)


def test_n_choices_of_one_prompt_are_drawn_as_each_would_be_alone(start):
    tokens = invoked("linears", 21, 4)
    engine, other = start(), start(prefix_cache=False)

    def params(choice):
        return SamplingParams(max_tokens=TOKENS, temperature=1.0, seed=3, choice=choice, ignore_eos=True)

    together = engine.generate([tokens] * 4, [params(choice) for choice in range(4)], engine.digests["linears"])
    alone = [other.generate([tokens], params(choice), other.digests["linears"])[0] for choice in range(4)]
    assert [each.token_ids for each in together] == [each.token_ids for each in alone]
    assert len({tuple(each.token_ids) for each in together}) > 1


def test_a_generated_invocation_moves_nothing(engine, oracle):
    """The last invocation of the prompt counts; here the output contains the invocation too."""
    tensors, config = oracle.adapter("head")
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    for seed in range(20):
        tokens = prompt(12, seed)
        [probe] = engine.generate([tokens], params, engine.digests["head"], [8])
        said = max(set(probe.token_ids), key=probe.token_ids.count)
        tokens[8] = said
        digest = engine.add_adapter(tensors, config | {"alora_invocation_tokens": [said]})
        if said in tokens[9:]:
            continue
        [completion] = engine.generate([tokens], params, digest)
        assert oracle.agrees("head", tokens, completion.token_ids, invocation_start=8)
        if said in completion.token_ids[:-5]:
            return
    pytest.fail("no output had the invocation in it")
