"""The grouped LoRA kernels over tiles, and their twins in PyTorch, against a plain product row by row in float64."""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, cycle, pairwise, product
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.lora_tiles import BASE, TILE_FIELDS, Tiles, lay_tiles
from kernels.offset_table import ALIGNMENT, PartEntry, SiteEntry, table_rows
from kernels.reference import grouped_lora as reference

pytest.importorskip("triton", reason="needs triton")

from kernels import grouped_lora
from kernels.grouped_lora import (
    DECODE,
    DECODE_EXPAND,
    DECODE_SHRINK,
    PREFILL,
    PREFILL_EXPAND,
    PREFILL_SHRINK,
    ExpandConfig,
    ShrinkConfig,
)

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# The result is rounded once, by half a unit in its last place on a GPU. Triton's interpreter cuts bfloat16 off instead.
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8 if GPU else 2**-7}
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
    "bf16 with fp32 adapters": (torch.bfloat16, torch.float32),
    "fp32 with bf16 adapters": (torch.float32, torch.bfloat16),
}
ALL_DTYPES = pytest.mark.parametrize(("model", "weights"), DTYPES.values(), ids=DTYPES.keys())
POPULARITY = {
    "distinct": list(range(9)),
    "uniform": [0, 3, 1, 2, 0, 1, 3, 2, 1],
    "zipf": [0, 0, 0, 0, 0, 1, 1, 2, 3],
    "identical": [2] * 9,
    "one row": [1],
    "base only": [BASE] * 9,
    "base among them": [0, BASE, BASE, 0, 1, BASE, 2, 2, BASE],
    "a long prefill": [0] * 70 + [1] * 3 + [BASE] * 2,
}
POPULARITIES = pytest.mark.parametrize("slots", POPULARITY.values(), ids=POPULARITY.keys())
SHAPES = {
    "one part": (24, (40,)),
    "stacked": (33, (17, 5, 5)),
    "model-like": (160, (96, 32, 32)),
    "tiny": (1, (1, 1)),
}
RANKS = (1, 4, 16, 3, 33)
ADAPTERS, SITES, SITE = 9, 3, 1


class Part(NamedTuple):
    a: Tensor  # (rank, in)
    b: Tensor  # (rank, out)
    bias: Tensor | None
    gain: Tensor | None = None  # of DoRA


Adapter = Sequence[Part | None]  # at the one site that these tests adapt


class Memory(NamedTuple):
    """Resident adapters. The arena is NaN between weights, so that a read beside them shows."""

    arena: Tensor
    table: Tensor
    width: int


