"""An engine on the Triton kernels samples as one on the CPU path does, for all parameters."""

import pytest

from runtime.messages import Generate, SamplingParams
from tests.runtime.adapters.peft_engine import PeftOracle, engines
from tests.runtime.tiny_engine import prompt


@pytest.fixture(scope="module")
def engines_of_both(tmp_path_factory):
    """An engine on the Triton kernels, and one on the reference kernels."""
    options = {"max_running": len(SAMPLING), "max_batch_tokens": 128, "max_lora_rank": 16}
    with engines(PeftOracle(tmp_path_factory.mktemp("model"))) as start:
        yield start(kernels="triton", **options), start(kernels="torch", device="cpu", **options)


SAMPLING = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 1.0, "seed": 1},
    "another choice": {"temperature": 1.0, "seed": 1, "choice": 1},
    "hot": {"temperature": 3.0, "seed": 2},
    "top_k": {"temperature": 2.0, "seed": 3, "top_k": 4},
    "top_k beyond the vocabulary": {"temperature": 2.0, "seed": 3, "top_k": 4000},
    "top_p": {"temperature": 2.0, "seed": 4, "top_p": 0.6},
    "min_p": {"temperature": 2.0, "seed": 5, "min_p": 0.1},
    "all cuts": {"temperature": 2.0, "seed": 6, "top_k": 50, "top_p": 0.8, "min_p": 0.02},
    "penalties": {"temperature": 1.0, "seed": 7, "repetition_penalty": 1.4, "presence_penalty": 0.5},
    "greedy penalties": {"temperature": 0.0, "repetition_penalty": 1.8, "frequency_penalty": 1.5},
    "penalties and cuts": {"temperature": 1.5, "seed": 8, "frequency_penalty": 2.0, "top_p": 0.9},
    "least length": {"temperature": 2.0, "seed": 9, "min_tokens": 2, "stop_token_ids": tuple(range(0, 300, 2))},
    "everything": {
        "temperature": 2.0,
        "seed": 10,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": -0.2,
        "min_tokens": 3,
        "stop_token_ids": tuple(range(1, 300, 3)),
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.01,
    },
}


@pytest.fixture(scope="module")
def sampled(engines_of_both):
    """The completions of both engines for all of SAMPLING; every other request is under an adapter."""
    params = [
        SamplingParams(max_tokens=3, ignore_eos=True, logprobs=index % 4 or None, **each)
        for index, each in enumerate(SAMPLING.values())
    ]
    prompts = [prompt(7, seed) for seed in range(len(params))]
    names = [None, "plain"] * (len(params) // 2)
    ours, theirs = (each.generate(prompts, params, [each.digests[name] for name in names]) for each in engines_of_both)
    return dict(zip(SAMPLING, zip(ours, theirs, strict=True), strict=True))


@pytest.mark.parametrize("name", SAMPLING)
def test_whatever_the_parameters_tokens_and_logprobs_are_the_references(sampled, name):
    ours, theirs = sampled[name]
    assert ours.token_ids == theirs.token_ids
    assert bool(ours.logprobs) == bool(theirs.logprobs)
    for one, other in zip(ours.logprobs or [], theirs.logprobs or [], strict=True):
        assert one.top_ids == other.top_ids
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert one.top_logprobs == pytest.approx(other.top_logprobs, abs=1e-4)


def test_stop_tokens_end_a_sequence_but_not_before_its_least_length(engines_of_both):
    """Nothing here keeps a step from being launched before the tokens of the last are known."""
    tokens = prompt(9)
    greedy = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    [first] = engines_of_both[1].generate([tokens], greedy)[0].token_ids
    params = [
        SamplingParams(max_tokens=5, temperature=0.0, stop_token_ids=(first,)),
        SamplingParams(max_tokens=5, min_tokens=3, temperature=0.0, stop_token_ids=(first,)),
        SamplingParams(max_tokens=5, min_tokens=2, temperature=1.0, seed=3, stop_token_ids=tuple(range(0, 300, 2))),
        SamplingParams(max_tokens=5, temperature=1.5, seed=4, top_p=0.9, ignore_eos=True),
        SamplingParams(max_tokens=3, temperature=2.0, seed=5, top_k=9, min_p=0.01, ignore_eos=True),
    ]
    ours, theirs = (each.generate([tokens] * len(params), params) for each in engines_of_both)
    assert [(each.token_ids, each.finish_reason, each.stop_token) for each in ours] == [
        (each.token_ids, each.finish_reason, each.stop_token) for each in theirs
    ]
    assert (ours[0].token_ids, ours[0].stop_token) == ([], first)
    assert first not in ours[1].token_ids[:3]


def test_steps_run_ahead_whatever_their_tokens_depend_on(engines_of_both):
    """Penalties, bad words and log-probabilities: the next step is launched before the tokens of the last are told."""
    engine, other = engines_of_both
    tokens, greedy = prompt(12, 3), {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True}
    free = other.generate([tokens], SamplingParams(**greedy))[0].token_ids
    params = [
        SamplingParams(**greedy, repetition_penalty=1.7, frequency_penalty=0.6, logprobs=2),
        SamplingParams(**greedy, bad_words=((free[2],), tuple(free[3:5]))),
        SamplingParams(**greedy, logprobs=0),
        SamplingParams(**greedy | {"temperature": 1.5}, seed=3, presence_penalty=1.5, min_tokens=4, top_p=0.9),
    ]
    expected = other.generate([tokens] * len(params), params)
    ahead, outputs = 0, {}
    for index, each in enumerate(params):
        engine.add_request(Generate(request_id=f"{index}", token_ids=tokens, params=each))
    while engine.busy:
        for event in engine.step():
            outputs.setdefault(event.request_id, []).extend(event.token_ids)
        ahead += engine._launched is not None
    assert [outputs[f"{index}"] for index in range(len(params))] == [each.token_ids for each in expected]
    assert expected[1].token_ids != free
    assert ahead >= 7
