"""The adapters in one replica's memory: device, host and disk, each in bytes, and the loads between them."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from loadtests.simulate.costs import Costs


class Tier:
    """Adapters in bytes, the least recently used first. Extents are not placed: a tier has no fragments."""

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self.used = 0.0
        self.sizes: OrderedDict[int, float] = OrderedDict()  # by adapter
        self.evictions = 0

    def __contains__(self, adapter: int) -> bool:
        return adapter in self.sizes

    def use(self, adapter: int) -> None:
        self.sizes.move_to_end(adapter)

    def add(self, adapter: int, size: float) -> None:
        self.sizes[adapter] = size
        self.used += size

    def drop(self, adapter: int) -> None:
        self.used -= self.sizes.pop(adapter)

    def make_room(self, size: float, held: Mapping[int, int], place: int) -> list[int] | None:
        """Return the adapters to evict for `size` bytes: the least recently used; None if there is no room now.

        `held` has the adapters that may be evicted only for a place in line before the one they are held for; 0: for
        none. Those come last, the latest place first.
        """
        missing = self.used + size - self.capacity
        if missing <= 0:
            return []
        victims, later = [], []
        for adapter in self.sizes:
            held_for = held.get(adapter)
            if held_for is None:
                victims.append(adapter)
                missing -= self.sizes[adapter]
                if missing <= 0:
                    return victims
            elif held_for > place:
                later.append((-held_for, adapter))
        for _, adapter in sorted(later):
            victims.append(adapter)
            missing -= self.sizes[adapter]
            if missing <= 0:
                return victims
        return None


class Load:
    """An adapter on its way to the device."""

    __slots__ = ("adapter", "place", "stage")

    def __init__(self, adapter: int, place: int) -> None:
        self.adapter, self.place = adapter, place
        self.stage = ""  # what goes on now: "download", "read" or "copy"; "": it waits


class Moved(NamedTuple):
    """Bytes of adapters that have moved, or how often one has."""

    copied: float = 0.0  # host → device
    read: float = 0.0  # disk → host
    downloaded: float = 0.0  # store → disk


class Change(NamedTuple):
    """An adapter is in a tier now, or is not any more."""

    tier: Literal["device", "host"]
    adapter: int
    present: bool


class Start(NamedTuple):
    """A stage of a load that has begun."""

    seconds: float
    load: Load
    victims: list[int]  # adapters that left the device for it


class AdapterMemory:
    """The tiers of one replica and its loads, by the rules of the engine (`runtime.adapters`), approximately.

    As there: a load goes to host memory and from there to the device; the first in line gets memory first; nothing is
    evicted that a request uses, or waits for with an earlier place; the copy in host memory stays. Not as there: no
    extents, no pins, and no precedence for a load that has waited for a second.
    """

    def __init__(self, costs: Costs, sizes: Sequence[float], on_disk: Iterable[int] = ()) -> None:
        """`sizes` are the bytes of all adapters; `on_disk` are on the disk at the start, as many as it holds."""
        limits = costs.limits
        self.costs, self.sizes = costs, sizes
        self.device, self.host, self.disk = Tier(limits.device_bytes), Tier(limits.host_bytes), Tier(limits.disk_bytes)
        for adapter in on_disk:
            if self.disk.used + sizes[adapter] > limits.disk_bytes:
                break
            self.disk.add(adapter, sizes[adapter])
        self.loads: OrderedDict[int, Load] = OrderedDict()  # by adapter
        self.references: dict[int, int] = {}  # by adapter: the running requests that have it
        self.moved, self.times = Moved(), Moved()  # bytes; how often
        self.stage_seconds = 0.0  # of all stages of loads
        self.changes: list[Change] = []  # since they were taken
        self.hits = self.misses = 0  # of requests: whether the device had the adapter when they came
        self._working = 0  # loads that read or download
        self._filling: dict[str, set[int]] = {"host": set(), "device": set()}  # reserved, and not there yet
        self._blocked = False  # every load waits for room: until memory is given back, none is looked at

    @property
    def quiet(self) -> bool:
        """Whether no stage of a load could start."""
        return self._blocked or not self.loads

    def has(self, adapter: int) -> bool:
        """Whether a request may run with the adapter."""
        return adapter in self.device and adapter not in self._filling["device"]

    def on_host(self, adapter: int) -> bool:
        return adapter in self.host and adapter not in self._filling["host"]

    def ask(self, adapter: int, place: int) -> None:
        """A request that needs an adapter waits at a place in line."""
        if self.has(adapter):
            self.hits += 1
        else:
            self.misses += 1
            self.ask_again(adapter, place)

    def ask_again(self, adapter: int, place: int) -> None:
        """It had the adapter on the device, and it was evicted before it could start."""
        if adapter not in self.loads:
            self.loads[adapter] = Load(adapter, place)
            self._blocked = False

    def acquire(self, adapter: int) -> None:
        self.references[adapter] = self.references.get(adapter, 0) + 1
        self.device.use(adapter)

    def release(self, adapter: int) -> None:
        self.references[adapter] -= 1
        if not self.references[adapter]:
            del self.references[adapter]
            self._blocked = False

    def waits_no_more(self) -> None:
        """A request has started, so its adapter is held for it no longer."""
        self._blocked = False

    def advance(self, waiting: Mapping[int, int], step_seconds: float = 0.0) -> list[Start]:
        """Start every stage for which there is room; `waiting` has the first place in line of each adapter.

        `step_seconds` is how long a load waits each time that it gives way to a step.
        """
        if self.quiet:
            return []
        self._blocked = True
        started = []
        held_device = {**waiting, **dict.fromkeys(self._filling["device"], 0), **dict.fromkeys(self.references, 0)}
        held_host = {adapter: load.place for adapter, load in self.loads.items()}
        held_host |= dict.fromkeys(self._filling["host"], 0)
        held_host |= {adapter: 0 for adapter, load in self.loads.items() if load.stage == "copy"}
        for load in sorted(self.loads.values(), key=lambda load: load.place):
            if load.stage:
                continue
            start = self._start(load, held_device, held_host, step_seconds)
            if start is not None:
                started.append(start)
                self.stage_seconds += start.seconds
        return started

    def _start(
        self, load: Load, held_device: dict[int, int], held_host: dict[int, int], step_seconds: float
    ) -> Start | None:
        adapter, size = load.adapter, self.sizes[load.adapter]
        waits = self.costs.waits
        if self.on_host(adapter):
            victims = self.device.make_room(size, held_device, load.place)
            if victims is None:
                return None
            self._take(self.device, adapter, victims, "device")
            self._filling["device"].add(adapter)
            held_device[adapter] = held_host[adapter] = 0
            load.stage = "copy"
            self.host.use(adapter)
            return Start(self.costs.copy.seconds(size) + waits.copy * size * step_seconds, load, victims)
        if self._working >= self.costs.loads_at_once:
            return None
        victims = self.host.make_room(size, held_host, load.place)
        if victims is None:
            return None
        self._take(self.host, adapter, victims, "host")
        self._filling["host"].add(adapter)
        held_host[adapter] = 0
        self._working += 1
        seconds = self.costs.read.seconds(size) + waits.read * size * step_seconds
        load.stage = "read"
        if adapter in self.disk:
            self.disk.use(adapter)
            return Start(seconds, load, [])
        load.stage = "download"
        disk_victims = self.disk.make_room(size, {}, load.place)
        if disk_victims is not None:  # else it goes through without being kept
            self._take(self.disk, adapter, disk_victims)
        return Start(seconds + self.costs.download.seconds(size), load, [])

    def _take(
        self, tier: Tier, adapter: int, victims: Iterable[int], name: Literal["device", "host"] | None = None
    ) -> None:
        for victim in victims:
            tier.drop(victim)
            tier.evictions += 1
            if name is not None:
                self.changes.append(Change(name, victim, present=False))
        tier.add(adapter, self.sizes[adapter])

    def finish(self, load: Load) -> bool:
        """A stage has ended; returns whether the adapter is on the device now."""
        adapter, stage = load.adapter, load.stage
        size = self.sizes[adapter]
        self._blocked = False
        load.stage = ""
        if stage == "copy":
            self._count(Moved(copied=size), Moved(copied=1))
            self._filling["device"].discard(adapter)
            self.device.use(adapter)
            self.changes.append(Change("device", adapter, present=True))
            del self.loads[adapter]
            return True
        self._working -= 1
        self._filling["host"].discard(adapter)
        self.changes.append(Change("host", adapter, present=True))
        downloads = int(stage == "download")
        self._count(Moved(read=size, downloaded=downloads * size), Moved(read=1, downloaded=downloads))
        return False

    def _count(self, moved: Moved, times: Moved) -> None:
        self.moved = Moved(*map(sum, zip(self.moved, moved, strict=True)))
        self.times = Moved(*map(sum, zip(self.times, times, strict=True)))

    def check(self) -> None:
        """Recount the bytes, and that what is used is there."""
        for tier in (self.device, self.host, self.disk):
            assert abs(tier.used - sum(tier.sizes.values())) < 1, "the bytes of a tier do not add up"
            assert tier.used <= tier.capacity + 1
        assert all(self.has(adapter) for adapter in self.references)
        assert self._filling["device"] == {load.adapter for load in self.loads.values() if load.stage == "copy"}
        assert self._working == len(self._filling["host"])
