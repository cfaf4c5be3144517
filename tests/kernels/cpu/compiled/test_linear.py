"""Projections without adapters against their product in float64."""

import pytest
import torch
from torch import Tensor

from kernels.cpu.compiled.panels import Panels
from kernels.cpu.compiled.program import NO_SITE, Form, Part, Pool, Program
from tests.kernels.cpu.compiled.steps import (
    TYPES,
    UNIT,
    Type,
    empty_rows,
    gaps_are_kept,
    in_panels,
    projected,
    random,
    rows_of,
    same_bits,
    step_of,
)

COUNTS = (1, 2, 5, 6, 7, 13, 130, 300)
ROWS = pytest.mark.parametrize("rows", COUNTS)
WEIGHTS = pytest.mark.parametrize("type", TYPES, ids=str)
ROUNDINGS = 8  # that the error of a sum may have; one in order has about one of its magnitude


def run(
    pool: Pool,
    x: Tensor,
    parts: list[Part],
    form: Form = "store",
    scale: float = 1.0,
    into: Tensor | None = None,
    gates: Tensor | None = None,
) -> Tensor:
    width = parts[0].weight.columns if form.startswith("gated") else sum(part.weight.columns for part in parts)
    out = empty_rows(len(x), width) if into is None else rows_of(into)
    program = Program(pool)
    program.linear(rows_of(x), parts, out, NO_SITE, form, scale, gates=None if gates is None else rows_of(gates))
    program.run(step_of(len(x)))
    assert gaps_are_kept(out)
    return out


def wide(x: Tensor, parts: list[Part], *, magnitude: bool = False) -> list[Tensor]:
    return projected(x, parts, magnitude=magnitude)


def check(got: Tensor, want: Tensor, magnitude: Tensor) -> None:
    assert ((got.double() - want).abs() <= ROUNDINGS * UNIT * magnitude).all()


def panels(columns: int, k: int, type: Type, seed: int = 0) -> Panels:
    return in_panels(random(columns, k, seed=seed) / k**0.5, type)


@WEIGHTS
@pytest.mark.parametrize(("columns", "k"), [(1, 1), (16, 64), (87, 131), (130, 300)])
def test_a_projection_is_its_product_and_bias(pool: Pool, columns: int, k: int, type: Type) -> None:
    x, weight = random(max(COUNTS), k, seed=50), panels(columns, k, type)
    for bias in (None, random(columns, seed=2)):
        parts = [Part(weight, bias)]
        want, magnitude = wide(x, parts)[0], wide(x, parts, magnitude=True)[0]
        for rows in COUNTS:
            check(run(pool, x[:rows], parts), want[:rows], magnitude[:rows])


@WEIGHTS
@ROWS
def test_stacked_parts_lie_side_by_side(pool: Pool, rows: int, type: Type) -> None:
    x = random(rows, 75, seed=50)
    for widths in ((40, 7), (64, 16, 16), (5, 1, 33)):
        parts = [Part(panels(width, 75, type, width), random(width, seed=width)) for width in widths]
        parts[1] = Part(parts[1].weight, None)
        check(run(pool, x, parts), torch.cat(wide(x, parts), 1), torch.cat(wide(x, parts, magnitude=True), 1))


@WEIGHTS
@ROWS
def test_a_projection_is_scaled_and_added_to_what_is_there(pool: Pool, rows: int, type: Type) -> None:
    x, parts = random(rows, 90, seed=50), [Part(panels(43, 90, type), random(43))]
    before, want, magnitude = random(rows, 43, seed=3), wide(x, parts)[0], wide(x, parts, magnitude=True)[0]
    for scale in (1.0, -0.375):
        check(run(pool, x, parts, "store", scale), scale * want, magnitude)
        got = run(pool, x, parts, "add", scale, before)
        check(got, before.double() + scale * want, before.double().abs() + magnitude)


@WEIGHTS
@ROWS
def test_a_gated_projection_is_the_second_part_times_the_silu_of_the_first(pool: Pool, rows: int, type: Type) -> None:
    x = random(rows, 66, seed=50) * 3
    parts = [Part(panels(53, 66, type, seed), random(53, seed=seed)) for seed in (0, 1)]
    gate, up = wide(x, parts)
    gates, ups = wide(x, parts, magnitude=True)
    for scale in (1.0, 0.5):
        check(run(pool, x, parts, "gated", scale), scale * gate * gate.sigmoid() * up, 2 * gates * ups)


@ROWS
def test_a_gate_may_be_a_gelu(pool: Pool, rows: int) -> None:
    x = random(rows, 66, seed=50) * 3
    parts = [Part(panels(53, 66, torch.float32, seed), random(53, seed=seed)) for seed in (0, 1)]
    gate, up = wide(x, parts)
    gates, ups = wide(x, parts, magnitude=True)
    want = torch.nn.functional.gelu(gate, approximate="tanh") * up
    check(run(pool, x, parts, "gated_gelu"), want, 2 * gates * ups)


@ROWS
@pytest.mark.parametrize("limit", [0.5, 2.0])
def test_a_gate_and_its_up_may_be_clamped(pool: Pool, rows: int, limit: float) -> None:
    x = random(rows, 66, seed=50) * 3
    parts = [Part(panels(53, 66, torch.float32, seed), random(53, seed=seed)) for seed in (0, 1)]
    gate, up = wide(x, parts)
    assert (gate > limit).any()
    assert (up.abs() > limit).any()
    gates, ups = wide(x, parts, magnitude=True)
    gate = gate.clamp(max=limit)
    want = gate * (1.702 * gate).sigmoid() * (up.clamp(-limit, limit) + 1)
    check(run(pool, x, parts, "gated_clamped", limit), want, 2 * (gates + 1) * (ups + 1))


