"""The threads that bring adapters into the arena: all reading, casting and packing happens here."""

import queue
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from kernels.reference.grouped_lora import SiteWeights
from runtime.adapter_format import AdapterConfig, read_canonical
from runtime.adapter_layout import AdapterLayout, layout_adapter
from runtime.invalid_adapter import InvalidAdapter
from runtime.models.config import ModelConfig
from runtime.safetensors_header import Header

THREADS = 2

Key = TypeVar("Key")
Source = Path | bytes
Sites = list[SiteWeights | None]


class Measured(NamedTuple):
    """An adapter's canonical file after its header was read: what to reserve, and how to pack."""

    config: AdapterConfig
    header: Header
    layout: AdapterLayout


class Finished(NamedTuple, Generic[Key]):
    """A job's end: `measured` after measuring, `sites` after packing; `reason` when it failed.

    `key` is its caller's.
    """

    key: Key
    measured: Measured | None
    sites: Sites | None
    reason: str | None
    seconds: float


class AdapterLoader(Generic[Key]):
    """Measures and packs adapters on its own threads; results wait in a queue until they are asked for.

    `on_change` is called from a loader thread after each result.
    """

    def __init__(self, model: ModelConfig) -> None:
        self.on_change: Callable[[], None] | None = None
        self._model = model
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="adapter-loader")
        self._finished: queue.SimpleQueue[Finished[Key]] = queue.SimpleQueue()
        self._arrived: list[Finished[Key]] = []
        self._in_flight = 0

    def measure(self, key: Key, source: Source) -> None:
        """Read and check the header of a canonical file."""
        self._submit(key, lambda: self._measure(source))

    def pack(self, key: Key, source: Source, measured: Measured, extent: Tensor) -> None:
        """Fill an extent, which is the loader's until the result has been taken."""
        self._submit(key, lambda: _pack(source, measured, extent))

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

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def _receive(self, timeout: float | None) -> None:
        try:
            self._arrived.append(self._finished.get(timeout=timeout))
        except queue.Empty:
            return
        self._in_flight -= 1

    def _submit(self, key: Key, job: Callable[[], Measured | Sites]) -> None:
        self._in_flight += 1
        self._threads.submit(self._run, key, job)

    def _run(self, key: Key, job: Callable[[], Measured | Sites]) -> None:
        started = time.monotonic()
        result, reason = None, None
        try:
            result = job()
        except (InvalidAdapter, OSError, MemoryError) as error:
            reason = f"{type(error).__name__}: {error}"
        measured, sites = (result, None) if isinstance(result, Measured) else (None, result)
        self._finished.put(Finished(key, measured, sites, reason, time.monotonic() - started))
        if self.on_change is not None:
            self.on_change()

    def _measure(self, source: Source) -> Measured:
        config, header, _ = read_canonical(source)
        return Measured(config, header, layout_adapter(self._model, config, header))


def _pack(source: Source, measured: Measured, extent: Tensor) -> Sites:
    """Read a whole file at once: mapped memory would turn a file that shrinks under us into a dead process."""
    config, header, layout = measured
    data = np.fromfile(source, np.uint8) if isinstance(source, Path) else np.frombuffer(source, np.uint8)
    expected = header.data_offset + max(entry.stop for entry in header.tensors.values())
    if len(data) != expected:
        raise InvalidAdapter("weights", f"has {len(data)} bytes, expected {expected} as when it was registered")
    if extent.dtype == torch.float32 and extent.device.type == "cpu":
        layout.pack(config, header, data, extent.numpy())
    else:
        packed = np.empty(layout.elements, np.float32)
        layout.pack(config, header, data, packed)
        extent.copy_(torch.from_numpy(packed))
    return layout.views(extent)
