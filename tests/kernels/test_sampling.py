"""The sampling kernels, their twin and the engine's sampler against one oracle in float64."""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton")

from kernels.reference import sampling as reference
from kernels.row_params import RowParams
from kernels.sampling import CANDIDATES, SamplingConfig, sample
from runtime import sampler
from runtime.messages import Generate, SamplingParams
from runtime.request import Request

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALMOST_ONE = 1 - 2**-53


class Row(NamedTuple):
    """How one row is sampled."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    draw: float = 0.5


PARAMS = [
    Row(),
    Row(0.3),
    Row(1e-300),
    Row(0.0, top_k=3),
    Row(1.7, top_k=1),
    Row(top_k=50),
    Row(0.8, top_k=300),
    Row(top_k=10**6),
    Row(0.7, top_p=0.5),
    Row(top_p=0.95),
    Row(top_p=1e-300),
    Row(min_p=0.2),
    Row(1.3, top_k=20, top_p=0.8, min_p=0.05),
    Row(1.5, top_p=0.9, min_p=0.01),
]


def build(rows: list[Row]) -> RowParams:
    return RowParams.build(*([list(field) for field in zip(*rows, strict=True)] or [[]] * 5), device=DEVICE)


def random(rows: int, vocab: int, seed: int = 0) -> Tensor:
    return (3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))).to(DEVICE)


def draws(count: int, seed: int) -> list[float]:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()


def exact(logits: Tensor, row: Row) -> int:
    """The token of one row by the formula, float64 throughout."""
    values = logits.double().cpu()
    if row.temperature == 0:
        return int((values == values.max()).nonzero()[0])
    weights = ((values - values.max()) / max(row.temperature, 1e-6)).exp()
    ids = torch.arange(len(values))
    if row.top_k or row.top_p < 1 or row.min_p:
        of_token = values.tolist()
        ids = torch.tensor(sorted(range(len(of_token)), key=lambda token: (-of_token[token], token)))
        ids = ids[: row.top_k or None]
        weights = weights[ids]
        before = weights.cumsum(0) - weights
        keep = (before < row.top_p * weights.sum()) & (weights >= row.min_p)
        keep[0] = True
        ids, weights = ids[keep], weights[keep]
    sums = weights.cumsum(0)
    return int(ids[min(int((sums <= row.draw * sums[-1]).sum()), int(weights.nonzero()[-1]))])


def within_rounding(logits: Tensor, row: Row) -> set[int]:
    """The tokens of the formula for a draw, a top_p or a min_p that is off by no more than the weights' rounding.

    A weight is off by the roundings of its exponent, relative to that: a difference, a quotient (2 ulp on a GPU),
    the product with log2(e), so 6 · 2^-24; and by exp's own 2 ulp. The exponent's mean under the distribution is at
    most ln(vocab), so that a share is off by (6 ln(vocab) + 4) · 2^-24, numerator and total once each.
    """
    off = 2 * (6 * math.log(max(len(logits), 2)) + 4) * 2**-24
    shifts = (-off, 0.0, off)
    return {
        exact(
            logits,
            row._replace(
                draw=min(max(row.draw + u, 0.0), ALMOST_ONE),
                top_p=row.top_p * (1 + p) if row.top_p < 1 else row.top_p,
                min_p=row.min_p * (1 + m),
            ),
        )
        for u, p, m in itertools.product(shifts, shifts if row.top_p < 1 else (0.0,), shifts if row.min_p else (0.0,))
    }


def by_kernels(logits: Tensor, rows: list[Row]) -> list[int]:
    several_chunks = SamplingConfig(64 if logits.shape[1] < 500 else 512, 1)
    token_ids, finite = sample(logits, build(rows), several_chunks)
    assert (token_ids.dtype, finite.dtype, finite.all().item()) == (torch.int64, torch.bool, True)
    return token_ids.tolist()


def by_twin(logits: Tensor, rows: list[Row]) -> list[int]:
    token_ids, finite = reference.sample(logits, build(rows))
    assert (token_ids.dtype, finite.dtype, finite.all().item()) == (torch.int64, torch.bool, True)
    return token_ids.tolist()


IMPLEMENTATIONS = pytest.mark.parametrize("implementation", [by_kernels, by_twin])


@IMPLEMENTATIONS
@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 65, 1000, 1025])
def test_every_row_has_the_token_of_the_formula(vocab: int, implementation: Callable) -> None:
    rows = [row._replace(draw=draw) for row, draw in zip(PARAMS * 2, draws(2 * len(PARAMS), vocab), strict=True)]
    logits = random(len(rows), vocab, seed=vocab)
    tokens = implementation(logits, rows)
    for index, row in enumerate(rows):
        assert tokens[index] in within_rounding(logits[index], row), (index, row)


def test_the_engines_sampler_means_the_same() -> None:
    params = PARAMS * 2
    requests = [engine_request(row, seed) for seed, row in enumerate(params)]
    rows = [row._replace(draw=sampler.uniform(seed, 0, 0)) for seed, row in enumerate(params)]
    logits = random(len(rows), 1500, seed=5)
    engine = [chosen.token_id for chosen in sampler.sample(logits, requests)]
    ours = by_kernels(logits, rows)
    for index, row in enumerate(rows):
        assert {engine[index], ours[index]} <= within_rounding(logits[index], row), (index, row)
    assert sum(a != b for a, b in zip(engine, ours, strict=True)) <= 1


def engine_request(row: Row, seed: int) -> Request:
    params = SamplingParams(
        max_tokens=9, seed=seed, temperature=row.temperature, top_k=row.top_k, top_p=row.top_p, min_p=row.min_p
    )
    return Request(Generate(request_id="r", token_ids=[1], params=params), max_tokens=100, eos_token_ids=())


@IMPLEMENTATIONS
@pytest.mark.parametrize("row", [Row(), Row(0.5, top_k=12), Row(top_p=0.9), Row(min_p=0.1)], ids=str)
def test_evenly_spaced_draws_give_each_token_its_share(row: Row, implementation: Callable) -> None:
    count, logits = 40, random(1, 70, seed=3)
    rows = [row._replace(draw=(index + 0.5) / count) for index in range(count)]
    chosen = Counter(implementation(logits.expand(count, -1), rows))
    fine = Counter(exact(logits[0], row._replace(draw=(index + 0.5) / 2000)) for index in range(2000))
    for token in fine | chosen:
        # A token is an interval, and draws beside each other are 1/40 and 1/2000 apart.
        assert abs(chosen[token] - fine[token] / 50) < 1 + 1 / 50, token


@IMPLEMENTATIONS
def test_greedy_takes_the_first_of_equal_maxima(implementation: Callable) -> None:
    logits = torch.zeros(4, 300, device=DEVICE)
    logits[0, 77] = logits[0, 200] = 1.0
    logits[1] = -1.0
    logits[1, 131], logits[1, 130] = 0.0, -0.0
    logits[2, :299] = float("-inf")
    assert implementation(logits, [Row(0.0)] * 4) == [77, 130, 299, 0]


@IMPLEMENTATIONS
@pytest.mark.parametrize("cut", [Row(top_k=4), Row(top_k=10**6, top_p=0.35), Row(top_p=0.35), Row(min_p=0.9)], ids=str)
def test_of_equal_logits_the_lower_token_comes_first(cut: Row, implementation: Callable) -> None:
    # In bfloat16, many logits are equal.
    logits = torch.full((10, 200), -30.0, device=DEVICE)
    logits[:, 90:100] = torch.tensor([0.0, -0.0], device=DEVICE).repeat(5)
    rows = [cut._replace(draw=(index + 0.5) / 10) for index in range(10)]
    kept = 10 if cut.min_p else 4
    assert implementation(logits, rows) == [90 + int(row.draw * kept) for row in rows]


@IMPLEMENTATIONS
@pytest.mark.parametrize("row", [Row(), Row(top_k=400), Row(top_p=0.999999), Row(min_p=1e-12)], ids=str)
def test_neither_end_of_the_draws_reaches_a_token_without_weight(row: Row, implementation: Callable) -> None:
    logits = torch.full((2, 400), -1e31, device=DEVICE)
    logits[:, 70:330] = random(1, 260)
    tokens = implementation(logits, [row._replace(draw=draw) for draw in (0.0, ALMOST_ONE)])
    if row == Row():
        assert tokens == [70, 329]
    else:
        assert tokens[0] == int(logits[0].argmax())
        assert 70 <= tokens[1] < 330


@IMPLEMENTATIONS
@pytest.mark.parametrize("row", [Row(), Row(top_k=128), Row(top_k=1000, min_p=0.5)], ids=str)
def test_a_draw_on_the_border_of_two_tokens_is_the_second_ones(row: Row, implementation: Callable) -> None:
    borders = [0, 1, 63, 64, 65, 127]
    rows = [row._replace(draw=border / 128) for border in borders]
    assert implementation(torch.zeros(len(rows), 128, device=DEVICE), rows) == borders


@IMPLEMENTATIONS
def test_tokens_that_are_all_forbidden_are_drawn_from_all_the_same(implementation: Callable) -> None:
    logits = torch.full((2, 100), -1e31, device=DEVICE)
    assert implementation(logits, [Row(draw=0.255), Row(top_p=0.5, draw=0.51)]) == [25, 25]


@pytest.mark.parametrize("by", [sample, reference.sample])
def test_a_row_that_is_not_finite_has_no_token_and_leaves_others_alone(by: Callable) -> None:
    rows = [row._replace(draw=draw) for row, draw in zip(PARAMS * 2, draws(2 * len(PARAMS), 1), strict=True)]
    logits = random(len(rows), 200, seed=9)
    good, finite = by(logits, build(rows))
    assert finite.all()
    bad = torch.zeros(len(rows), dtype=torch.bool, device=DEVICE)
    for index in range(0, len(rows), 3):
        bad[index] = True
        logits[index, index::70] = [float("nan"), float("inf")][index % 2]
    logits[3] = float("-inf")
    with np.errstate(over="ignore", invalid="ignore"):  # the interpreter is numpy
        tokens, finite = by(logits, build(rows))
    assert torch.equal(finite, ~bad)
    assert torch.equal(tokens, good.where(~bad, 0))


def test_a_rows_token_does_not_depend_on_its_neighbours_to_the_bit() -> None:
    rows = [row._replace(draw=draw) for row, draw in zip(PARAMS, draws(len(PARAMS), 2), strict=True)]
    logits = random(len(rows), 500).bfloat16().float()  # with many ties
    alone = [by_kernels(logits[index : index + 1], [row])[0] for index, row in enumerate(rows)]
    assert by_kernels(logits, rows) == alone
    backwards = by_kernels(logits.flip(0), rows[::-1])
    assert backwards[::-1] == alone


@pytest.mark.parametrize("config", CANDIDATES[1:3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_may_be_a_slice_of_wider_rows_and_of_the_models_dtype(
    dtype: torch.dtype, config: SamplingConfig
) -> None:
    rows = [row._replace(draw=draw) for row, draw in zip(PARAMS, draws(len(PARAMS), 3), strict=True)]
    wide = random(len(rows), 5000).to(dtype)
    tokens, _ = sample(wide[:, 3:4500], build(rows), config)
    for index, row in enumerate(rows):
        assert int(tokens[index]) in within_rounding(wide[index, 3:4500], row), (index, row)


def test_parameters_are_those_given_and_name_the_rows_that_are_cut() -> None:
    params = build([Row(0.0, top_k=3), Row(), Row(top_k=7, draw=0.25), Row(0.5, top_k=2), Row(2.0)])
    assert (params.ranked_rows.tolist(), params.cut_rows.tolist()) == ([2, 3], [])
    assert (params.candidates, params.top_k.tolist()) == (7, [3, 0, 7, 2, 0])
    assert (params.temperature.tolist(), params.draw.tolist()) == ([0, 1, 1, 0.5, 2], [0.5, 0.5, 0.25, 0.5, 0.5])
    mixed = build([Row(top_p=0.5), Row(top_k=7, top_p=0.2), Row(0.0, top_p=0.5), Row(0.1), Row(min_p=0.1)])
    assert (mixed.ranked_rows.tolist(), mixed.cut_rows.tolist(), mixed.candidates) == ([1], [0, 4], 7)


@pytest.mark.parametrize("by", [sample, reference.sample])
def test_no_rows_have_no_tokens(by: Callable) -> None:
    token_ids, finite = by(torch.empty(0, 10, device=DEVICE), build([]))
    assert (token_ids.shape, finite.shape) == ((0,), (0,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
def test_the_tokens_kept_by_a_search_are_those_of_a_sort_with_all_ties(seed: int, dtype: torch.dtype) -> None:
    """A top_p that ends in the middle of a token's weight keeps exactly the tokens up to that one, in order."""
    generator = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(1, 300, generator=generator)).round(decimals=seed % 2).to(dtype)  # many are equal
    values = logits[0].double()
    order = sorted(range(300), key=lambda token: (-float(values[token]), token))
    temperature = (0.7, 1.0, 1.9, 1.0)[seed]
    weights = ((values[order] - values.max()) / temperature).exp()
    sums, total = weights.cumsum(0), float(weights.sum())
    for count in [count for count in (1, 2, 3, 7, 20, 40) if weights[count - 1] > 1e-4 * total]:
        top_p = float(sums[count - 1] - weights[count - 1] / 2) / total
        kept, mass = order[:count], float(sums[count - 1])
        middles = ((sums - weights / 2)[:count] / mass).tolist()
        rows = [Row(temperature, top_p=top_p, draw=draw) for draw in middles]
        rows.append(Row(temperature, top_p=top_p, draw=ALMOST_ONE))
        many = logits.expand(len(rows), -1).contiguous().to(DEVICE)
        tokens, _ = sample(many, build(rows), SamplingConfig(256, 4))
        assert tokens.tolist() == [*kept, kept[-1]], (seed, count)


def test_a_search_and_a_cut_by_rank_share_a_batch() -> None:
    rows = [Row(top_p=0.6), Row(top_k=5, top_p=0.6), Row(), Row(min_p=0.3), Row(0.0, top_p=0.1), Row(top_k=3)]
    logits = random(len(rows), 90, seed=3)
    tokens = by_kernels(logits, rows)
    assert [by_kernels(logits[index : index + 1], [row])[0] for index, row in enumerate(rows)] == tokens


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device: whether the host waits shows nowhere else")
def test_nothing_waits_for_the_device() -> None:
    logits = random(len(PARAMS), 5000)
    sample(logits, build(PARAMS))
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample(logits, build(PARAMS))
        sample(logits, build([Row(top_k=20)] * len(PARAMS)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
