"""A whole engine on the Triton kernels, token for token against PEFT and against the reference kernels."""

import pytest

from runtime.gpu.triton_runner import TritonRunner
from runtime.messages import Generate, SamplingParams
from tests.runtime.adapters.peft_engine import INVOCATIONS, MODULES, PeftOracle, engines, forget
from tests.runtime.tiny_engine import adapter_tensors, prompt, run

RUNNING = 6
ALL = [None, *MODULES]
MIXED = [None, "attention", "linears", "plain", "head", "last_layer"]
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none"}


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    return PeftOracle(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def start(oracle):
    with engines(oracle) as start_any:

        def start(**options):
            """With all adapters on the device: else a request stops at its invocation, and none lies within a chunk."""
            defaults = {"kernels": "triton", "max_running": RUNNING, "max_batch_tokens": 64, "max_lora_rank": 16}
            engine = start_any(**defaults | options)
            for name in MODULES:
                engine.adapters.load(engine.digests[name], "device")
            while engine.adapters.wait(timeout=30):
                engine.step()
            return engine

        yield start


@pytest.fixture(scope="module")
def roomy(start):
    engine = start()
    assert isinstance(engine.runner, TritonRunner)
    return engine


@pytest.fixture
def engine(roomy):
    forget(roomy)
    return roomy


@pytest.fixture(scope="module")
def reference(start):
    return start(kernels="torch", device="cpu", prefix_cache=False)


def invoked(name, before, after, seed=0):
    """A prompt with an adapter's invocation in it, and a short one for who has none."""
    return [*prompt(before, seed), *(INVOCATIONS.get(name) or [40]), *prompt(after, seed + 100)]


def greedy(max_tokens):
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


def ask(engine, prompts, names, max_tokens=2, invocation_starts=None):
    digests = [engine.digests[name] for name in names]
    return [each.token_ids for each in engine.generate(prompts, greedy(max_tokens), digests, invocation_starts)]


def assert_peft(oracle, names, prompts, outputs, max_tokens=2):
    for name, tokens, output in zip(names, prompts, outputs, strict=True):
        assert len(output) == max_tokens
        assert oracle.agrees(name, tokens, output), f"{name} differs from PEFT"


@pytest.mark.parametrize("name", ALL)
def test_each_kind_of_adapter_alone_gives_pefts_tokens_cold_and_warm(engine, oracle, name):
    tokens = invoked(name, 17, 3)
    cold = ask(engine, [tokens], [name])
    assert_peft(oracle, [name], [tokens], cold)
    [warm] = engine.generate([tokens], greedy(2), engine.digests[name])
    assert warm.token_ids == cold[0]
    assert warm.cached_tokens == len(tokens) - 1


@pytest.mark.parametrize("budget", [RUNNING, 25, 256])
def test_base_lora_and_several_aloras_in_one_batch_give_each_its_own(start, oracle, budget):
    prompts = [invoked(name, 4 + index, index % 4, seed=index) for index, name in enumerate(MIXED)]
    assert_peft(oracle, MIXED, prompts, ask(start(max_batch_tokens=budget), prompts, MIXED))


@pytest.mark.parametrize("budget", [1, 2, 6, 7, 8])
def test_chunks_may_end_anywhere_around_the_invocation(start, oracle, budget):
    """Chunks of one token are decodes to the kernels, with or without an adapter, and most choose no token."""
    tokens = invoked("linears", 6, 2)
    engine = start(max_batch_tokens=budget, max_running=1, prefix_cache=False)
    assert_peft(oracle, ["linears"], [tokens], ask(engine, [tokens], ["linears"]))


def test_what_the_base_has_cached_up_to_an_invocation_is_gone_on_from(engine, oracle):
    tokens = invoked("linears", 21, 2)
    ask(engine, [tokens], [None])
    [completion] = engine.generate([tokens], greedy(2), engine.digests["linears"])
    assert completion.cached_tokens == 21
    assert_peft(oracle, ["linears"], [tokens], [completion.token_ids])


def test_an_explicit_invocation_is_where_the_adapter_begins_to_the_row(engine, oracle):
    """By the numbers: one row more or less changes few greedy tokens."""
    tokens, digest = prompt(18), engine.digests["linears"]
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True, logprobs=1)
    places = [0, 1, 16, 17, 18]
    completions = engine.generate([tokens] * len(places), params, digest, places)
    for place, completion in zip(places, completions, strict=True):
        expected = oracle.logits("linears", tokens, completion.token_ids, place).log_softmax(-1).max(-1).values
        got = [entry.logprob for entry in completion.logprobs]
        assert got == pytest.approx(expected.tolist(), abs=1e-4), f"activated at {place}"


def test_preempted_sequences_go_on_where_they_were(start, oracle):
    names = ["plain", "linears", None]
    tight = start(blocks=6, max_model_len=64)
    prompts = [invoked(name, 31 - len(INVOCATIONS.get(name) or [40]), 0, seed=7) for name in names]
    outputs = ask(tight, prompts, names, max_tokens=5)
    assert tight.scheduler.preemptions > 0
    assert_peft(oracle, names, prompts, outputs, max_tokens=5)


def test_without_adapters_no_kernel_of_theirs_is_launched(start, oracle):
    """Nor before an invocation. Any such launch would read the memory that is removed here."""
    engine = start(max_batch_tokens=16, max_running=3)
    engine.runner._memory = None
    prompts = [prompt(9, seed) for seed in range(3)]
    assert_peft(oracle, [None] * 3, prompts, ask(engine, prompts, [None] * 3))
    request = Generate(
        request_id="later",
        token_ids=prompt(40, 9),
        params=greedy(2),
        adapter=engine.digests["plain"],
        invocation_start=32,
    )
    engine.add_request(request)
    while engine.requests["later"].computed < 32:
        engine.step()
    with pytest.raises(AttributeError, match="NoneType"):
        engine.step()
    engine.abort("later")


# numpy, in the interpreter: the largest score of a row that is NaN throughout, too
@pytest.mark.filterwarnings("ignore:(overflow|invalid value|All-NaN slice) encountered:RuntimeWarning")
def test_an_adapter_that_overflows_fails_its_own_requests_and_poisons_nobody(start, oracle, reference):
    engine = start(blocks=9)
    overflowing = engine.add_adapter(adapter_tensors(scale=1e25), CONFIG)
    adapters = {"base": None, "broken": overflowing, "plain": engine.digests["plain"]}
    outputs = run(
        engine,
        *(
            Generate(request_id=name, token_ids=prompt(20), params=greedy(4), adapter=digest)
            for name, digest in adapters.items()
        ),
    )
    assert outputs["broken"] == ([], "non_finite_logits")
    for name in ("base", "plain"):
        assert outputs[name][1] == "length"
        assert oracle.agrees(None if name == "base" else name, prompt(20), outputs[name][0])
    again = [prompt(25, seed) for seed in range(1, 4)]  # in blocks that held NaN
    assert ask(engine, again, [None] * 3) == ask(reference, again, [None] * 3)
