"""The threads that bring adapters from their files into the tiers: reading, packing and copying happen here."""

import queue
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from kernels.cpu.grouped_lora import SiteWeights
from runtime.adapter_format.canonical import AdapterConfig, CanonicalFile, read_canonical
from runtime.adapter_format.safetensors_header import Header
from runtime.adapters.file import PIECE_BYTES, Pause, read_verified
from runtime.adapters.layout import AdapterLayout, layout_adapter
from runtime.adapters.spare_memory import SpareMemory
from runtime.adapters.tier_memory import touch
from runtime.background import Pacer, yield_to_others
from runtime.models.config import ModelConfig

THREADS = 2
MEMORY_NICENESS = 19  # of the one that only finds memory for later loads
Key = TypeVar("Key")
Sites = list[SiteWeights | None]


class Content(NamedTuple):
    """A canonical file in memory: `data` is all of it, in bytes."""

    config: AdapterConfig
    header: Header
    layout: AdapterLayout
    data: np.ndarray


Source = Path | bytes | Content


class Task(NamedTuple):
    """What to do for one adapter, in this order: read and verify `source`, or take `content`; pack it; copy.

    `copy` is from where to where. The extents are the loader's until the result has been taken; on a CUDA device, a
    step that was launched when the task was `asked` for may still read what lies there, and is waited for.
    """

    digest: str
    source: Source | None = None
    content: Content | None = None
    pack: Tensor | None = None
    copy: tuple[Tensor, Tensor] | None = None
    asked: torch.cuda.Event | None = None


class Finished(NamedTuple, Generic[Key]):
    """A task's end: `error` when it failed, the `content` that it read or was given, and the seconds of each stage.

    `key` is its caller's.
    """

    key: Key
    content: Content | None
    error: BaseException | None
    seconds: dict[str, float]


class AdapterLoader(Generic[Key]):
    """Runs tasks on its own threads, in the order asked for; results wait in a queue until they are asked for.

    A task that only copies waits for none that reads: it has a thread to itself. `on_change` is called after each
    result, from a thread, and by `notify`. Files of more than `max_file_bytes` are not read, and what has a module of
    more than `max_rank` ranks is refused: files of a server that allows more may lie in a store that others share.
    """

    def __init__(self, model: ModelConfig, max_file_bytes: int, max_rank: int) -> None:
        self.pacer = Pacer()
        self.on_change: Callable[[], None] | None = None
        self._model = model
        self._max_file_bytes, self._max_rank = max_file_bytes, max_rank
        self._readers = ThreadPoolExecutor(THREADS, "adapter-loader", yield_to_others)
        self._copier = ThreadPoolExecutor(1, "adapter-copier", yield_to_others)
        self._toucher = ThreadPoolExecutor(1, "adapter-memory", yield_to_others, (MEMORY_NICENESS,))
        self.memory = SpareMemory(THREADS)  # for files
        self._finished: queue.SimpleQueue[Finished[Key]] = queue.SimpleQueue()
        self._arrived: list[Finished[Key]] = []
        self._in_flight = 0

    def submit(self, key: Key, task: Task) -> None:
        """Start a task; its result comes out of `take`."""
        self._in_flight += 1
        if task.copy is not None and any(extent.is_cuda for extent in task.copy):
            asked = torch.cuda.Event()
            asked.record()
            task = task._replace(asked=asked)
        threads = self._copier if task.source is None and task.content is None else self._readers
        seconds: dict[str, float] = {}
        threads.submit(self._run, task, seconds).add_done_callback(partial(self._finish, key, seconds))

    def content_of(self, file: CanonicalFile) -> Content:
        """What a task works on. Raises InvalidAdapter for a file of another model, or of larger ranks than allowed."""
        layout = layout_adapter(self._model, file.config, file.header)
        layout.check_ranks(self._max_rank)
        return Content(file.config, file.header, layout, file.data)

    def touch(self, memory: Tensor) -> None:
        """Have the system find memory before it is written to, when there is nothing else to do."""
        elements = PIECE_BYTES // memory.itemsize
        for start in range(0, len(memory), elements):
            self._toucher.submit(_touch, memory[start : start + elements], self.pacer.pause)

    def take(self) -> list[Finished[Key]]:
        """The results since the last call; never blocks."""
        while not self._finished.empty():
            self._receive(None)
        results, self._arrived = self._arrived, []
        return results

    def wait(self, timeout: float | None) -> bool:
        """Block until there is a result to take or `timeout` seconds pass; False when there is none."""
        if not self._arrived and self._in_flight:
            self._receive(timeout)
        return bool(self._arrived)

    def notify(self) -> None:
        """Say that there is something to do."""
        if self.on_change is not None:
            self.on_change()

    def close(self) -> None:
        self._readers.shutdown(cancel_futures=True)
        self._copier.shutdown(cancel_futures=True)
        self._toucher.shutdown(cancel_futures=True)

    def _receive(self, timeout: float | None) -> None:
        try:
            self._arrived.append(self._finished.get(timeout=timeout))
        except queue.Empty:
            return
        self._in_flight -= 1

    def _finish(self, key: Key, seconds: dict[str, float], future: "Future[Content | None]") -> None:
        """Whatever went wrong, the result says so: nobody may wait for it in vain."""
        if future.cancelled():
            return
        error = future.exception()
        self._finished.put(Finished(key, None if error else future.result(), error, seconds))
        self.notify()

    def _run(self, task: Task, seconds: dict[str, float]) -> Content | None:
        started = time.monotonic()
        content = task.content
        if task.source is not None:
            content = self._read(task.source, task.digest)
            seconds["read"] = (packing := time.monotonic()) - started
            started = packing
        if task.pack is not None:
            assert content is not None
            content.layout.pack(content.config, content.header, content.data, task.pack, self.pacer.pause)
            content = content._replace(data=np.empty(0, np.uint8))
            seconds["pack"] = (copying := time.monotonic()) - started
            started = copying
        if task.copy is not None:
            _copy(*task.copy, task.asked, self.pacer.pause)
            seconds["copy"] = time.monotonic() - started
        return content

    def _read(self, source: Source, digest: str) -> Content:
        if isinstance(source, Content):
            return source
        if isinstance(source, Path):
            data = read_verified(source, digest, self._max_file_bytes, self.memory.take, self.pacer.pause)
        else:
            data = np.frombuffer(source, np.uint8)
        self.pacer.pause()
        config, header, _ = read_canonical(data.data)
        return self.content_of(CanonicalFile(config, header, data))


def _touch(memory: Tensor, pause: Pause) -> None:
    pause()
    touch(memory)


def _copy(source: Tensor, target: Tensor, asked: torch.cuda.Event | None, pause: Pause) -> None:
    """One copy of all bytes. In numpy between ordinary memory: torch would enlist the threads that compute the step."""
    if asked is None:
        ours, theirs = target.view(torch.uint8).numpy(), source.view(torch.uint8).numpy()
        for start in range(0, len(ours), PIECE_BYTES):
            pause()
            np.copyto(ours[start : start + PIECE_BYTES], theirs[start : start + PIECE_BYTES])
        return
    stream = torch.cuda.Stream(source.device if source.is_cuda else target.device)
    with torch.cuda.stream(stream):
        stream.wait_event(asked)
        target.copy_(source, non_blocking=True)
        stream.synchronize()  # by this thread, never by a step