@ROWS
def test_a_sigmoid_of_each_row_is_a_factor_of_its_outputs(pool: Pool, rows: int) -> None:
    x, parts = random(rows, 90, seed=50), [Part(panels(43, 90, torch.float32), random(43))]
    before, want, magnitude = random(rows, 43, seed=3), wide(x, parts)[0], wide(x, parts, magnitude=True)[0]
    gates = random(rows, 1, seed=4) * 4
    got = run(pool, x, parts, "add", 0.7, before, gates=gates)
    check(got, before + 0.7 * gates.double().sigmoid() * want, before.double().abs() + magnitude)


@ROWS
@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_a_capped_projection_is_bent_by_a_tanh(pool: Pool, rows: int, cap: float) -> None:
    x, parts = random(rows, 90, seed=50), [Part(panels(43, 90, torch.float32), random(43))]
    parts[0].bias[:4] = torch.tensor([1e4, -1e4, 1e30, -1e30])
    want, magnitude = wide(x, parts)[0], wide(x, parts, magnitude=True)[0]
    got = run(pool, x, parts, "capped", cap)
    check(got, cap * (want / cap).tanh(), magnitude.clamp(max=1e3) + cap)
    assert got[:, :4].tolist() == [[cap, -cap, cap, -cap]] * rows


def gated(pool: Pool, gates: Tensor) -> Tensor:
    """silu(gate) · 1 for each gate."""
    gate, one = in_panels(torch.ones(1, 1), torch.float32), in_panels(torch.zeros(1, 1), torch.float32)
    return run(pool, gates[:, None], [Part(gate, None), Part(one, torch.ones(1))], "gated")[:, 0]


def test_a_gate_far_from_zero_closes_or_passes(pool: Pool) -> None:
    gates = torch.tensor([-1e4, -200.0, -88.5, -87.5, -20.0, -0.0, 0.0, 20.0, 87.5, 88.5, 200.0, 1e4, 3e38])
    want = gates.double() * gates.double().sigmoid()
    torch.testing.assert_close(gated(pool, gates).double(), want, rtol=1e-6, atol=1e-30)
    assert not gated(pool, torch.tensor([torch.nan, torch.inf])).isfinite().any()


def test_a_gate_at_the_lowest_float_closes(pool: Pool) -> None:
    gates = torch.tensor([-1e20, -1e30, -1e35, -3e38])
    torch.testing.assert_close(gated(pool, gates), torch.zeros(4), rtol=0, atol=1e-6)


@WEIGHTS
@pytest.mark.parametrize("k", [1025, 2100, 4100])
def test_a_deep_projection_is_its_product_for_few_rows_and_for_many(pool: Pool, k: int, type: Type) -> None:
    parts = [Part(panels(70, k, type), None), Part(panels(70, k, type, 1), None)]
    x = random(34, k, seed=50)
    wants, magnitudes = wide(x, parts), wide(x, parts, magnitude=True)
    for rows in (1, 4, 16, 17, 34):
        got = run(pool, x[:rows], parts)
        check(got, torch.cat(wants, 1)[:rows], torch.cat(magnitudes, 1)[:rows])
        got = run(pool, x[:rows], parts, "gated")
        gate, up = (want[:rows] for want in wants)
        check(got, gate * gate.sigmoid() * up, 2 * magnitudes[0][:rows] * magnitudes[1][:rows])


def test_a_deep_projection_of_more_rows_than_are_rounded_at_once_is_its_product(pool: Pool) -> None:
    parts, x = [Part(panels(20, 4100, torch.bfloat16), None)], random(600, 4100, seed=50)
    check(run(pool, x, parts), wide(x, parts)[0], wide(x, parts, magnitude=True)[0])


def test_a_projection_of_logits_reads_the_rows_of_the_logits(pool: Pool) -> None:
    x, parts = random(9, 40, seed=50), [Part(panels(100, 40, torch.bfloat16), None)]
    out = empty_rows(9, 100)
    program = Program(pool)
    program.linear(rows_of(x), parts, out, NO_SITE, scale=0.125, of_logits=True)
    program.run(step_of(300, logit_rows=[7, 8, 200, 201]))
    check(out[:4], 0.125 * wide(x[:4], parts)[0], wide(x[:4], parts, magnitude=True)[0])
    assert out[4:].isnan().all()
    before = out.clone()
    program.run(step_of(300))
    assert same_bits(out, before)


@WEIGHTS
def test_infinity_and_nan_in_one_row_reach_no_other(pool: Pool, type: Type) -> None:
    parts = [Part(panels(40, 70, type), random(40))]
    for rows in (2, 7, 140):
        x = random(rows, 70, seed=50)
        clean, row = run(pool, x, parts), rows // 2
        for wrong in (torch.inf, -torch.inf, torch.nan):
            x[row, 3] = wrong
            got = run(pool, x, parts)
            assert not got[row].isfinite().any()
            others = torch.arange(rows) != row
            assert same_bits(got[others], clean[others])


def test_operations_run_in_order_and_a_program_outlives_what_it_was_recorded_with(pool: Pool) -> None:
    x, out = rows_of(random(5, 24)), empty_rows(5, 24)
    want = x.double()
    program, states = Program(pool), (x, out)
    for seed in range(20):
        weight, bias = random(24, 24, seed=seed) / 5, random(24, seed=seed)
        program.linear(
            states[seed % 2], [Part(in_panels(weight, torch.float32), bias.clone())], states[1 - seed % 2], 0
        )
        want = want @ weight.double().t() + bias.double()
    program.run(step_of(5))
    torch.testing.assert_close(x.double(), want, rtol=1e-5, atol=1e-5)
