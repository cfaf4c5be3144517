"""Page-locked memory of exactly its size, by a fake of the two calls of CUDA that lock and unlock pages."""

import gc

import pytest
import torch

from kernels.host_to_device import page_locked


class FakeCudart:
    """Locked memory: bytes by address."""

    def __init__(self, status=0):
        self.status, self.locked, self.given_back = status, {}, []

    def cudaHostRegister(self, address, size, flags):
        if self.status == 0:
            self.locked[address] = size
        return self.status

    def cudaHostUnregister(self, address):
        self.given_back.append(self.locked.pop(address))
        return 0


@pytest.fixture
def cudart(monkeypatch):
    fake = FakeCudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    return fake


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_it_locks_what_was_asked_for_and_not_the_next_power_of_two(cudart, dtype):
    memory = page_locked(5 << 20, dtype)
    assert (memory.dtype, memory.shape) == (dtype, (5 << 20,))
    assert cudart.locked == {memory.data_ptr(): (5 << 20) * dtype.itemsize}
    memory[-1] = 3
    assert memory[-1] == 3


def test_it_stays_locked_as_long_as_any_part_of_it_is_used(cudart):
    part = page_locked(1 << 20, torch.float32)[100:200].view(10, 10)
    gc.collect()
    assert len(cudart.locked) == 1
    part.fill_(1.0)
    del part
    gc.collect()
    assert (cudart.locked, cudart.given_back) == ({}, [4 << 20])


def test_nothing_is_locked_for_nothing(cudart):
    assert len(page_locked(0, torch.float32)) == 0
    assert not cudart.locked


def test_what_cuda_refuses_is_told_with_the_size_and_its_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "cudart", lambda: FakeCudart(status=2))
    with pytest.raises(MemoryError, match="4096 bytes of host memory cannot be page-locked: CUDA's error 2"):
        page_locked(1024, torch.float32)
