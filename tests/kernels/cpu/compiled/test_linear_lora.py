"""Adapters inside a projection against their products in float64."""

import pytest
import torch
from torch import Tensor

from kernels.cpu.compiled.program import Form, Part, Pool, Program
from tests.kernels.cpu.compiled.steps import (
    FLOATS,
    TYPES,
    UNIT,
    Adapted,
    Adapter,
    Type,
    empty_rows,
    gaps_are_kept,
    in_panels,
    projected,
    random,
    random_part,
    rows_of,
    same_bits,
    step_of,
)

ROWS = pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 13, 130, 300])
RANKS = (1, 3, 8, 16, 40, 100)
K, WIDTHS = 75, (87, 20, 33)
SITE = 1  # of two; the adapters have other weights at the other one
ROUNDINGS = 12  # of the base's sum, of the shrink and of the expand


def adapter(seed: int, adapted: tuple[int, ...], dtype: Type, widths: tuple[int, ...] = WIDTHS) -> Adapter:
    """One whose parts have different ranks, and every other one a bias."""
    site: list[Adapted | None] = [None] * len(widths)
    for index in adapted:
        ranks, bias = RANKS[(seed + index) % len(RANKS)], (seed + index) % 2 == 0
        site[index] = random_part(K, widths[index], ranks, 10 * seed + index, dtype, bias=bias)
    other = [random_part(K, width, 5, 99, dtype) for width in widths]
    return Adapter(other, site)


def stacked(type: Type, widths: tuple[int, ...] = WIDTHS) -> list[Part]:
    each = enumerate(widths)
    return [Part(in_panels(random(width, K, seed=i) / K**0.5, type), random(width, seed=i)) for i, width in each]


def run(
    pool: Pool,
    x: Tensor,
    parts: list[Part],
    owners: list[Adapter | None],
    form: Form = "store",
    scale: float = 1.0,
    into: Tensor | None = None,
) -> Tensor:
    width = parts[0].weight.columns if form == "gated" else sum(part.weight.columns for part in parts)
    out = empty_rows(len(x), width) if into is None else rows_of(into)
    program = Program(pool)
    program.linear(rows_of(x), parts, out, SITE, form, scale)
    program.run(step_of(len(x), owners))
    assert gaps_are_kept(out)
    return out


def wide(x: Tensor, parts: list[Part], owners: list[Adapter | None], *, magnitude: bool = False) -> list[Tensor]:
    return projected(x, parts, owners, SITE, magnitude=magnitude)


def check(got: Tensor, want: Tensor, magnitude: Tensor) -> None:
    assert ((got.double() - want).abs() <= ROUNDINGS * UNIT * magnitude).all()


