"""The transfer copies every bit, in the order in which the copies were asked for."""

import threading

import pytest
import torch

from runtime.kv.cache import KvCache
from runtime.kv.transfer import BlockTransfer
from tests.runtime.adapter_format.adapter_files import MODEL

NAN_WITH_A_PAYLOAD = 0x7FC1


class GatedPacer:
    """Delays every copy until the gate is open."""

    def __init__(self):
        self.gate = threading.Event()

    def pause(self):
        assert self.gate.wait(20)


@pytest.fixture
def pacer():
    return GatedPacer()


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def kv(request):
    return KvCache(MODEL, 6, 4, request.param, torch.device("cpu"))


@pytest.fixture
def transfer(kv, pacer):
    transfer = BlockTransfer(kv, 3, pacer)
    yield transfer
    pacer.gate.set()
    transfer.close()


def fill(kv, block):
    """Other bits in each block, among them a NaN."""
    whole = kv.block(block)
    whole.copy_(torch.randn(whole.shape, generator=torch.Generator().manual_seed(block)))
    whole.view(torch.uint8).view(torch.int16)[0, 0, 0, 0, 0] = NAN_WITH_A_PAYLOAD
    return bits(kv, block)


def bits(kv, block):
    return kv.block(block).contiguous().view(torch.uint8).clone()


def test_every_bit_goes_there_and_back(kv, transfer, pacer):
    pacer.gate.set()
    content = fill(kv, 2)
    transfer.offload(2, 1)
    transfer.wait_offloaded([2])
    kv.block(2).zero_()
    transfer.reload([1], [5]).result(20)
    assert torch.equal(bits(kv, 5), content)
    assert not bits(kv, 2).any()
    assert transfer.slot_bytes == content.numel()


def test_a_slot_may_be_overwritten_as_soon_as_its_reload_was_asked_for(kv, transfer, pacer):
    first, second = fill(kv, 1), fill(kv, 2)
    transfer.offload(1, 0)
    loading = transfer.reload([0], [4])
    transfer.offload(2, 0)
    again = transfer.reload([0], [5])
    assert not loading.done()
    pacer.gate.set()
    again.result(20)
    assert torch.equal(bits(kv, 4), first)
    assert torch.equal(bits(kv, 5), second)


def test_a_write_to_a_block_waits_for_its_own_offload_alone(kv, transfer, pacer):
    content = fill(kv, 1)
    transfer.offload(1, 0)
    transfer.wait_offloaded([2, 3])  # would wait for ever if these had to wait for block 1
    opener = threading.Timer(0.05, pacer.gate.set)
    opener.start()
    transfer.wait_offloaded([1])
    assert pacer.gate.is_set()
    kv.block(1).zero_()
    transfer.reload([0], [1]).result(20)
    assert torch.equal(bits(kv, 1), content)
    opener.join()


def test_a_staged_block_may_be_overwritten_at_once_and_one_more_waits_for_the_first(kv, pacer):
    transfer = BlockTransfer(kv, 3, pacer, staged=2)
    try:
        contents = {block: fill(kv, block) for block in (1, 2, 3)}
        for slot, block in enumerate((1, 2)):
            transfer.offload(block, slot)
            transfer.wait_offloaded([block])  # nothing has been copied to the host yet
            kv.block(block).zero_()
        third = threading.Thread(target=transfer.offload, args=(3, 2))
        third.start()
        pacer.gate.set()
        third.join(20)
        kv.block(3).zero_()
        transfer.reload([0, 1, 2], [1, 2, 3]).result(20)
        assert all(torch.equal(bits(kv, block), content) for block, content in contents.items())
    finally:
        pacer.gate.set()
        transfer.close()


def test_every_reload_is_reported(kv, transfer, pacer):
    heard = threading.Semaphore(0)
    transfer.on_reloaded = heard.release
    pacer.gate.set()
    transfer.offload(1, 0)
    transfer.reload([0], [1])
    assert heard.acquire(timeout=20)
