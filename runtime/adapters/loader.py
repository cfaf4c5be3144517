"""The threads that read adapter files, pack them into host memory and copy them between the tiers."""

import os
import queue
import stat
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from runtime.adapter_format.canonical import AdapterConfig, CanonicalFile, read_canonical
from runtime.adapter_format.errors import InvalidAdapter
from runtime.adapter_format.safetensors_header import Header, read_header
from runtime.adapters.errors import FileUnusable
from runtime.adapters.layout import AdapterLayout, LayOut, Layout
from runtime.adapters.prefault import SpareMemory, prefault
from runtime.background import Pacer, yield_to_others
from runtime.messages import Tier
from runtime.models.config import ModelConfig
from runtime.parallel.commands import Fill
from runtime.parallel.followers import Followers, RankFault

READER_THREADS = 2
MEMORY_NICENESS = 19  # of the thread that only prefaults memory for later loads
PIECE_BYTES = 1 << 20  # copied between two pauses: 0.1 ms, the longest that a step shares its core with a copy
Key = TypeVar("Key")
Result = TypeVar("Result")
Pause = Callable[[], None]
Stages = dict[str, tuple[float, float]]  # when "read", "pack" and "copy" each began and ended, by time.monotonic()
Memory = Callable[[int], np.ndarray]  # allocates that many bytes


class Content(NamedTuple):
    """A canonical file in memory, with the layout of its extent."""

    config: AdapterConfig
    header: Header
    layout: Layout
    data: np.ndarray  # the whole file, in bytes; empty once it has been packed
    # The same tensors on the device that the adapter is loaded to; None once they have been packed, or without any
    on_device: Mapping[str, Tensor] | None = None


Source = Path | bytes | Content


class Copy(NamedTuple):
    """A copy between the tiers."""

    source: Tensor
    target: Tensor
    into: Tier


class Task(NamedTuple):
    """Work for one adapter, in this order: read and verify `source`, unless there is `content`; pack it; copy.

    The extents belong to the loader until the result has been taken.
    """

    digest: str
    source: Source | None = None
    content: Content | None = None  # a file that an earlier task has read
    pack: Tensor | None = None  # the extent in host memory to pack the file into
    pack_on_device: Tensor | None = None  # the extent on the device to pack the content's own tensors there into
    copy: Copy | None = None
    # Recorded when the task was submitted: a step that was launched before may still read the target extent.
    submitted: torch.cuda.Event | None = None


class Finished(NamedTuple, Generic[Key]):
    """The result of a task."""

    key: Key  # as given to `submit`
    content: Content | None  # the file that the task read or was given
    error: BaseException | None
    stages: Stages


