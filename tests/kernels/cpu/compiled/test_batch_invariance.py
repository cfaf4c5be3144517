"""A row's bits depend on the row and its adapter alone: not on the rows beside it, its place or the threads."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from kernels.cpu.compiled.program import Part, Pool, Program
from tests.kernels.cpu.compiled.steps import (
    EMBEDDED,
    FLOATS,
    TILE,
    TYPES,
    Adapter,
    Type,
    empty_rows,
    from_tiles,
    in_panels,
    random,
    random_part,
    rows_of,
    same_bits,
    step_of,
)

K, WIDTHS, ROWS = 131, (87, 40, 9), 140
SIZES = (1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 24, 25, 127, 128, 129, ROWS)


def batches(seed: int) -> Iterator[list[int]]:
    """Rows in no order, some of them several times, in batches of many sizes."""
    generator = torch.Generator().manual_seed(seed)
    for size in SIZES:
        yield torch.randint(ROWS, (size,), generator=generator).tolist()
    yield torch.randperm(ROWS, generator=generator).tolist()


def alone(run: "Run", x: Tensor, owners: Sequence[Adapter | None]) -> Tensor:
    return torch.cat([run(x[row : row + 1], owners[row : row + 1]) for row in range(len(x))])


class Run:
    """A projection of three parts."""

    def __init__(self, pool: Pool, type: Type) -> None:
        each = enumerate(WIDTHS)
        parts = [Part(in_panels(random(width, K, seed=i), type), random(width, seed=i)) for i, width in each]
        self._x, self._out = empty_rows(ROWS, K), empty_rows(ROWS, sum(WIDTHS))
        self._gated, self._added = empty_rows(ROWS, 87), rows_of(torch.zeros(ROWS, sum(WIDTHS)))
        self._program = Program(pool)
        self._program.linear(self._x, parts, self._out, 0)
        self._program.linear(self._x, [parts[0], parts[0]], self._gated, 1, "gated", 0.3)
        self._program.linear(self._x, parts, self._added, 0, "add", 0.7)

    def __call__(self, x: Tensor, owners: Sequence[Adapter | None]) -> Tensor:
        rows = len(x)
        self._x[:rows] = x
        self._added[:rows] = x[:, :1]
        self._program.run(step_of(rows, owners))
        return torch.cat((self._out[:rows], self._gated[:rows], self._added[:rows]), 1)


def adapter(seed: int, dtype: Type, subset: tuple[int, ...]) -> Adapter:
    ranks = ((1, 16, 3), (40, 8, 100), (17, 64, 2))[seed % 3]
    made = [random_part(K, WIDTHS[i], ranks[i], 10 * seed + i, dtype, bias=i == 0) for i in range(3)]
    stacked = [made[index] if index in subset else None for index in range(3)]
    return Adapter(stacked, [random_part(K, 87, 24, seed, dtype), made[0] if 1 in subset else None])


@pytest.mark.parametrize("type", TYPES, ids=str)
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapted"])
def test_a_projection_gives_each_row_the_bits_that_it_has_alone(pools: list[Pool], type: Type, adapted: bool) -> None:
    subsets = [(0, 1, 2), (1,), (0, 2), (1, 2)]
    adapters = [adapter(seed, FLOATS[seed % 3], subset) for seed, subset in enumerate(subsets)]
    choice = torch.randint(6, (ROWS,), generator=torch.Generator().manual_seed(1)).tolist()
    owners = [adapters[one] if adapted and one < 4 else None for one in choice]
    x = random(ROWS, K)
    want = alone(Run(pools[0], type), x, owners)
    for seed, pool in enumerate(pools):
        run = Run(pool, type)
        for rows in batches(seed):
            if seed == 1:
                rows.sort(key=lambda row: choice[row])
            assert same_bits(run(x[rows], [owners[row] for row in rows]), want[rows])


def test_one_adapter_of_all_rows_gives_each_row_the_bits_that_it_has_alone(pools: list[Pool]) -> None:
    owners = [adapter(1, torch.bfloat16, (0, 1, 2))] * ROWS
    x = random(ROWS, K)
    want = alone(Run(pools[0], torch.bfloat16), x, owners)
    for seed, pool in enumerate(pools):
        run = Run(pool, torch.bfloat16)
        for rows in batches(seed):
            assert same_bits(run(x[rows], owners[: len(rows)]), want[rows])


@pytest.mark.parametrize("type", TYPES, ids=str)
def test_a_deep_projection_gives_each_row_the_bits_that_it_has_alone(pools: list[Pool], type: Type) -> None:
    k = 2100
    x, part = random(40, k), Part(in_panels(random(70, k, seed=1), type), None)

    def project(pool: Pool, rows: Tensor) -> Tensor:
        out = empty_rows(len(rows), 70)
        program = Program(pool)
        program.linear(rows_of(rows), [part], out, 0)
        program.run(step_of(len(rows)))
        return out

    want = torch.cat([project(pools[0], row[None]) for row in x])
    for pool in pools:
        for rows in range(2, 41):
            assert same_bits(project(pool, x[-rows:]), want[-rows:])


def test_neighbours_of_the_same_adapter_in_one_run_or_in_two_have_the_same_bits(pool: Pool) -> None:
    one, same = (adapter(2, torch.float16, (0, 1, 2)) for _ in range(2))
    run, x = Run(pool, torch.float32), random(20, K)
    together = run(x, [one] * 20)
    for cut in range(1, 20):
        assert same_bits(run(x, [one] * cut + [same] * (20 - cut)), together)


def test_hundreds_of_steps_in_turn_give_the_same_bits(pools: list[Pool]) -> None:
    owners = [adapter(seed % 4, torch.bfloat16, (0, 1, 2)) for seed in range(6)]
    x = random(6, K)
    want = Run(pools[0], torch.bfloat16)(x, owners)
    for pool in pools[1:]:
        run = Run(pool, torch.bfloat16)
        for _ in range(400):
            assert same_bits(run(x, owners), want)


@pytest.mark.parametrize("size", [1, 7, 16, 100])
def test_a_norm_gives_each_row_the_bits_that_it_has_alone(pools: list[Pool], size: int) -> None:
    weight, x = random(size), random(ROWS, size, seed=1)

    def norms(pool: Pool, rows: Tensor) -> Tensor:
        out = empty_rows(len(rows), size)
        program = Program(pool)
        program.rms_norm(rows_of(rows), weight, 1e-5, out)
        program.run(step_of(len(rows)))
        return out

    want = torch.cat([norms(pools[0], row[None]) for row in x])
    for seed, pool in enumerate(pools):
        for rows in batches(seed):
            assert same_bits(norms(pool, x[rows]), want[rows])


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_rotation_gives_each_row_the_bits_that_it_has_alone(pools: list[Pool], dtype: Type, normed: bool) -> None:
    heads, kv_heads, head_dim = 3, 2, 20
    qkv = random(ROWS, (heads + 2 * kv_heads) * head_dim)
    cosines, sines = random(ROWS, head_dim, seed=1), random(ROWS, head_dim, seed=2)
    norms = (random(head_dim, seed=3), random(head_dim, seed=4)) if normed else None

    def rotate(pool: Pool, rows: list[int]) -> tuple[Tensor, Tensor]:
        rotated, kv = rows_of(qkv[rows]), torch.zeros(-(-len(rows) // TILE) * TILE, 2, kv_heads, head_dim, dtype=dtype)
        program = Program(pool)
        program.rotate_write(rotated, kv, heads, norms, 1e-6)
        program.run(step_of(len(rows), slots=range(len(rows)), angles=(cosines[rows], sines[rows])))
        return rotated, from_tiles(kv)[: len(rows)]

    each = [rotate(pools[0], [row]) for row in range(ROWS)]
    want_rotated, want_kv = (torch.cat(one) for one in zip(*each, strict=True))
    for seed, pool in enumerate(pools):
        for rows in batches(seed):
            rotated, kv = rotate(pool, rows)
            assert same_bits(rotated, want_rotated[rows])
            assert same_bits(kv, want_kv[rows])


@pytest.mark.parametrize("type", EMBEDDED, ids=str)
def test_an_embedding_gives_each_row_the_bits_that_it_has_alone(pools: list[Pool], type: Type) -> None:
    vocabulary, hidden = 50, 75
    weight = in_panels(random(vocabulary, hidden), type)
    adapters = [
        Adapter([random_part(vocabulary, hidden, ranks, ranks, dtype, bias=True)], embedding=True)
        for ranks, dtype in zip((1, 16, 40), FLOATS, strict=True)
    ]
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocabulary, (ROWS,), generator=generator).tolist()
    owners = [[None, *adapters][one] for one in torch.randint(4, (ROWS,), generator=generator).tolist()]

    def embed(pool: Pool, rows: list[int]) -> Tensor:
        out = empty_rows(len(rows), hidden)
        program = Program(pool)
        program.embed(weight, out, 0, 1.7)
        program.run(step_of(len(rows), [owners[row] for row in rows], token_ids=[tokens[row] for row in rows]))
        return out

    want = torch.cat([embed(pools[0], [row]) for row in range(ROWS)])
    for seed, pool in enumerate(pools):
        for rows in batches(seed):
            assert same_bits(embed(pool, rows), want[rows])
