import math
from collections import Counter

import pytest
import torch

from runtime.messages import Generate, SamplingParams
from runtime.request import Request
from runtime.sampler import sample, uniform

VOCAB = 3000


def request(prompt=(1, 2, 3), generated=(), **params):
    params = {"max_tokens": 100, "seed": 0, **params}
    made = Request(
        Generate(request_id="r", token_ids=list(prompt), params=SamplingParams(**params)),
        max_tokens=1000,
        eos_token_ids=(9,),
    )
    for token in generated:
        made.token_ids.append(token)
    return made


def logits(seed=0, rows=1):
    return 2 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def draws(row, count=4000, **params):
    """The tokens that `count` positions of one stream choose from the same logits."""
    made = request(**params)
    tokens = []
    for _ in range(count):
        tokens.append(sample(row[None], [made])[0].token_id)
        made.token_ids.append(tokens[-1])
    return Counter(tokens)


def test_temperature_zero_takes_the_likeliest():
    rows = logits(rows=5)
    chosen = [s.token_id for s in sample(rows, [request(temperature=0.0)] * 5)]
    assert chosen == rows.argmax(-1).tolist()


def test_a_draw_depends_on_its_own_seed_choice_and_position_and_not_on_its_neighbours():
    rows = logits(rows=6)
    requests = [request(seed=row, temperature=1.0) for row in range(6)]
    together = [s.token_id for s in sample(rows, requests)]
    alone = [sample(rows[row : row + 1], [requests[row]])[0].token_id for row in range(6)]
    assert together == alone
    other_choice = [s.token_id for s in sample(rows, [request(seed=row, choice=1) for row in range(6)])]
    assert together != other_choice


def test_without_a_seed_two_requests_differ():
    assert request(seed=None).seed != request(seed=None).seed


def test_uniform_is_uniform_over_every_argument():
    for draw in (
        [uniform(seed, 0, 0) for seed in range(4000)],
        [uniform(1, choice, 0) for choice in range(4000)],
        [uniform(1, 0, position) for position in range(4000)],
    ):
        assert all(0 <= value < 1 for value in draw)
        counts = Counter(int(value * 20) for value in draw)
        assert sum((counts[b] - 200) ** 2 / 200 for b in range(20)) < 50, "chi-square with 19 degrees, p < 0.0002"


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 0.7, "top_p": 0.5},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
    ],
    ids=str,
)
def test_the_distribution_drawn_from_is_the_one_asked_for(params):
    row = 3 * torch.randn(50, generator=torch.Generator().manual_seed(3))
    counts = draws(row, **params)
    probabilities = (row / params["temperature"]).softmax(-1).tolist()
    order = sorted(range(50), key=lambda token: -probabilities[token])[: params.get("top_k") or 50]
    total = sum(probabilities[token] for token in order)
    kept, mass = [], 0.0
    for token in order:
        if mass < params.get("top_p", 1.0) * total and probabilities[token] >= params.get("min_p", 0) * max(
            probabilities
        ):
            kept.append(token)
        mass += probabilities[token]
    assert set(counts) <= set(kept)
    share = sum(probabilities[token] for token in kept)
    for token in kept:
        expected = 4000 * probabilities[token] / share
        assert abs(counts[token] - expected) <= 5 * math.sqrt(expected) + 1


def test_top_p_over_a_flat_distribution_looks_beyond_the_first_candidates():
    row = torch.zeros(VOCAB)
    assert len(draws(row, count=3000, top_p=0.99)) > 1500


def test_forbidden_tokens_are_not_chosen_before_the_least_length():
    row = torch.zeros(1, VOCAB)
    row[0, 9] = 10.0
    assert sample(row, [request(temperature=0.0)])[0].token_id == 9
    assert sample(row, [request(temperature=0.0, min_tokens=2, generated=(5,))])[0].token_id != 9
    assert sample(row, [request(temperature=0.0, min_tokens=2, generated=(5, 5))])[0].token_id == 9


def test_a_bias_is_added_and_only_allowed_tokens_are_chosen():
    row = logits()[0]
    second = int(row.topk(2).indices[1])
    assert sample(row[None], [request(temperature=0.0, logit_bias={second: 100.0})])[0].token_id == second
    assert sample(row[None], [request(temperature=0.0, allowed_token_ids=(17, 4))])[0].token_id == max(
        (17, 4), key=lambda token_id: row[token_id]
    )
    assert set(draws(row, 200, allowed_token_ids=(5, 6, 7))) == {5, 6, 7}
    assert set(draws(row, 50, allowed_token_ids=(9,), min_tokens=90)) == {9}, "the end, if nothing else is left"