def in_turn(rows: int, adapters: list[Adapter | None], run_length: int) -> list[Adapter | None]:
    return [adapters[row // run_length % len(adapters)] for row in range(rows)]


@pytest.mark.parametrize("type", TYPES, ids=str)
@ROWS
@pytest.mark.parametrize("run_length", [1, 3, 70])
def test_every_row_gets_its_own_adapter_of_its_own_dtype(pool: Pool, rows: int, run_length: int, type: Type) -> None:
    subsets = [(0, 1, 2), (0,), (1, 2), (2,), (0, 2), ()]
    adapters = [adapter(seed, subset, FLOATS[(seed + rows) % 3]) for seed, subset in enumerate(subsets)]
    owners = in_turn(rows, [*adapters[:3], None, *adapters[3:]], run_length)
    x, parts = random(rows, K, seed=1000), stacked(type)
    got = run(pool, x, parts, owners)
    check(got, torch.cat(wide(x, parts, owners), 1), torch.cat(wide(x, parts, owners, magnitude=True), 1))
    plain = run(pool, x, parts, [])
    untouched = [row for row, owner in enumerate(owners) if owner in (None, adapters[5])]
    assert same_bits(got[untouched], plain[untouched])
    for part, columns in ((0, slice(0, 87)), (1, slice(87, 107)), (2, slice(107, 140))):
        rest = [row for row, owner in enumerate(owners) if owner is not None and owner.sites[SITE][part] is None]
        assert same_bits(got[rest, columns], plain[rest, columns])


@pytest.mark.parametrize("ranks", [*RANKS, 15, 17, 200])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_rank_alone_or_after_another(pool: Pool, ranks: int, dtype: Type) -> None:
    x, parts = random(8, K, seed=1000), stacked(torch.float32)[:2]
    second = random_part(K, WIDTHS[1], ranks, 1, dtype, bias=True)
    for first in (None, random_part(K, WIDTHS[0], 1, 2, dtype), random_part(K, WIDTHS[0], 13, 3, dtype)):
        owners = [Adapter([], [first, second])] * 8
        magnitude = torch.cat(wide(x, parts, owners, magnitude=True), 1)
        check(run(pool, x, parts, owners), torch.cat(wide(x, parts, owners), 1), magnitude)


@ROWS
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_adapters_are_added_and_scaled_with_the_projection(pool: Pool, rows: int, dtype: Type) -> None:
    adapters = [adapter(seed, (0,), dtype, (43,)) for seed in range(4)]
    owners = in_turn(rows, [*adapters, None], 2)
    x, parts, before = random(rows, K, seed=1000), stacked(torch.bfloat16, (43,)), random(rows, 43, seed=5)
    got = run(pool, x, parts, owners, "add", -0.75, before)
    magnitude = before.double().abs() + wide(x, parts, owners, magnitude=True)[0]
    check(got, before.double() - 0.75 * wide(x, parts, owners)[0], magnitude)
    plain = run(pool, x, parts, [], "add", -0.75, before)
    base = [row for row, owner in enumerate(owners) if owner is None]
    assert same_bits(got[base], plain[base])


@ROWS
@pytest.mark.parametrize("adapted", [(0,), (1,), (0, 1)])
def test_adapters_of_a_gated_projection_come_before_the_gate(pool: Pool, rows: int, adapted: tuple[int, ...]) -> None:
    adapters = [adapter(seed, adapted, torch.bfloat16, (87, 87)) for seed in range(3)]
    owners = in_turn(rows, [None, *adapters], 3)
    x, parts = random(rows, K, seed=1000), stacked(torch.int8, (87, 87))
    gate, up = wide(x, parts, owners)
    gates, ups = wide(x, parts, owners, magnitude=True)
    got = run(pool, x, parts, owners, "gated", 2.0)
    check(got, 2.0 * gate * gate.sigmoid() * up, 4 * gates * ups)
    plain = run(pool, x, parts, [], "gated", 2.0)
    base = [row for row, owner in enumerate(owners) if owner is None]
    assert same_bits(got[base], plain[base])


def test_logits_have_runs_of_their_own(pool: Pool) -> None:
    one, two = adapter(1, (0,), torch.float16, (100,)), adapter(2, (0,), torch.float16, (100,))
    x, parts, out = random(5, K, seed=1000), stacked(torch.float16, (100,)), empty_rows(5, 100)
    owners = [two, None, one, one, two]
    program = Program(pool)
    program.linear(rows_of(x), parts, out, SITE, of_logits=True)
    program.run(step_of(300, [one] * 300, logit_rows=[3, 4, 8, 100, 299], logit_owners=owners))
    check(out, wide(x, parts, owners)[0], wide(x, parts, owners, magnitude=True)[0])
    program.run(step_of(300, [one] * 300))
    check(out, wide(x, parts, owners)[0], wide(x, parts, owners, magnitude=True)[0])


@pytest.mark.parametrize("rows", [5, 130])
def test_infinity_and_nan_in_one_row_reach_no_other_of_the_same_or_of_another_adapter(pool: Pool, rows: int) -> None:
    adapters = [adapter(seed, (0, 1, 2), torch.bfloat16) for seed in range(2)]
    owners = in_turn(rows, [None, adapters[0], adapters[0], adapters[1]], 1)
    parts = stacked(torch.bfloat16)
    for row in range(4):
        x = random(rows, K, seed=1000)
        clean = run(pool, x, parts, owners)
        for wrong in (torch.inf, torch.nan):
            x[row, 7] = wrong
            got = run(pool, x, parts, owners)
            assert not got[row].isfinite().any()
            others = torch.arange(rows) != row
            assert same_bits(got[others], clean[others])


@pytest.mark.parametrize("wrong", [torch.inf, torch.nan])
def test_infinity_and_nan_in_an_adapter_reach_no_row_of_another(pool: Pool, wrong: float) -> None:
    good = adapter(0, (0, 1, 2), torch.float32)
    x, parts = random(6, K, seed=1000), stacked(torch.float32)
    clean = run(pool, x, parts, [None, good, good, good, None, None])
    for a in (True, False):
        bad = random_part(K, WIDTHS[0], 5, 1, torch.float32)
        (bad.a if a else bad.b)[2, 1] = wrong
        got = run(pool, x, parts, [None, good, Adapter([], [bad, None, None]), good, None, None])
        assert not got[2].isfinite().all()
        others = [0, 1, 3, 4, 5]
        assert same_bits(got[others], clean[others])
        assert same_bits(got[2, WIDTHS[0] :], run(pool, x, parts, [])[2, WIDTHS[0] :])
