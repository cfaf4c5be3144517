"""The adapter memory of a rank that follows: rank 0's pool says what lies where."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from runtime.adapter_format.safetensors_header import MAX_HEADER_BYTES
from runtime.adapters.layout import Layout
from runtime.adapters.loader import AdapterLoader, Copy, Finished, Task
from runtime.adapters.tier import AdapterTier
from runtime.config import EngineConfig
from runtime.messages import Tier
from runtime.parallel.commands import Done, Fill
from runtime.runner import Runner


class Extent:
    """An adapter's part in a tier."""

    def __init__(self, memory: Tensor, layout: Layout) -> None:
        self.memory, self.layout = memory, layout
        self.views: Any = None  # made when they are first used


class FollowedAdapters:
    """Owns the two tiers' memory of this rank, each as large as rank 0's, and fills extents on threads of its own."""

    def __init__(self, runner: Runner, config: EngineConfig, report: Callable[[Done], None]) -> None:
        host, device = config.host_adapter_bytes, runner.sizes.adapter_bytes
        page_locked = runner.device.type == "cuda"
        self._tiers: dict[Tier, Tensor] = {
            "host": AdapterTier("host", host, runner.adapter_dtype, "cpu", page_locked=page_locked).memory,
            "device": AdapterTier("device", device, runner.adapter_dtype, runner.device, page_locked=False).memory,
        }
        self._loader: AdapterLoader[Fill] = AdapterLoader(
            runner.model, 2 * host + MAX_HEADER_BYTES, config.max_lora_rank, runner.adapter_layout
        )
        self._loader.on_change = self._finish
        self.pacer = self._loader.pacer
        self._report = report
        self._finishing = threading.Lock()
        self._extents: dict[Tier, dict[int, Extent]] = {"host": {}, "device": {}}  # by their first element
        self._places: dict[str, int] = {}  # of the adapters of the step

    @property
    def arena(self) -> Tensor:
        return self._tiers["device"]

    def place(self, places: dict[str, int]) -> None:
        """The next step uses these adapters, which begin at these elements of the device's memory."""
        self._places = places

    def lookup(self, digest: str) -> Any:
        extent = self._extents["device"][self._places[digest]]
        if extent.views is None:
            extent.views = extent.layout.views(extent.memory)
        return extent.views

    def placement(self, digest: str) -> tuple[Layout, int]:
        first = self._places[digest]
        return self._extents["device"][first].layout, first

    def fill(self, command: Fill) -> None:
        """Start to fill extents; `report` is called from a thread when it is done, or has failed."""
        source = command.file if command.path is None else Path(command.path)
        extent = self._memory(_origin(command), command.first, command.count)
        copy = None
        if command.into is not None:
            copy = Copy(extent, self._memory(command.into, command.target, command.count), command.into)
        self._loader.submit(command, Task(command.digest, source, pack=None if source is None else extent, copy=copy))

    def _memory(self, tier: Tier, first: int, count: int) -> Tensor:
        return self._tiers[tier][first : first + count]

    def _finish(self) -> None:
        with self._finishing:
            for result in self._loader.take():
                self._note(result)

    def _note(self, result: Finished[Fill]) -> None:
        command, error = result.key, result.error
        if error is not None:
            self._report(Done(command.ticket, str(error), type(error).__name__))
            return
        if result.content is not None:
            self._add("host", command.first, command.count, result.content.layout)
        if command.into is not None:
            layout = self._extents[_origin(command)][command.first].layout
            self._add(command.into, command.target, command.count, layout)
        self._report(Done(command.ticket))

    def _add(self, tier: Tier, first: int, count: int, layout: Layout) -> None:
        """Note an extent, in the place of those that it overwrites."""
        extents = self._extents[tier]
        stop = first + count
        for start in [start for start, old in extents.items() if start < stop and start + len(old.memory) > first]:
            del extents[start]
        extents[first] = Extent(self._memory(tier, first, count), layout)


def _origin(command: Fill) -> Tier:
    """The tier in which the adapter lies that is copied, or is packed."""
    return "device" if command.into == "host" else "host"