def test_a_bad_word_is_never_completed():
    row = torch.zeros(VOCAB)
    row[4], row[5] = 2.0, 1.0
    words = ((4, 4), (7, 8, 4))
    assert sample(row[None], [request(temperature=0.0, bad_words=words)])[0].token_id == 4
    assert sample(row[None], [request(generated=(4,), temperature=0.0, bad_words=words)])[0].token_id == 5
    assert sample(row[None], [request(generated=(8,), temperature=0.0, bad_words=words)])[0].token_id == 4
    assert sample(row[None], [request(generated=(1, 7, 8), temperature=0.0, bad_words=words)])[0].token_id == 5
    assert sample(row[None], [request(prompt=(7, 8), temperature=0.0, bad_words=words)])[0].token_id == 4
    assert sample(row[None], [request(temperature=0.0, bad_words=((4,),))])[0].token_id == 5


def test_repetition_penalty_counts_prompt_and_output_as_transformers_does():
    from transformers import RepetitionPenaltyLogitsProcessor

    rows = logits()
    made = request(prompt=[1, 2, 3], generated=[4, 4], repetition_penalty=1.7, temperature=0.0)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([made.token_ids]), rows.clone())
    rows[0, [1, 2, 3, 4]] += 30
    expected[0, [1, 2, 3, 4]] = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([made.token_ids]), rows)[0, 1:5]
    assert sample(rows, [made])[0].token_id == int(expected.argmax())


def test_presence_and_frequency_penalties_count_the_output_alone():
    row = torch.zeros(1, VOCAB)
    row[0, 1], row[0, 4], row[0, 5], row[0, 6] = 2.0, 2.9, 2.6, 1.9
    made = request(prompt=[1], generated=[4, 4, 5], presence_penalty=0.5, frequency_penalty=0.3, temperature=0.0)
    assert sample(row, [made])[0].token_id == 1, "4: 2.9-1.1, 5: 2.6-0.8, 1: untouched at 2.0"


def test_penalties_leave_the_logits_of_the_batch_alone():
    rows = logits()
    before = rows.clone()
    sample(rows, [request(generated=[4], repetition_penalty=2.0, presence_penalty=1.0)])
    assert torch.equal(rows, before)


def test_logprobs_are_those_of_the_unmodified_distribution():
    rows = logits()
    [chosen] = sample(rows, [request(temperature=0.0, logprobs=3, presence_penalty=1.0)])
    expected = rows[0].log_softmax(-1)
    assert chosen.logprobs.logprob == pytest.approx(float(expected[chosen.token_id]))
    assert chosen.logprobs.top_ids == expected.topk(3).indices.tolist()
    assert chosen.logprobs.top_logprobs == pytest.approx(expected.topk(3).values.tolist())
    assert sample(rows, [request(temperature=0.0)])[0].logprobs is None


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_logits_that_are_not_finite_choose_nothing_and_leave_other_rows_alone(poison):
    rows = logits(rows=2)
    rows[0, 17] = poison
    bad, good = sample(rows, [request(), request(temperature=0.0)])
    assert bad.token_id is None
    assert good.token_id == int(rows[1].argmax())


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1e-300},
        {"temperature": 1e-300, "top_p": 0.5, "min_p": 0.1},
        {"temperature": 1.0, "repetition_penalty": 1e-300, "top_k": 5},
        {"temperature": 1.0, "top_p": 1e-300},
        {"temperature": 1.0, "min_tokens": 5, "stop_token_ids": tuple(range(VOCAB)), "top_p": 0.5},
        {"temperature": 0.0, "min_tokens": 5, "stop_token_ids": tuple(range(VOCAB))},
    ],
    ids=lambda params: "-".join(params),
)
def test_extreme_parameters_still_choose_a_token(params):
    """An exception here would end the requests of the whole batch."""
    rows = logits()
    rows[0, 1] = 0.0
    chosen = sample(rows, [request(**params)])[0].token_id
    assert 0 <= chosen < VOCAB
    if params["temperature"] == 1e-300:
        assert chosen == int(rows.argmax())