class AdapterLoader(Generic[Key]):
    """Runs tasks on its own threads, in order of submission, and queues their results until `take`.

    Copies between the tiers have their own thread, so that they never wait for a file.
    """

    def __init__(self, model: ModelConfig, max_file_bytes: int, max_rank: int, lay_out: LayOut) -> None:
        self.pacer = Pacer()
        self.followers = Followers()  # the other ranks, which do with their parts what this one does
        self.on_change: Callable[[], None] | None = None  # called from a thread after each result
        self._model = model
        self._max_file_bytes = max_file_bytes  # larger files are not read
        self._lay_out = lay_out
        self._max_rank = max_rank  # of one module; a shared store may hold files from servers that allow more
        self._readers = ThreadPoolExecutor(READER_THREADS, "adapter-loader", yield_to_others)
        self._copier = ThreadPoolExecutor(1, "adapter-copier", yield_to_others)
        self._prefaulter = ThreadPoolExecutor(1, "adapter-memory", yield_to_others, (MEMORY_NICENESS,))
        self.file_memory = SpareMemory(READER_THREADS)
        self._finished: queue.SimpleQueue[Finished[Key]] = queue.SimpleQueue()
        self._arrived: list[Finished[Key]] = []
        self._in_flight = 0

    @property
    def idle(self) -> bool:
        """Whether no task is under way and no result waits to be taken."""
        return not self._in_flight and not self._arrived

    def submit(self, key: Key, task: Task) -> None:
        """Start a task; `take` returns its result."""
        self._in_flight += 1
        extents = (*(task.copy or ())[:2], task.pack_on_device)
        if any(extent is not None and extent.is_cuda for extent in extents):
            submitted = torch.cuda.Event()
            submitted.record()
            task = task._replace(submitted=submitted)
        of_memory = task.pack_on_device is not None or (task.source is None and task.content is None)
        threads = self._copier if of_memory else self._readers
        stages: Stages = {}
        threads.submit(self._run, task, stages).add_done_callback(partial(self._finish, key, stages))

    def content_of(self, file: CanonicalFile) -> Content:
        """Lay out a canonical file. Raises InvalidAdapter for a file of another model or with too high a rank."""
        layout = self._lay_out(self._model, file.config, file.header)
        layout.check_ranks(self._max_rank)
        return Content(file.config, file.header, layout, file.data)

    def in_background(self, call: Callable[[], Result]) -> "Future[Result]":
        """Run a call on one of the threads that read files; it calls `pacer.pause` before each piece of its work."""
        return self._readers.submit(call)

    def prefault(self, memory: Tensor) -> None:
        """Fault in a part of a tier's buffer in the background."""
        for piece in torch.split(memory, PIECE_BYTES // memory.itemsize):
            self._prefaulter.submit(self._prefault, piece)

    def take(self) -> list[Finished[Key]]:
        """The results since the last call; never blocks."""
        while not self._finished.empty():
            self._receive(None)
        results, self._arrived = self._arrived, []
        return results

    def wait(self, timeout: float | None) -> bool:
        """Block until a result can be taken or `timeout` seconds pass; False if none can. Returns at once when idle."""
        if not self._arrived and self._in_flight:
            self._receive(timeout)
        return bool(self._arrived)

    def close(self) -> None:
        """Stop the threads, each after its current task."""
        self._readers.shutdown(cancel_futures=True)
        self._copier.shutdown(cancel_futures=True)
        self._prefaulter.shutdown(cancel_futures=True)

    def _prefault(self, memory: Tensor) -> None:
        self.pacer.pause()
        prefault(memory)

    def _receive(self, timeout: float | None) -> None:
        try:
            self._arrived.append(self._finished.get(timeout=timeout))
        except queue.Empty:
            return
        self._in_flight -= 1

    def _finish(self, key: Key, stages: Stages, future: "Future[Content | None]") -> None:
        """Queue a result, also for an unexpected error: without a result the adapter would load for ever."""
        if future.cancelled():
            return
        error = future.exception()
        self._finished.put(Finished(key, None if error else future.result(), error, stages))
        if self.on_change is not None:
            self.on_change()

    def _run(self, task: Task, stages: Stages) -> Content | None:
        """Do a task, and wait until the other ranks have done it: then all have the adapter, or none."""
        if not self.followers or (task.pack is None and task.copy is None):
            return self._do(task, stages)
        wait = self.followers.ask(_fill_of(task))
        try:
            return self._do(task, stages)
        finally:  # also after an error: the others may still write to the extents
            _wait(wait)

    def _do(self, task: Task, stages: Stages) -> Content | None:
        started = time.monotonic()
        content = task.content
        if content is None and task.source is not None:
            content = self._read(task.source, task.digest)
            stages["read"] = (started, time.monotonic())
            started = stages["read"][1]
        if task.pack is not None:
            assert content is not None
            content.layout.pack(content.config, content.header, content.data, task.pack, self.pacer.pause)
            content = content._replace(data=np.empty(0, np.uint8))
            stages["pack"] = (started, time.monotonic())
            started = stages["pack"][1]
        if task.pack_on_device is not None:
            assert content is not None
            _pack_on_device(content, task.pack_on_device, task.submitted)
            stages["pack"] = (started, time.monotonic())
        if task.copy is not None:
            _copy(task.copy.source, task.copy.target, task.submitted, self.pacer.pause)
            stages["copy"] = (started, time.monotonic())
        return content

    def _read(self, source: Source, digest: str) -> Content:
        if isinstance(source, Content):
            return source
        if isinstance(source, Path):
            data = read_verified(source, digest, self._max_file_bytes, self.file_memory.take, self.pacer.pause)
        else:
            data = np.frombuffer(source, np.uint8)
        self.pacer.pause()
        config, header, _ = read_canonical(data.data)
        return self.content_of(CanonicalFile(config, header, data))


def _wait(wait: Callable[[], None]) -> None:
    try:
        wait()
    except RankFault as fault:
        if fault.kind == FileUnusable.__name__:
            raise FileUnusable(fault.fault) from None
        raise


def _fill_of(task: Task) -> Fill:
    """The same task as another rank is told it: extents lie at the same places there."""
    copy, source = task.copy, task.source
    extent = task.pack
    if extent is None:
        assert copy is not None
        extent, source = copy.source, None
    file = source.data.tobytes() if isinstance(source, Content) else source
    return Fill(
        digest=task.digest,
        path=str(file) if isinstance(file, Path) else None,
        file=file if isinstance(file, bytes) else None,
        first=int(extent.storage_offset()),
        count=extent.numel(),
        into=None if copy is None else copy.into,
        target=0 if copy is None else int(copy.target.storage_offset()),
    )


def read_verified(path: Path, digest: str, max_bytes: int, memory: Memory, pause: Pause) -> np.ndarray:
    """Read a whole file and check its BLAKE3 digest. Raises FileUnusable, InvalidAdapter.

    The file is not mapped: if it shrank, reading the mapping would kill the process.
    """
    try:
        with open(path, "rb", buffering=0, opener=_open_without_blocking) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise FileUnusable("its file cannot be read: Not a regular file")
            if status.st_size > max_bytes:
                raise _too_large(file, status.st_size, max_bytes)
            content, found = _read_in_pieces(file, memory(status.st_size), pause)
    except (FileNotFoundError, NotADirectoryError):
        raise FileUnusable("its file is missing") from None
    except OSError as error:  # without its own text, which contains the path: clients read this message
        raise FileUnusable(f"its file cannot be read: {error.strerror or type(error).__name__}") from None
    if found != digest:
        raise FileUnusable(f"its file is corrupt: {len(content)} bytes with the BLAKE3 digest {found}")
    return content


def _read_in_pieces(file: FileIO, content: np.ndarray, pause: Pause) -> tuple[np.ndarray, str]:
    """Read a file into memory of its size; returns the bytes that it had, and their digest."""
    hasher, view, end = blake3(), content.data, 0
    while end < len(content):
        pause()
        count = file.readinto(view[end : end + PIECE_BYTES])
        if not count:
            break
        hasher.update(view[end : end + count])
        end += count
    return content[:end], hasher.hexdigest()


def _open_without_blocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # opening a named pipe would otherwise wait for its writer


def _too_large(file: FileIO, size: int, max_bytes: int) -> Exception:
    """The error for a file that is too large to read: corrupt, or, if its header is valid, simply too large."""
    try:
        read_header(file)
    except InvalidAdapter:
        return FileUnusable(f"its file is corrupt: {size} bytes")
    what = f"has {size} bytes, and host adapter memory could take {max_bytes}"
    return InvalidAdapter("weights", what, "start the server with more --host-adapter-bytes")


def _copy(source: Tensor, target: Tensor, submitted: torch.cuda.Event | None, pause: Pause) -> None:
    """Copy all bytes. numpy copies between host tensors: torch would use the threads that compute the step."""
    if submitted is None:
        target_bytes, source_bytes = target.view(torch.uint8).numpy(), source.view(torch.uint8).numpy()
        for start in range(0, len(target_bytes), PIECE_BYTES):
            pause()
            np.copyto(target_bytes[start : start + PIECE_BYTES], source_bytes[start : start + PIECE_BYTES])
        return
    stream = torch.cuda.Stream(source.device if source.is_cuda else target.device)
    with torch.cuda.stream(stream):
        stream.wait_event(submitted)
        target.copy_(source, non_blocking=True)
        stream.synchronize()  # this thread waits for the copy; a step never does


def _pack_on_device(content: Content, extent: Tensor, submitted: torch.cuda.Event | None) -> None:
    """Pack the content's own tensors on the device into an extent there. They came to be before it was submitted."""
    assert content.on_device is not None
    assert isinstance(content.layout, AdapterLayout)
    if submitted is None:
        content.layout.pack_on_device(content.config, content.on_device, extent)
        return
    stream = torch.cuda.Stream(extent.device)
    with torch.cuda.stream(stream):
        stream.wait_event(submitted)
        content.layout.pack_on_device(content.config, content.on_device, extent)
        stream.synchronize()  # this thread waits; a step never does
