"""The thread that moves blocks of K/V between the device and host memory, in the order asked for."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from runtime.kv.cache import KvCache
from runtime.pacer import Pacer, yield_to_others


class KvMover:
    """Owns host memory for `num_slots` blocks and one thread, so that what is asked for first is done first.

    A slot that is loaded from may therefore be saved to at once, and a block that is saved loaded to. Only what else
    writes to a block has to wait for its content to be saved: `settle`. `on_move` is called from the thread after each
    load.
    """

    def __init__(self, kv: KvCache, num_slots: int, pacer: Pacer) -> None:
        self.on_move: Callable[[], None] | None = None
        self._kv = kv
        self._slots = kv.empty_blocks(num_slots)
        self.num_slots, self.slot_bytes = num_slots, kv.block(0).nbytes
        self._pacer = pacer
        self._thread = ThreadPoolExecutor(1, "kv-mover", yield_to_others)
        self._saving: dict[int, Future[None]] = {}  # by block
        self._stream = torch.cuda.Stream(kv.device) if kv.device.type == "cuda" else None

    def save(self, block: int, slot: int) -> None:
        """Move the content of a block that is about to be used for something else."""
        self._saving[block] = self._submit([(self._kv.block(block), self._slots[slot])])

    def settle(self, blocks: Iterable[int]) -> None:
        """Wait until what was in `blocks` has been saved: they are going to be written to."""
        for block in blocks:
            saving = self._saving.pop(block, None)
            if saving is not None:
                saving.result()

    def load(self, slots: Sequence[int], blocks: Sequence[int]) -> "Future[None]":
        """Move content back, from each of `slots` to one of `blocks`."""
        pairs = [(self._slots[slot], self._kv.block(block)) for slot, block in zip(slots, blocks, strict=True)]
        loading = self._submit(pairs)
        loading.add_done_callback(lambda _: self._notify())
        return loading

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _notify(self) -> None:
        if self.on_move is not None:
            self.on_move()

    def _submit(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> "Future[None]":
        if self._stream is None:
            return self._thread.submit(self._move, pairs)
        asked = torch.cuda.Event()
        asked.record()  # behind the steps that have been launched: they may read or write the same blocks
        return self._thread.submit(self._move_on, self._stream, asked, pairs)

    def _move(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        for source, target in pairs:
            self._pacer.pause()
            np.copyto(_bytes(target), _bytes(source))  # torch would enlist the threads that compute the step

    def _move_on(
        self, stream: torch.cuda.Stream, asked: torch.cuda.Event, pairs: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        with torch.cuda.stream(stream):
            stream.wait_event(asked)
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
            stream.synchronize()  # by this thread, never by a step


def _bytes(block: Tensor) -> np.ndarray:
    return block.view(torch.uint8).numpy()
