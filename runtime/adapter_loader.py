"""The threads that bring adapters from their files into the tiers: reading, packing and copying happen here."""

import os
import queue
import stat
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from kernels.reference.grouped_lora import SiteWeights
from runtime.adapter_format import AdapterConfig, read_canonical
from runtime.adapter_layout import AdapterLayout, layout_adapter
from runtime.invalid_adapter import InvalidAdapter
from runtime.models.config import ModelConfig
from runtime.pacer import Pacer, yield_to_others
from runtime.safetensors_header import Header, read_header

THREADS = 2
PIECE_BYTES = 1 << 20  # of a copy, which then takes a tenth of a millisecond: what a step may have to share a core with

Key = TypeVar("Key")
Pause = Callable[[], None]
Source = Path | bytes
Sites = list[SiteWeights | None]


class FileWanted(Exception):
    """An adapter's file is missing, or is not what its digest says; the message says which."""


class Content(NamedTuple):
    """A canonical file in memory: `data` is all of it, in bytes."""

    config: AdapterConfig
    header: Header
    layout: AdapterLayout
    data: np.ndarray


class Task(NamedTuple):
    """What to do for one adapter, in this order: read and verify `source`, or take `content`; pack it; copy.

    `copy` is from where to where. The extents are the loader's until the result has been taken.
    """

    digest: str
    source: Source | None = None
    content: Content | None = None
    pack: Tensor | None = None
    copy: tuple[Tensor, Tensor] | None = None


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
    result, from a thread, and by `notify`. Files of more than `max_file_bytes` are not read.
    """

    def __init__(self, model: ModelConfig, max_file_bytes: int) -> None:
        self.pacer = Pacer()
        self.on_change: Callable[[], None] | None = None
        self._model = model
        self._max_file_bytes = max_file_bytes
        self._readers = ThreadPoolExecutor(THREADS, "adapter-loader", yield_to_others)
        self._copier = ThreadPoolExecutor(1, "adapter-copier", yield_to_others)
        self._finished: queue.SimpleQueue[Finished[Key]] = queue.SimpleQueue()
        self._arrived: list[Finished[Key]] = []
        self._in_flight = 0

    def submit(self, key: Key, task: Task) -> None:
        """Start a task; its result comes out of `take`."""
        self._in_flight += 1
        threads = self._copier if task.source is None and task.content is None else self._readers
        seconds: dict[str, float] = {}
        threads.submit(self._run, task, seconds).add_done_callback(partial(self._finish, key, seconds))

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
            _pack(content, task.pack, self.pacer.pause)
            content = content._replace(data=np.empty(0, np.uint8))
            seconds["pack"] = (copying := time.monotonic()) - started
            started = copying
        if task.copy is not None:
            _copy(*task.copy, self.pacer.pause)
            seconds["copy"] = time.monotonic() - started
        return content

    def _read(self, source: Source, digest: str) -> Content:
        if isinstance(source, Path):
            content: bytes | bytearray = _verified(source, digest, self._max_file_bytes, self.pacer.pause)
        else:
            content = source
        self.pacer.pause()
        config, header, _ = read_canonical(content)
        layout = layout_adapter(self._model, config, header)
        return Content(config, header, layout, np.frombuffer(content, np.uint8))


def _verified(path: Path, digest: str, max_bytes: int, pause: Pause) -> bytearray:
    """A whole file at once: mapped memory would turn a file that shrinks under us into a dead process."""
    try:
        with open(path, "rb", buffering=0, opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise FileWanted("its file cannot be read: Not a regular file")
            if status.st_size > max_bytes:
                raise _too_large(file, status.st_size, max_bytes)
            content, found = _read_paced(file, status.st_size, pause)
    except (FileNotFoundError, NotADirectoryError):
        raise FileWanted("its file is missing") from None
    except OSError as error:  # whose own words name the path, which is nobody's business
        raise FileWanted(f"its file cannot be read: {error.strerror or type(error).__name__}") from None
    if found != digest:
        raise FileWanted(f"its file is corrupt: {len(content)} bytes with the BLAKE3 digest {found}")
    return content


def _read_paced(file: FileIO, size: int, pause: Pause) -> tuple[bytearray, str]:
    """All of a file, and its digest."""
    content, hasher, end = bytearray(size), blake3(), 0
    view = memoryview(content)
    while end < size:
        pause()
        count = file.readinto(view[end : end + PIECE_BYTES])
        if not count:
            break
        hasher.update(view[end : end + count])
        end += count
    view.release()
    del content[end:]
    return content, hasher.hexdigest()


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # what is no file may never open otherwise


def _too_large(file: FileIO, size: int, max_bytes: int) -> Exception:
    """What is wrong with a file that is not read whole: it may be what it should be, if its header describes it."""
    try:
        read_header(file)
    except InvalidAdapter:
        return FileWanted(f"its file is corrupt: {size} bytes")
    return InvalidAdapter("weights", f"has {size} bytes, and host adapter memory could take {max_bytes}")


def _pack(content: Content, extent: Tensor, pause: Pause) -> None:
    config, header, layout, data = content
    if extent.dtype == torch.float32:
        layout.pack(config, header, data, extent.numpy(), pause)
        return
    packed = np.empty(layout.elements, np.float32)
    layout.pack(config, header, data, packed, pause)
    extent.copy_(torch.from_numpy(packed))


def _copy(source: Tensor, target: Tensor, pause: Pause) -> None:
    """One copy of all bytes. In numpy between ordinary memory: torch would enlist the threads that compute the step."""
    if source.device.type == target.device.type == "cpu":
        ours, theirs = target.view(torch.uint8).numpy(), source.view(torch.uint8).numpy()
        for start in range(0, len(ours), PIECE_BYTES):
            pause()
            np.copyto(ours[start : start + PIECE_BYTES], theirs[start : start + PIECE_BYTES])
        return
    stream = torch.cuda.Stream(source.device if source.is_cuda else target.device)
    with torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)
        stream.synchronize()  # by this thread, never by a step
