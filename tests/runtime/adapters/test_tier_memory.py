"""Memory of a tier that is found before it is needed."""

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from runtime.adapters.pool import AdapterPool
from runtime.adapters.tier import AHEAD_BYTES, AdapterTier
from runtime.adapters.tier_entry import Claim
from runtime.adapters.tier_memory import touch
from tests.runtime.adapter_format.adapter_files import MODEL, SIZE, adapter, settled, write

MIB = 1 << 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_touching_changes_nothing_and_takes_the_memory(dtype: torch.dtype) -> None:
    memory = torch.empty(64 * MIB // dtype.itemsize, dtype=dtype)
    memory[: 3 * MIB] = 7
    touch(memory)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    memory[3 * MIB :] = 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 100, "it was taken by the first writer"
    assert bool((memory[: 3 * MIB] == 7).all())


@pytest.mark.parametrize("elements", [0, 1, 1000])
def test_any_size_can_be_touched(elements: int) -> None:
    memory = torch.full((elements,), 7.0)
    touch(memory)
    assert bool((memory == 7).all())


@pytest.fixture
def tier() -> Iterator[AdapterTier]:
    tier = AdapterTier("host", 4 * AHEAD_BYTES, torch.float32, "cpu", page_locked=False)
    yield tier
    tier.check()


def test_what_lies_ahead_is_said_once_and_ends_with_the_tier(tier: AdapterTier) -> None:
    assert tier.ahead().nbytes == AHEAD_BYTES
    assert tier.ahead().nbytes == 0
    assert tier.reserve("a", MIB, Claim.AWAITED)
    first = tier.ahead()
    assert (first.nbytes, first.storage_offset()) == (MIB, AHEAD_BYTES // 4)
    tier.drop("a")
    assert tier.reserve("b", MIB, Claim.AWAITED)
    assert tier.ahead().nbytes == 0, "it lies where a was"
    assert tier.reserve("c", 3 * AHEAD_BYTES + MIB, Claim.AWAITED)
    assert tier.ahead().nbytes == 3 * AHEAD_BYTES - MIB
    assert tier.ahead().nbytes == 0


def test_pinned_adapters_at_the_top_end_reach_nothing(tier: AdapterTier) -> None:
    tier.ahead()
    assert tier.pin("a", MIB)
    assert tier.reserve("a", MIB, Claim.AWAITED)
    assert tier.ahead().nbytes == 0


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
