"""Routed experts against their formula in float64, and each row by itself."""

import pytest
import torch
from torch import Tensor

from kernels.cpu.compiled.program import Part, Pool, Program
from tests.kernels.cpu.compiled.steps import (
    Adapter,
    empty_rows,
    gaps_are_kept,
    in_panels,
    random,
    random_part,
    rows_of,
    same_bits,
    step_of,
)

HIDDEN, WIDTH, EXPERTS, CHOSEN, ROWS = 37, 21, 7, 3, 60


class Layer:
    """Experts in float32, and adapters of every second one."""

    def __init__(self) -> None:
        self.weights = [
            [random(*shape, seed=3 * expert + part) / shape[1] ** 0.5 for part, shape in enumerate(SHAPES)]
            for expert in range(EXPERTS)
        ]
        self.adapted = [
            [
                [
                    random_part(*shape[::-1], ranks, 10 * expert + part, torch.float32)
                    for part, shape in enumerate(SHAPES)
                ]
                if expert % 2
                else None
                for expert in range(EXPERTS)
            ]
            for ranks in (2, 19)
        ]
        self.adapters = [Adapter(*sites_of(adapted)) for adapted in self.adapted]

    def run(
        self, pool: Pool, x: Tensor, scores: Tensor, owners: list[int | None], *, normalised: bool = True
    ) -> Tensor:
        rows, chosen = len(x), CHOSEN
        out, program = rows_of(torch.ones(rows, HIDDEN)), Program(pool)
        gathered, inner = empty_rows(rows * chosen, HIDDEN), empty_rows(rows * chosen, WIDTH)
        parts = [[Part(in_panels(weight, torch.float32), None) for weight in each] for each in self.weights]
        experts = [(each[:2], each[2]) for each in parts]
        program.experts(
            rows_of(x), rows_of(scores), gathered, inner, out, experts, 0, chosen, normalised=normalised, scale=0.7
        )
        step = step_of(rows, [None if owner is None else self.adapters[owner] for owner in owners])
        program.run(step)
        again = out.clone()
        program.run(step)
        assert all(map(gaps_are_kept, (out, gathered, inner)))
        torch.testing.assert_close(out - again, again - 1, rtol=1e-4, atol=1e-4, equal_nan=True)
        return again

    def exact(self, x: Tensor, scores: Tensor, owner: int | None, normalised: bool) -> Tensor:
        """One row in float64."""
        weights, chosen = scores.double().softmax(-1).topk(CHOSEN)
        if normalised:
            weights = weights / weights.sum()
        out = torch.zeros(HIDDEN, dtype=torch.float64)
        for weight, expert in zip(weights, chosen.tolist(), strict=True):
            adapted = None if owner is None else self.adapted[owner][expert]
            gate, up, down = (
                matrix.double() + (0 if adapted is None else changed(adapted[part]))
                for part, matrix in enumerate(self.weights[expert])
            )
            gates = gate @ x.double()
            out += weight * (down @ (gates * gates.sigmoid() * (up @ x.double())))
        return 1 + 0.7 * out


SHAPES = ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))  # gate, up, down


def changed(part):
    return part.scale * (part.b.double() @ part.a.double())


def sites_of(adapted):
    for each in adapted:
        yield from ([], []) if each is None else (each[:2], each[2:])


@pytest.fixture(scope="module")
def layer() -> Layer:
    return Layer()


def owners_of(rows: int) -> list[int | None]:
    """Runs of both adapters and of none."""
    return [(None, 0, 1, None)[row * 4 // rows] for row in range(rows)]


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 9, ROWS])
def test_each_row_adds_the_weighted_outputs_of_the_experts_that_it_scores_highest(
    pools: list[Pool], layer: Layer, rows: int, normalised: bool
) -> None:
    x, scores, owners = random(rows, HIDDEN, seed=80), random(rows, EXPERTS, seed=81) * 2, owners_of(rows)
    want = [layer.exact(*each, normalised) for each in zip(x, scores, owners, strict=True)]
    for pool in pools:
        got = layer.run(pool, x, scores, owners, normalised=normalised)
        torch.testing.assert_close(got.double(), torch.stack(want), rtol=1e-5, atol=1e-5)


def test_a_row_has_the_bits_that_it_has_alone(pools: list[Pool], layer: Layer) -> None:
    x, scores, owners = random(ROWS, HIDDEN, seed=80), random(ROWS, EXPERTS, seed=81) * 2, owners_of(ROWS)
    alone = [layer.run(pools[0], x[row : row + 1], scores[row : row + 1], owners[row : row + 1]) for row in range(ROWS)]
    for pool in pools:
        for first, last in ((0, ROWS), (7, 20), (40, 58)):
            rows = slice(first, last)
            got = layer.run(pool, x[rows], scores[rows], owners[rows])
            assert same_bits(got, torch.cat(alone[rows]))


def test_what_is_not_finite_in_one_row_reaches_no_other(pool: Pool, layer: Layer) -> None:
    x, scores = random(20, HIDDEN, seed=80), random(20, EXPERTS, seed=81)
    scores[:, 4] = 50.0  # all rows choose this one
    clean = layer.run(pool, x, scores, [None] * 20)
    scores[3], scores[11, 2], x[5] = torch.nan, torch.inf, torch.nan
    got = layer.run(pool, x, scores, [None] * 20)
    broken = [3, 5, 11]
    assert not got[broken].isfinite().any()
    whole = [row for row in range(20) if row not in broken]
    assert same_bits(got[whole], clean[whole])
