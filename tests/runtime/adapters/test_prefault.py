"""Memory that is faulted in before it is written to, and memory that serves one file after another."""

import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from loadtests.soak.processes import held_by
from runtime.adapters.adapter import Adapter
from runtime.adapters.pool import AdapterPool
from runtime.adapters.prefault import AHEAD_BYTES, SPARE_BYTES, SpareMemory, prefault
from runtime.adapters.tier import AdapterTier
from tests.runtime.adapter_format.adapter_files import MODEL, SIZE, adapter, settled, write

MIB = 1 << 20
MARK = 7  # new memory is zero


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_prefaulting_changes_nothing_and_takes_the_memory(dtype: torch.dtype) -> None:
    memory = torch.empty(64 * MIB // dtype.itemsize, dtype=dtype)
    memory[: 3 * MIB] = 7
    prefault(memory)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    memory[3 * MIB :] = 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 100, "it was taken by the first writer"
    assert bool((memory[: 3 * MIB] == 7).all())


@pytest.mark.parametrize("elements", [0, 1, 1000])
def test_any_size_can_be_prefaulted(elements: int) -> None:
    memory = torch.full((elements,), 7.0)
    prefault(memory)
    assert bool((memory == 7).all())


@pytest.fixture
def tier() -> Iterator[AdapterTier]:
    tier = AdapterTier("host", 4 * AHEAD_BYTES, torch.float32, "cpu", page_locked=False)
    yield tier
    tier.check()


def reserve(tier: AdapterTier, digest: str, size: int) -> bool:
    return tier.reserve(Adapter(digest=digest, source=b""), size, place=0)


def test_what_lies_ahead_is_said_once_and_ends_with_the_tier(tier: AdapterTier) -> None:
    assert tier.ahead().nbytes == AHEAD_BYTES
    assert tier.ahead().nbytes == 0
    assert reserve(tier, "a", MIB)
    first = tier.ahead()
    assert (first.nbytes, first.storage_offset()) == (MIB, AHEAD_BYTES // 4)
    tier.drop("a")
    assert reserve(tier, "b", MIB)
    assert tier.ahead().nbytes == 0, "it lies where a was"
    assert reserve(tier, "c", 3 * AHEAD_BYTES + MIB)
    assert tier.ahead().nbytes == 3 * AHEAD_BYTES - MIB
    assert tier.ahead().nbytes == 0


def test_pinned_adapters_at_the_top_end_reach_nothing(tier: AdapterTier) -> None:
    tier.ahead()
    assert tier.pin("a", MIB) is None
    assert reserve(tier, "a", MIB)
    assert tier.ahead().nbytes == 0


def marked(spare: SpareMemory, size: int) -> np.ndarray:
    memory = spare.take(size)
    memory[:10] = MARK
    return memory


def is_marked(memory: np.ndarray) -> bool:
    return bool((memory[:10] == MARK).all())


def test_memory_that_nobody_refers_to_any_more_serves_the_next_file_of_its_size_or_less() -> None:
    spare = SpareMemory(2)
    marked(spare, 1000)
    for size in (1000, 10, 1000):
        memory = spare.take(size)
        assert memory.nbytes == size
        assert is_marked(memory)
        del memory
    larger = spare.take(1001)
    assert larger.nbytes == 1001
    assert not is_marked(larger)


@pytest.mark.parametrize(
    "part",
    [
        lambda memory: memory[500:],
        lambda memory: memory[4:8].view("<f4"),
        lambda memory: memory.data[500:].toreadonly(),
        lambda memory: np.frombuffer(memory.data[500:], np.uint8)[:10],
        lambda memory: memory.reshape(2, 500).T[3:],
    ],
)
def test_it_serves_nobody_else_while_there_is_a_part_of_it(part: Callable[[np.ndarray], object]) -> None:
    spare = SpareMemory(2)
    memory = marked(spare, 1000)
    rest = part(memory)
    del memory
    assert not is_marked(spare.take(1000))
    spare = SpareMemory(2)
    memory = marked(spare, 1000)
    rest = part(memory)
    del memory, rest
    assert is_marked(spare.take(1000))


def test_only_so_many_pieces_are_kept() -> None:
    spare = SpareMemory(2)
    pieces = [marked(spare, 100) for _ in range(3)]
    pieces.clear()
    pieces = [spare.take(100) for _ in range(3)]
    assert [is_marked(piece) for piece in pieces] == [True, True, False]


@pytest.mark.parametrize(("size", "kept"), [(SPARE_BYTES, True), (SPARE_BYTES + 1, False)])
def test_a_large_piece_goes_back_to_the_system(size: int, kept: bool) -> None:
    spare = SpareMemory(2)
    marked(spare, size)
    assert is_marked(spare.take(size)) == kept


def test_what_is_not_kept_leaves_no_holes_in_the_heap() -> None:
    first = bytearray(b"x") * (24 * MIB)  # once freed, the C library takes smaller pieces from the heap
    del first
    spare, pieces, between = SpareMemory(2), [], []
    before = held_by(os.getpid()).memory
    for _ in range(16):
        pieces.append(spare.take(4 * MIB))
        pieces[-1][:] = 1
        between.append(bytearray(b"x") * (MIB // 4))
    full = held_by(os.getpid()).memory
    assert full - before > 64
    pieces.clear()
    kept = 2 * 4 * MIB / 1e6
    assert held_by(os.getpid()).memory < before + kept + len(between) * MIB / 4e6 + 4


def test_files_read_into_the_memory_of_earlier_ones_are_themselves(tmp_path: Path) -> None:
    adapters = [adapter(seed=rank, rank=rank) for rank in (8, 4, 16, 2, 8)]
    read, given = (AdapterPool(MODEL, 64 * SIZE, 64 * SIZE, torch.float32, "cpu") for _ in range(2))
    for digest, content in adapters:
        read.register(digest, write(tmp_path, content, digest))
        given.register(digest, content)
        for pool in (read, given):
            pool.load(digest, "device")
            settled(pool)
    for digest, _ in adapters:
        assert torch.equal(read.device.extent(digest), given.device.extent(digest))
    read.close()
    given.close()
