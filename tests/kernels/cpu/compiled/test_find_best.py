"""The best of each row of logits against torch."""

import math

import pytest
import torch
from torch import Tensor

from kernels.cpu.compiled import structs
from kernels.cpu.compiled.program import Pool, Program
from tests.kernels.cpu.compiled.steps import random, rows_of, step_of

SIZES = pytest.mark.parametrize("size", [1, 3, 8, 15, 16, 17, 100, 49152])


def find(pool: Pool, logits: Tensor) -> list[structs.Best]:
    best = (structs.Best * (len(logits) + 1))()
    best[len(logits)].index = -7
    program = Program(pool)
    program.find_best(rows_of(logits), best)
    program.run(step_of(300, logit_rows=range(len(logits))))
    assert best[len(logits)].index == -7
    return best[: len(logits)]


@SIZES
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 30.0, 1e4, 1e30])
def test_the_highest_logit_its_index_and_the_logarithm_of_the_total(pool: Pool, size: int, scale: float) -> None:
    logits = random(5, size) * scale
    found = find(pool, logits)
    highest, index = logits.max(-1)
    assert [one.highest for one in found] == highest.tolist()
    assert [one.index for one in found] == (index.tolist() if scale else [0] * 5)
    total = torch.tensor([one.log_total for one in found])
    torch.testing.assert_close(total, logits.logsumexp(-1), rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(total.double(), logits.double().logsumexp(-1), rtol=1e-6, atol=2e-6)


@SIZES
def test_of_equal_maxima_the_first_is_found(pool: Pool, size: int) -> None:
    for first in {0, size // 2, size - 1}:
        logits = random(1, size) - 20
        logits[0, [first, (first + size) // 2, size - 1]] = 3.0
        (best,) = find(pool, logits)
        assert (best.highest, best.index) == (3.0, first)
    (best,) = find(pool, torch.tensor([[-1.0, -0.0, 0.0, -0.0]]))
    assert (best.highest, best.index) == (0.0, 1)


@SIZES
def test_a_row_with_nan_has_nan_as_its_highest_wherever_it_is(pool: Pool, size: int) -> None:
    for place in {0, size // 2, size - 1}:
        for other in (1.0, torch.inf, -torch.inf):
            logits = random(3, size)
            logits[1] = other
            logits[1, place] = torch.nan
            found = find(pool, logits)
            assert math.isnan(found[1].highest)
            assert [found[row].highest for row in (0, 2)] == logits[[0, 2]].max(-1).values.tolist()


@SIZES
def test_forbidden_logits_of_minus_infinity_count_nothing(pool: Pool, size: int) -> None:
    for place in {0, size // 2, size - 1}:
        logits = torch.full((1, size), -torch.inf)
        logits[0, place] = -2.5
        logits[0, size // 3] = max(float(logits[0, size // 3]), -4.0)
        (best,) = find(pool, logits)
        assert (best.highest, best.index) == (-2.5, place)
        assert best.log_total == pytest.approx(float(logits.logsumexp(-1)), rel=1e-6)


@SIZES
def test_infinity_is_found_as_the_highest_and_so_is_minus_infinity_where_all_are(pool: Pool, size: int) -> None:
    logits = random(3, size)
    logits[0, size // 2] = torch.inf
    logits[1] = -torch.inf
    logits[2, 0], logits[2, size - 1] = -torch.inf, torch.inf
    found = find(pool, logits)
    assert [(one.highest, one.index) for one in found] == [
        (torch.inf, size // 2),
        (-torch.inf, 0),
        (torch.inf, size - 1),
    ]


def test_the_total_of_an_infinite_row_is_infinite_as_torchs_is(pool: Pool) -> None:
    logits = torch.zeros(2, 20)
    logits[0, 5], logits[1] = torch.inf, -torch.inf
    assert [one.log_total for one in find(pool, logits)] == logits.logsumexp(-1).tolist()
