"""Norms, rotations and the write to the K/V cache against float64 and against PyTorch's rounding."""

import pytest
import torch
from torch import Tensor

from kernels.cpu.compiled.program import Pool, Program
from kernels.cpu.elementwise import kv_write, rotary
from tests.kernels.cpu.compiled.steps import (
    TILE,
    empty_rows,
    from_tiles,
    gaps_are_kept,
    in_tiles,
    random,
    rows_of,
    same_bits,
    step_of,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
ROWS = pytest.mark.parametrize("rows", [1, 7, 130])
# heads, K/V heads and their size
SHAPES = pytest.mark.parametrize("shape", [(1, 1, 2), (3, 1, 20), (9, 3, 64), (4, 4, 34)], ids=str)
EPS = 1e-5
Norms = tuple[Tensor, Tensor] | None


def exact_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def norm(pool: Pool, x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    out = empty_rows(*x.shape)
    program = Program(pool)
    program.rms_norm(rows_of(x), weight, eps, out)
    program.run(step_of(len(x)))
    assert gaps_are_kept(out)
    return out


@ROWS
@pytest.mark.parametrize("size", [1, 3, 8, 16, 17, 64, 577])
def test_a_norm_is_its_formula(pool: Pool, rows: int, size: int) -> None:
    for eps, scale in ((1e-6, 1.0), (0.5, 30.0), (1e-5, 1e-4)):
        x, weight = random(rows, size) * scale, random(size, seed=1)
        torch.testing.assert_close(
            norm(pool, x, weight, eps).double(), exact_norm(x, weight, eps), rtol=2e-6, atol=1e-12
        )


def test_a_row_of_zeros_stays_zeros_and_nan_and_infinity_reach_no_other_row(pool: Pool) -> None:
    weight, x = random(20), random(6, 20, seed=1)
    x[0] = 0.0
    clean = norm(pool, x, weight)
    assert not clean[0].any()
    x[2, 5], x[4, 19] = torch.nan, torch.inf
    got = norm(pool, x, weight)
    assert got[2].isnan().all()
    assert got[4, 19].isnan()
    assert same_bits(got[[0, 1, 3, 5]], clean[[0, 1, 3, 5]])


def test_the_norm_of_the_logits_rows_gathers_them(pool: Pool) -> None:
    weight, x, out = random(40), random(300, 40, seed=1), empty_rows(5, 40)
    program = Program(pool)
    program.rms_norm(rows_of(x), weight, EPS, out, of_logits=True)
    program.run(step_of(300, logit_rows=[299, 0, 17]))
    assert same_bits(out[:3], norm(pool, x, weight)[[299, 0, 17]])
    assert out[3:].isnan().all()


class Rotation:
    """Random rows of a projection, their angles, and a cache of random numbers that they are written to."""

    def __init__(self, rows: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.heads, self.kv_heads, self.head_dim = shape
        self.qkv = random(rows, (self.heads + 2 * self.kv_heads) * self.head_dim)
        angles = random(rows, self.head_dim // 2, seed=1) * 40
        self.cosines = torch.cat((angles.cos(), angles.cos()), -1)
        self.sines = torch.cat((-angles.sin(), angles.sin()), -1)
        slots = -(-(rows + 9) // TILE) * TILE
        self.kv = random(slots, 2, self.kv_heads, self.head_dim, seed=2).to(dtype)
        self.slots = torch.randperm(slots, generator=torch.Generator().manual_seed(3))[:rows]

    def run(self, pool: Pool, norms: Norms = None, **turning: int) -> tuple[Tensor, Tensor]:
        """The rotated rows and the cache after the write."""
        qkv, tiles = rows_of(self.qkv), in_tiles(self.kv)
        program = Program(pool)
        program.rotate_write(qkv, tiles, self.heads, norms, EPS, **turning)
        step = step_of(len(qkv), slots=self.slots.tolist(), angles=(self.cosines, self.sines))
        program.run(step)
        assert gaps_are_kept(qkv)
        return qkv, from_tiles(tiles)

    def exact(self, norms: Norms) -> tuple[Tensor, Tensor]:
        """Rotated queries and keys, and values, by the PyTorch kernel in float64."""
        each = self.qkv.double().view(len(self.qkv), -1, self.head_dim)
        rotated, values = each[:, : -self.kv_heads].clone(), each[:, -self.kv_heads :]
        if norms is not None:
            rotated[:, : self.heads] = exact_norm(rotated[:, : self.heads], norms[0], EPS)
            rotated[:, self.heads :] = exact_norm(rotated[:, self.heads :], norms[1], EPS)
        rotary(rotated, self.cosines.double()[:, None], self.sines.double()[:, None], out=rotated)
        return rotated, values


@DTYPES
@ROWS
@SHAPES
@pytest.mark.parametrize("normed", [False, True])
def test_heads_are_normed_and_rotated_and_written_to_their_slots(
    pool: Pool, rows: int, shape: tuple[int, int, int], normed: bool, dtype: torch.dtype
) -> None:
    rotation = Rotation(rows, shape, dtype)
    norms = (random(shape[2], seed=4), random(shape[2], seed=5)) if normed else None
    qkv, kv = rotation.run(pool, norms)
    rotated, values = rotation.exact(norms)
    got = qkv.reshape(rows, -1, shape[2])
    torch.testing.assert_close(got[:, : -shape[1]].double(), rotated, rtol=2e-6, atol=2e-6)
    assert same_bits(got[:, -shape[1] :], values.float())
    want = rotation.kv.clone()
    keys_values = torch.stack((got[:, shape[0] : -shape[1]], got[:, -shape[1] :]), 1)
    kv_write(want, rotation.slots, keys_values.to(dtype))
    assert same_bits(kv, want)


def test_a_cache_of_bfloat16_rounds_to_nearest_even_as_torch_does(pool: Pool) -> None:
    """Every tie, every neighbour of a tie, and what is special."""
    high = torch.arange(1 << 16, dtype=torch.int32) << 16
    low = torch.tensor([0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    numbers = (high[:, None] | low).view(torch.float32)
    rotation = Rotation(6, (1, 1, 1 << 15), torch.bfloat16)
    for half in numbers.split(1 << 15):
        rotation.qkv[:, 2 << 15 :] = half.t()
        _, kv = rotation.run(pool)
        got, want = kv[rotation.slots, 1, 0], half.t().bfloat16()
        assert torch.equal(got.isnan(), half.t().isnan())
        there = ~got.isnan()
        assert same_bits(got[there], want[there])


@DTYPES
def test_nan_and_infinity_stay_and_reach_no_other_row(pool: Pool, dtype: torch.dtype) -> None:
    rotation = Rotation(5, (3, 2, 20), dtype)
    clean_qkv, clean_kv = rotation.run(pool)
    rotation.qkv[1, 65], rotation.qkv[1, 110], rotation.qkv[3] = torch.nan, -torch.inf, torch.nan
    qkv, kv = rotation.run(pool)
    assert kv[rotation.slots[1], 0, 0, 5].isnan()
    assert kv[rotation.slots[1], 1, 0, 10] == -torch.inf
    assert kv[rotation.slots[3]].isnan().all()
    rows = [0, 2, 4]
    assert same_bits(qkv[rows], clean_qkv[rows])
    assert same_bits(kv[rotation.slots[rows]], clean_kv[rotation.slots[rows]])


@ROWS
def test_a_norm_is_added_to_what_is_there(pool: Pool, rows: int) -> None:
    x, before, weight = random(rows, 37), random(rows, 37, seed=1), random(37, seed=2)
    out, program = rows_of(before), Program(pool)
    program.rms_norm(rows_of(x), weight, EPS, out, add=True)
    program.run(step_of(rows))
    assert gaps_are_kept(out)
    torch.testing.assert_close(out.double(), before + exact_norm(x, weight, EPS), rtol=2e-6, atol=2e-6)


@ROWS
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("turned", [0, 8, 20])
def test_some_dimensions_turn_in_pairs_and_the_others_stay(
    pool: Pool, rows: int, turned: int, interleaved: bool
) -> None:
    """As complex numbers, by the angles of the second rope of a step."""
    rotation = Rotation(rows, (3, 1, 20), torch.float32)
    angles = random(rows, turned // 2, seed=6) * 40
    pairs = torch.arange(turned).view(-1, 2) if interleaved else torch.arange(turned).view(2, -1).T
    other = rotation.cosines, rotation.sines
    rotation.cosines, rotation.sines = (torch.stack((each, torch.full_like(each, torch.nan))) for each in other)
    rotation.cosines[1, :, pairs] = angles.cos()[:, :, None]
    rotation.sines[1, :, pairs] = torch.stack((-angles.sin(), angles.sin()), -1)
    qkv, _ = rotation.run(pool, turned=turned, rope=1, interleaved=interleaved)
    got = qkv.reshape(rows, -1, 20)
    want = rotation.qkv.view(rows, -1, 20).double()
    each = torch.view_as_complex(want[:, :4, pairs].contiguous())
    want[:, :4, pairs] = torch.view_as_real(each * torch.exp(1j * angles.double()[:, None]))
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6)
    assert same_bits(got[:, :4, turned:], rotation.qkv.view(rows, -1, 20)[:, :4, turned:])


@ROWS
def test_a_norm_of_all_heads_together_comes_before_the_rotation(pool: Pool, rows: int) -> None:
    rotation = Rotation(rows, (3, 2, 20), torch.float32)
    norms = random(3 * 20, seed=4), random(2 * 20, seed=5)
    qkv, _ = rotation.run(pool, norms)
    heads = rotation.qkv.split([60, 40, 40], 1)
    normed = (exact_norm(x, weight, EPS) for x, weight in zip(heads, norms, strict=False))
    rotation.qkv = torch.cat((*normed, heads[2].double()), 1)
    rotated, _ = rotation.exact(None)
    torch.testing.assert_close(qkv.reshape(rows, -1, 20)[:, :5].double(), rotated, rtol=2e-6, atol=2e-6)