def random_adapter(seed: int, inputs: int, widths: Sequence[int], dtype: torch.dtype) -> Adapter:
    """Some parts, of different ranks, every other with a bias, every third with gains; adapter 3 has other sites."""
    generator = torch.Generator().manual_seed(seed)

    def weights(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    adapted = [{0, 1, 2}, {0}, {len(widths) - 1}, set(), {0, len(widths) - 1}][seed % 5]
    parts: list[Part | None] = []
    for index, width in enumerate(widths):
        rank = RANKS[(seed + index) % len(RANKS)]
        bias = weights(width) if (seed + index) % 2 else None
        gain = weights(width) if (seed + index) % 3 == 0 else None
        part = Part(weights(rank, inputs) / inputs**0.5, weights(rank, width), bias, gain)
        parts.append(part if index in adapted else None)
    return parts


def load(adapters: Sequence[Adapter], dtype: torch.dtype, width: int = 64, embedding: bool = False) -> Memory:
    """Put the adapters into an arena, the last one first."""
    chunks: list[Tensor] = []
    end = 0

    def put(values: Tensor) -> int:
        nonlocal end
        padding = torch.full((ALIGNMENT + -values.numel() % ALIGNMENT,), torch.nan, dtype=dtype)
        chunks.extend([values.flatten(), padding])
        start, end = end, end + values.numel() + len(padding)
        return start

    rows = []
    for adapter in reversed(adapters):
        adapted = [part for part in adapter if part is not None]
        entry = None
        if adapted:
            a = torch.cat([part.a for part in adapted])
            offset = put(a.t() if embedding else a)
            entry = SiteEntry(offset, [part and entry_of(part, put) for part in adapter])
        rows.append(table_rows([entry if site == SITE else None for site in range(SITES)], width))
    put(torch.empty(0, dtype=dtype))
    return Memory(torch.cat(chunks).to(DEVICE), torch.stack(rows[::-1]).to(DEVICE), width)


def entry_of(part: Part, put: Callable[[Tensor], int]) -> PartEntry:
    bias, gain = (None if each is None else put(each) for each in (part.bias, part.gain))
    return PartEntry(len(part.b), put(part.b), bias, gain)


def tiles_of(slots: Sequence[int], height: int = 16, spare: int = 2) -> Tiles:
    fields = np.full((len(slots) + spare, TILE_FIELDS), 99, np.int32)
    lay_tiles(np.array(slots, np.int32), height, fields)
    return Tiles(torch.from_numpy(fields).to(DEVICE), height)


def scratch(rows: int, memory: Memory, splits: int = 16) -> Tensor:
    return torch.full((rows, splits, memory.width), torch.nan, device=DEVICE)


def by_kernels(
    x: Tensor,
    y: Tensor,
    memory: Memory,
    tiles: Tiles,
    widths: Sequence[int],
    shrink_config: ShrinkConfig = DECODE_SHRINK,
    expand_config: ExpandConfig = DECODE_EXPAND,
) -> None:
    arena, table, _ = memory
    t = grouped_lora.shrink(x, SITE, arena, table, tiles, scratch(len(x), memory), shrink_config)
    grouped_lora.expand(t, y, SITE, arena, table, tiles, widths, expand_config)


def by_reference(x: Tensor, y: Tensor, memory: Memory, tiles: Tiles, widths: Sequence[int]) -> None:
    arena, table, _ = memory
    t = reference.shrink(x, SITE, arena, table, tiles, scratch(len(x), memory))
    reference.expand(t, y, SITE, arena, table, tiles, widths)


WAYS = pytest.mark.parametrize("way", [by_kernels, by_reference], ids=["kernels", "reference"])


def columns_of(widths: Sequence[int]) -> Iterator[slice]:
    yield from (slice(*bounds) for bounds in pairwise(accumulate(widths, initial=0)))


def expected(
    y: Tensor, x: Tensor, slots: Sequence[int], adapters: Sequence[Adapter], widths: Sequence[int], sums: bool = False
) -> Tensor:
    """Adapter by adapter in float64; with `sums`, of absolute values: that bounds every partial sum."""
    see = torch.Tensor.abs if sums else torch.Tensor.double
    result = see(y.cpu()).double()
    for slot in {*slots} - {BASE}:
        rows = [row for row, of_row in enumerate(slots) if of_row == slot]
        inputs = see(x[rows].cpu()).double()
        for part, columns in zip(adapters[slot], columns_of(widths), strict=False):
            if part is not None:
                a, b = see(part.a).double(), see(part.b).double()
                bias = 0 if part.bias is None else see(part.bias).double()
                gain = 1 if part.gain is None else see(part.gain).double()
                result[rows, columns] = (result[rows, columns] + inputs @ a.T @ b) * gain + bias
    return result


def check(
    got: Tensor, y: Tensor, x: Tensor, slots: Sequence[int], adapters: Sequence[Adapter], widths: Sequence[int]
) -> None:
    """A sum of n float32 terms, in any order, is off by n · 2⁻²⁴ of their absolute values at most.

    The terms: the inputs, the splits, each rank three times, bias and y. Other rows and columns keep their bits.
    """
    want = expected(y, x, slots, adapters, widths)
    sums = expected(y, x, slots, adapters, widths, sums=True)
    ranks = max((len(part.b) for adapter in adapters for part in adapter if part is not None), default=0)
    terms = x.shape[1] + 16 + 3 * ranks + 2
    error = (got.cpu().double() - want).abs()
    assert (error <= ROUNDING[got.dtype] * want.abs() + terms * 2**-24 * sums).all(), (
        f"off by {float((error / sums).nan_to_num().max())} of the sums"
    )
    for row, slot in enumerate(slots):
        for index, columns in enumerate(columns_of(widths)):
            if slot == BASE or adapters[slot][index] is None:
                assert bits(got[row, columns]) == bits(y[row, columns])


def bits(values: Tensor) -> list[int]:
    return values.contiguous().view(torch.int16 if values.dtype == torch.bfloat16 else torch.int32).tolist()


def random_rows(rows: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn((rows, width), generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


@POPULARITIES
@WAYS
@pytest.mark.parametrize(
    ("shape", "model", "weights"),
    [
        pytest.param(shape, model, weights, id=f"{name}, {dtypes}")
        for name, shape in SHAPES.items()
        for dtypes, (model, weights) in DTYPES.items()
        if model == weights or name == "stacked"
    ],
)
def test_every_row_gets_its_own_adapters_product(
    shape: tuple[int, Sequence[int]], way: Callable, slots: Sequence[int], model: torch.dtype, weights: torch.dtype
) -> None:
    inputs, widths = shape
    adapters = [random_adapter(seed, inputs, widths, weights) for seed in range(ADAPTERS)]
    x, y = random_rows(len(slots), inputs, model, 1), random_rows(len(slots), sum(widths), model, 2)
    before = y.clone()
    way(x, y, load(adapters, weights), tiles_of(slots), widths)
    check(y, before, x, slots, adapters, widths)


def configurations() -> Iterator[tuple[int, ShrinkConfig, ExpandConfig]]:
    """Every height, shrink and expand that may be chosen, side by side; on a GPU every height with every shrink."""
    for heights, shrinks, expands in (DECODE, PREFILL):
        if GPU:
            combined = list(product(heights, shrinks))
        else:  # the interpreter has neither warps nor stages
            shrinks = tuple({config[:3]: config for config in shrinks}.values())
            expands = tuple({config[:2]: config for config in expands}.values())
            combined = list(zip(cycle(heights), shrinks, strict=False))
        assert len(shrinks) >= len(expands)
        yield from ((height, shrink, expand) for (height, shrink), expand in zip(combined, cycle(expands)))


@pytest.mark.parametrize(("height", "shrink_config", "expand_config"), list(configurations()))
def test_every_candidate_is_right_where_no_block_fits(
    height: int, shrink_config: ShrinkConfig, expand_config: ExpandConfig
) -> None:
    inputs, widths, slots = 281, (131, 20), [4] * (height + 3) + [BASE, 5]
    adapters = [random_adapter(seed, inputs, widths, torch.bfloat16) for seed in range(6)]
    x, y = random_rows(len(slots), inputs + 7, torch.float32, 1), random_rows(len(slots), 160, torch.float32, 2)
    x, y = x[:, :inputs], y[:, 9:]  # of wider rows
    before = y.clone()
    memory, tiles = load(adapters, torch.bfloat16), tiles_of(slots, height, spare=0)
    used = Tiles(tiles.fields[:3], height)  # as outside graphs
    by_kernels(x, y, memory, used, widths, shrink_config, expand_config)
    check(y, before, x, slots, adapters, widths)


@pytest.mark.parametrize("rank", [1, 2, 15, 16, 17, 31, 33, 64, 100, 255, 256])
def test_any_rank_is_multiplied_whole(rank: int) -> None:
    dtype = torch.bfloat16
    part = Part(random_rows(rank, 24, dtype, rank).cpu() / 24**0.5, random_rows(rank, 40, dtype, 1).cpu(), None)
    adapters, slots, widths = [[part, part]], [0, BASE, 0], (40, 40)
    x, y = random_rows(3, 24, dtype, 2), random_rows(3, 80, dtype, 3)
    before = y.clone()
    memory = load(adapters, dtype, width=2 * rank)
    by_kernels(x, y, memory, tiles_of(slots), widths, PREFILL_SHRINK, PREFILL_EXPAND)
    check(y, before, x, slots, adapters, widths)


@WAYS
def test_a_part_without_ranks_is_scaled_and_shifted(way: Callable[..., None]) -> None:
    inputs, widths = 24, (40, 20)
    generator = torch.Generator().manual_seed(2)
    bias, gain = (torch.randn(20, generator=generator) for _ in range(2))
    none = Part(torch.empty(0, inputs), torch.empty(0, 20), None)
    adapters: list[Adapter] = [
        [random_adapter(1, inputs, (40,), torch.float32)[0], none._replace(bias=bias)],
        [None, none._replace(gain=gain)],
        [None, none._replace(bias=bias, gain=gain)],
    ]
    slots = [0, BASE, 1, 2, 2, 0]
    x, y = (torch.randn(len(slots), width, generator=generator).to(DEVICE) for width in (inputs, sum(widths)))
    got = y.clone()
    way(x, got, load(adapters, torch.float32), tiles_of(slots), widths)
    check(got, y, x, slots, adapters, widths)


@pytest.mark.parametrize("twin", [grouped_lora, reference], ids=["kernels", "reference"])
def test_a_tile_of_an_expert_has_the_experts_site_and_one_of_the_base_none(twin: ModuleType) -> None:
    widths, slots = (20, 33), [0] * 3 + [BASE] * 4 + [4] * 2
    adapters = [random_adapter(seed, 40, widths, torch.float32) for seed in range(ADAPTERS)]
    arena, table, _ = memory = load(adapters, torch.float32)
    x, y = random_rows(len(slots), 40, torch.float32, 1), random_rows(len(slots), sum(widths), torch.float32, 2)
    # Expert 1, whose site is the adapted one; expert 0, whose site no adapter adapts; rows without an adapter
    fields = [[0, 3, 0, 1], [3, 4, BASE, 1], [7, 2, 4, 0], [0, 0, 0, 0]]
    tiles, before, first = Tiles(torch.tensor(fields, dtype=torch.int32, device=DEVICE), 16), y.clone(), SITE - 2
    configs = ([DECODE_SHRINK], [DECODE_EXPAND]) if twin is grouped_lora else ([], [])
    t = twin.shrink(x, first, arena, table, tiles, scratch(len(x), memory), *configs[0])
    twin.expand(t, y, first, arena, table, tiles, widths, *configs[1])
    check(y, before, x, [0] * 3 + [BASE] * 6, adapters, widths)


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "reference"])
def test_the_shrink_writes_the_ranks_of_its_rows_and_nothing_else(kernels: bool) -> None:
    slots = POPULARITY["base among them"]
    adapters = [random_adapter(seed, 24, (20, 12), torch.bfloat16) for seed in range(3)]
    memory, x = load(adapters, torch.bfloat16, width=37), random_rows(len(slots), 24, torch.bfloat16, 1)
    t = scratch(len(slots), memory)
    arguments = x, SITE, memory.arena, memory.table, tiles_of(slots), t
    used = grouped_lora.shrink(*arguments, DECODE_SHRINK) if kernels else reference.shrink(*arguments)
    assert used.shape[1] == (DECODE_SHRINK.split_k if kernels else 1)
    for row, slot in enumerate(slots):
        ranks = 0 if slot == BASE else sum(len(part.b) for part in adapters[slot] if part is not None)
        assert used[row, :, :ranks].isfinite().all()
        assert used[row, :, ranks:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_expand_loses_no_bit_of_t(dtype: torch.dtype) -> None:
    """With an identity for B and zeros for y, the result is t, whose values use all bits of float32."""
    rank, slots = 17, [0, 0, 0]
    adapters = [[Part(torch.zeros(rank, 1, dtype=dtype), torch.eye(rank, dtype=dtype), None)]]
    arena, table, _ = load(adapters, dtype)
    t, y = random_rows(3, rank, torch.float32, 1)[:, None], torch.zeros(3, rank, device=DEVICE)
    grouped_lora.expand(t, y, SITE, arena, table, tiles_of(slots), (rank,), DECODE_EXPAND)
    assert bits(y) == bits(t[:, 0])


@ALL_DTYPES
@WAYS
def test_rows_of_the_base_and_of_others_keep_their_bits_beside_infinities(
    way: Callable, model: torch.dtype, weights: torch.dtype
) -> None:
    inputs, widths, slots = 24, (20, 12), [BASE, 5, 5, 1, 1, BASE, 0]
    adapters = [random_adapter(seed, inputs, widths, weights) for seed in range(6)]
    adapters[1] = [part and part._replace(a=part.a * torch.inf) for part in adapters[1]]
    memory, tiles = load(adapters, weights), tiles_of(slots)
    x, y = random_rows(7, inputs, model, 1), torch.full((7, 32), -0.0, dtype=model, device=DEVICE)
    y[5] = torch.nan
    clean = y.clone()
    with np.errstate(all="ignore"):  # the interpreter is numpy
        way(x, clean, memory, tiles, widths)
        x[1], x[0] = torch.inf, torch.nan
        way(x, y, memory, tiles, widths)
    assert not y[1].isfinite().any()
    assert not y[3:5, :20].isfinite().any()
    assert y[0].eq(0).all()
    for row in (0, 2, 5, 6):
        assert bits(y[row]) == bits(clean[row])
    for untouched in (y[0], y[3:5, 20:]):  # adapter 1 does not adapt the second part
        assert untouched.eq(0).all()
        assert untouched.signbit().all()


@ALL_DTYPES
@POPULARITIES
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "reference"])
def test_an_embeddings_rows_get_the_rows_of_their_tokens(
    kernels: bool, slots: Sequence[int], model: torch.dtype, weights: torch.dtype
) -> None:
    vocab, widths = 50, (24,)
    adapters = [random_adapter(seed, vocab, widths, weights) for seed in range(ADAPTERS)]
    memory, tiles = load(adapters, weights, embedding=True), tiles_of(slots)
    token_ids = torch.randint(vocab, (len(slots),), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    y = random_rows(len(slots), 24, model, 2)
    before, room = y.clone(), scratch(len(slots), memory)
    arena, table, _ = memory
    if kernels:
        t = grouped_lora.embedding_shrink(token_ids, SITE, arena, table, tiles, room)
        grouped_lora.expand(t, y, SITE, arena, table, tiles, widths, DECODE_EXPAND)
    else:
        t = reference.embedding_shrink(token_ids, SITE, arena, table, tiles, room)
        reference.expand(t, y, SITE, arena, table, tiles, widths)
    check(y, before, torch.nn.functional.one_hot(token_ids, vocab), slots, adapters, widths)


def recorded(launch: Callable[[], None]) -> Callable[[], None]:
    """`launch` as a CUDA graph where there is a GPU."""
    if not GPU:
        return launch
    launch()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return graph.replay


def test_one_launch_serves_whatever_its_buffers_hold_later() -> None:
    """Captured for a batch of the base alone; then more and fewer tiles, and other adapters in the same slots."""
    inputs, widths, rows, dtype = 24, (20, 12), 12, torch.bfloat16
    adapters = [random_adapter(seed, inputs, widths, dtype) for seed in range(rows)]
    others = [random_adapter(seed + 7, inputs, widths, dtype) for seed in range(rows)]
    first, second = load(adapters, dtype), load(others, dtype)
    arena = torch.full((max(len(first.arena), len(second.arena)),), torch.nan, dtype=dtype, device=DEVICE)
    memory = Memory(arena, torch.zeros_like(first.table), 64)
    tiles = tiles_of([BASE] * rows, spare=0)
    x, y = random_rows(rows, inputs, dtype, 1), random_rows(rows, 32, dtype, 2)
    t = scratch(rows, memory, splits=4)

    def launch() -> None:
        shrunk = grouped_lora.shrink(x, SITE, arena, memory.table, tiles, t, DECODE_SHRINK)
        grouped_lora.expand(shrunk, y, SITE, arena, memory.table, tiles, widths, DECODE_EXPAND)

    replay = recorded(launch)
    batches = [list(range(rows)), [3] * 9 + [BASE] * 3, [BASE] * rows, [7, 7, BASE, 2] * 3, [11] * rows]
    for seed, (slots, resident) in enumerate(zip(batches, cycle([first, second]), strict=False)):
        arena[: len(resident.arena)] = resident.arena
        memory.table.copy_(resident.table)
        tiles.fields.copy_(tiles_of(slots, spare=0).fields)
        x.copy_(random_rows(rows, inputs, dtype, seed))
        y.copy_(random_rows(rows, 32, dtype, seed + 100))
        before = y.clone()
        replay()
        check(y, before, x, slots, adapters if resident is first else others, widths)


def test_the_defaults_are_candidates() -> None:
    assert DECODE_SHRINK in DECODE.shrink
    assert DECODE_EXPAND in DECODE.expand
    assert PREFILL_SHRINK in PREFILL.shrink
    assert PREFILL_EXPAND in PREFILL.expand
