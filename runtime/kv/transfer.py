"""Copies of K/V blocks between the device and host memory, on one thread and in order."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.background import Pacer, yield_to_others
from runtime.kv.cache import KvCache
from runtime.parallel.commands import AwaitOffloads, Offload, Reload
from runtime.parallel.followers import Followers

STAGED = 16  # blocks on a GPU that are on their way to host memory; Qwen3-8B's are 2.4 MB each


class BlockTransfer:
    """Owns host memory for `num_slots` blocks, and the thread that copies.

    Copies run in the order in which they were asked for. A slot may therefore be overwritten as soon as its reload was
    asked for, and a block be reloaded into as soon as its offload was; every other write to a block has to
    `wait_offloaded` first. On a GPU that waits for nothing: a block is copied to one of `staged` places by the stream
    that computes, ahead of every later step, and from there to the host. The other ranks do the same with their K/V; a
    reload has ended when it has on all of them.
    """

    def __init__(
        self,
        kv: KvCache,
        num_slots: int,
        pacer: Pacer,
        followers: Followers | None = None,
        *,
        staged: int | None = None,
    ) -> None:
        on_cuda = kv.device.type == "cuda"
        self.on_reloaded: Callable[[], None] | None = None  # called from the thread after each reload
        self.num_slots, self.slot_bytes = num_slots, kv.block(0).nbytes
        self._kv = kv
        self._slots = kv.empty_blocks(num_slots)
        self._pacer, self._followers = pacer, followers or Followers()
        self._thread = ThreadPoolExecutor(1, "kv-transfer", yield_to_others)
        self._offloading: dict[int, Future[None]] = {}  # by block
        self._stream = torch.cuda.Stream(kv.device) if on_cuda else None
        if staged is None:
            staged = min(STAGED, num_slots) if on_cuda else 0
        self._staging = torch.empty((staged, *self._slots.shape[1:]), dtype=self._slots.dtype, device=kv.device)
        self._turn = 0  # the place that is used next
        self._staged: deque[Future[None]] = deque()  # of the places in turn, from the one that has waited longest

    def offload(self, block: int, slot: int) -> None:
        """Start to copy a block to a slot."""
        self._followers.tell(Offload(block, slot))
        if not len(self._staging):
            self._offloading[block] = self._submit([(self._kv.block(block), self._slots[slot])])
            return
        if len(self._staged) == len(self._staging):
            self._staged.popleft().result()
        place = self._staging[self._turn]
        self._turn = (self._turn + 1) % len(self._staging)
        place.copy_(self._kv.block(block))
        self._staged.append(self._submit([(place, self._slots[slot])]))

    def wait_offloaded(self, blocks: Iterable[int]) -> None:
        """Wait until those of `blocks` that are being offloaded have been copied."""
        offloading = {block: self._offloading.pop(block) for block in blocks if block in self._offloading}
        if offloading:
            self._followers.tell(AwaitOffloads(list(offloading)))
        for copying in offloading.values():
            copying.result()

    def reload(self, slots: Sequence[int], blocks: Sequence[int]) -> "Future[None]":
        """Start to copy each of `slots` to the block at the same place of `blocks`."""
        pairs = [(self._slots[slot], self._kv.block(block)) for slot, block in zip(slots, blocks, strict=True)]
        reloading = self._submit(pairs)
        if self._followers:
            elsewhere = self._followers.ask(Reload(slots=list(slots), blocks=list(blocks)))
            reloading = self._thread.submit(_both, reloading, elsewhere)
        reloading.add_done_callback(lambda _: self._notify())
        return reloading

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _notify(self) -> None:
        if self.on_reloaded is not None:
            self.on_reloaded()

    def _submit(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> "Future[None]":
        if self._stream is None:
            return self._thread.submit(self._copy, pairs)
        launched = torch.cuda.Event()
        launched.record()  # launched steps may read or write the same blocks
        return self._thread.submit(self._copy_on_stream, self._stream, launched, pairs)

    def _copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        for source, target in pairs:
            self._pacer.pause()
            np.copyto(_bytes(target), _bytes(source))  # torch would use the threads that compute the step

    def _copy_on_stream(
        self, stream: torch.cuda.Stream, launched: torch.cuda.Event, pairs: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        with torch.cuda.stream(stream):
            stream.wait_event(launched)
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
            stream.synchronize()  # this thread waits, a step never does


def _both(copying: "Future[None]", elsewhere: Callable[[], None]) -> None:
    copying.result()
    elsewhere()


def _bytes(block: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return block.view(torch.uint8).numpy()
