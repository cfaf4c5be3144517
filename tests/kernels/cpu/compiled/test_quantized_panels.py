"""Quantised weights: what their panels hold, groups of every size, and another order than a row's numbers."""

import numpy as np
import pytest
import torch

from kernels.cpu.compiled.panels import FLOAT8, INT4, INT8, NF4, pack_codes
from kernels.cpu.compiled.program import NO_SITE, Part, Pool, Program
from tests.kernels.cpu.compiled.steps import (
    BOOK,
    UNIT,
    empty_rows,
    exact_weight,
    in_groups,
    projected,
    random,
    rows_of,
    same_bits,
    step_of,
    unpacked,
)

ROUNDINGS = 8
SHAPES = pytest.mark.parametrize(("columns", "k"), [(1, 1), (16, 32), (33, 131), (50, 302)])
GROUPS = pytest.mark.parametrize("group", [16, 32, 64, 128])


def drawn(columns: int, k: int, low: int, high: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(low, high, (columns, k), generator=torch.Generator().manual_seed(seed))


@SHAPES
@GROUPS
@pytest.mark.usefixtures("library")
def test_panels_hold_codes_scales_and_zero_points_as_they_are(columns: int, k: int, group: int) -> None:
    groups, of_k = -(-k // group), torch.arange(k) // group
    scales = random(columns, groups).abs()
    codes, zeros = drawn(columns, k, 0, 16), drawn(columns, groups, 0, 17, 1)
    panels = pack_codes(INT4, codes.to(torch.uint8), scales, zeros.to(torch.int8), group)
    assert same_bits(exact_weight(panels), (codes - zeros[:, of_k]).float() * scales[:, of_k])
    panels = pack_codes(NF4, codes.to(torch.uint8), scales, None, group)
    assert same_bits(exact_weight(panels), torch.from_numpy(BOOK)[codes] * scales[:, of_k])
    assert not np.delete(unpacked(panels), range(columns), 0).any()
    floats = torch.arange(columns * k).remainder(256).sub_(127).view(columns, k).to(torch.uint8)
    floats[floats & 127 == 127] = 0  # NaN
    floats = floats.view(torch.float8_e4m3fn)
    assert same_bits(exact_weight(pack_codes(FLOAT8, floats, scales, None, group)), floats.float() * scales[:, of_k])


@pytest.mark.parametrize("type", ["int4", "nf4", "float8"])
@GROUPS
def test_a_projection_with_groups_of_any_size_is_its_product(pool: Pool, type: str, group: int) -> None:
    x = random(40, 301, seed=50)
    part = Part(in_groups(random(70, 301) / 17, type, group), random(70, seed=2))
    check(pool, x, part)


@GROUPS
def test_integers_of_eight_bits_may_have_groups_of_any_size(pool: Pool, group: int) -> None:
    codes, scales = drawn(70, 301, -128, 128).to(torch.int8), random(70, -(-301 // group)).abs()
    part = Part(pack_codes(INT8, codes, scales, None, group), None)
    x, out = random(40, 301, seed=50), empty_rows(40, 70)
    program = Program(pool)
    program.linear(rows_of(x), [part], out, NO_SITE)
    program.run(step_of(40))
    exact = codes.double() * scales.double()[:, torch.arange(301) // group]
    rounding = x.abs().amax(1, keepdim=True).double() / 32767 * exact.abs().sum(1)
    assert ((out.double() - x.double() @ exact.t()).abs() <= rounding).all()


def test_weights_in_another_order_meet_the_numbers_of_a_row_in_it(pool: Pool) -> None:
    order = torch.randperm(301, generator=torch.Generator().manual_seed(3)).int()
    weight = random(70, 301) / 17
    check(pool, random(40, 301, seed=50), Part(in_groups(weight, "int4", 32, order), None))
    ordered = exact_weight(in_groups(weight, "int4", 32, order))
    assert (ordered - weight[:, order.long()]).abs().median() < 0.02


def test_the_numbers_of_nf4_in_two_bytes_are_near_enough(pool: Pool) -> None:
    """To the product with the numbers as they are: what is rounded is 2⁻¹⁶ of the largest of a group, on both sides."""
    x, weight = random(40, 1024, seed=50), in_groups(random(70, 1024), "nf4", 64)
    out, program = empty_rows(40, 70), Program(pool)
    program.linear(rows_of(x), [Part(weight, None)], out, NO_SITE)
    program.run(step_of(40))
    exact = exact_weight(weight).double()
    want, magnitude = x.double() @ exact.t(), x.double().abs() @ exact.abs().t()
    assert (out.double() - want).abs().max() <= 2.0**-16 * magnitude.max()


def check(pool: Pool, x: torch.Tensor, part: Part) -> None:
    for rows in (1, 5, 16, 17, 40):
        out = empty_rows(rows, 70)
        program = Program(pool)
        program.linear(rows_of(x[:rows]), [part], out, NO_SITE)
        program.run(step_of(rows))
        want, magnitude = projected(x[:rows], [part])[0], projected(x[:rows], [part], magnitude=True)[0]
        assert ((out.double() - want).abs() <= ROUNDINGS * UNIT * magnitude).all()


def test_every_float_of_eight_bits_is_exact(pool: Pool) -> None:
    """Times one, at each place of a panel; small ones too, which have no leading bit."""
    floats = torch.arange(256, dtype=torch.uint8)
    floats[[127, 255]] = 0  # NaN
    floats = floats.view(torch.float8_e4m3fn)
    weight = pack_codes(FLOAT8, floats[:, None].contiguous(), torch.full((256, 1), 0.5), None, 16)
    out, program = empty_rows(1, 256), Program(pool)
    program.linear(rows_of(torch.ones(1, 1)), [Part(weight, None)], out, NO_SITE)
    program.run(step_of(1))
    assert torch.equal(out[0], floats.float() / 2)
