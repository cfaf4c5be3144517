"""The loads under way: from its file into host memory, from there to the device, stage by stage."""

from collections.abc import Callable

from runtime.adapter_format.errors import InvalidAdapter
from runtime.adapter_format.safetensors_header import MAX_HEADER_BYTES
from runtime.adapters.errors import FileUnusable
from runtime.adapters.loader import READER_THREADS, AdapterLoader, Content, Finished, Source, Task
from runtime.adapters.registered import FIRST_RETRY_SECONDS, RegisteredAdapter
from runtime.adapters.tier import AdapterTier
from runtime.adapters.tier_entry import Claim
from runtime.messages import Tier
from runtime.models.config import ModelConfig

FILES_IN_MEMORY = 2 * READER_THREADS  # files that are read or wait to be packed
GRACE_POLLS = 4  # steps that a newcomer is safe from eviction, so that whoever waited for it gets to use it
# How long a load at its turn may lack device memory before later ones may not take what becomes free.
ROOM_PATIENCE_SECONDS = 1.0


class AdapterLoads:
    """Owns the loads: which stage each is at and who is next. All methods are for the engine's thread; none waits.

    `take` ends stages and `advance` starts the next ones, in the order in which the loads were asked for. A load for
    which there is no room keeps its place; if it is for the device, it is in host memory by then.
    """

    def __init__(
        self, model: ModelConfig, host: AdapterTier, device: AdapterTier, max_rank: int, clock: Callable[[], float]
    ) -> None:
        self.tiers: dict[Tier, AdapterTier] = {"host": host, "device": device}
        self._due = False  # the next poll has room that this one has not, without any event before
        # The widest a file can be for what it takes packed: float32 for an arena of half its width.
        max_file_bytes = 2 * host.capacity_bytes + MAX_HEADER_BYTES
        self.loader: AdapterLoader[RegisteredAdapter] = AdapterLoader(model, max_file_bytes, max_rank)
        self._host, self._device = host, device
        self._queue: dict[RegisteredAdapter, None] = {}
        self._reading: set[RegisteredAdapter] = set()
        self._starving: RegisteredAdapter | None = None  # nobody else may take device memory
        self._polls = 0
        self._clock = clock
        self._touch_ahead()

    def ask(self, adapter: RegisteredAdapter, goal: Tier, claim: Claim, *, at_turn: bool = False) -> None:
        """See to it that an adapter gets to a tier, and start at once if there is room.

        `at_turn` if a request could run at once but for the adapter.
        """
        if at_turn:
            adapter.awaited_poll = self._polls
        known = adapter in self._queue and adapter.claim >= claim and adapter.goal in ("device", goal)
        if known or self.tiers[goal].holds(adapter.digest):
            return
        if goal == "device" and adapter.goal != "device":
            self._count_host_use(adapter)
        adapter.goal = "device" if adapter.goal == "device" else goal
        adapter.claim, adapter.unload = max(adapter.claim, claim), None
        self._host.claim(adapter.digest, adapter.claim)
        self.enqueue(adapter)

    def enqueue(self, adapter: RegisteredAdapter) -> None:
        """Give an adapter with something to load its place among the loads, unless it has one, and try to go on."""
        if adapter not in self._queue:
            self._queue[adapter] = None
            adapter.asked_at = self._clock()
        self._advance(adapter)

    def fail(self, adapter: RegisteredAdapter, reason: str) -> None:
        """End a load; what has been loaded stays."""
        self._end(adapter)
        adapter.fail(reason, self._clock())

    def drop(self, adapter: RegisteredAdapter) -> None:
        """Forget a load; the job that works for it ends in vain."""
        self._end(adapter)
        adapter.forget_load()

    def raise_pinned(self, adapter: RegisteredAdapter, tier: Tier) -> bool:
        """Move a pinned adapter towards the top end of its tier; False when it cannot go higher now."""
        copy = None if adapter.busy else self.tiers[tier].raise_pinned(adapter.digest)
        if copy is not None:
            adapter.moving = tier
            self._start(adapter, Task(adapter.digest, copy=copy))
        return copy is not None

    def take(self) -> list[RegisteredAdapter]:
        """End the stages whose jobs have finished; whose they were."""
        self._polls += 1
        self._due = False
        for tier in self.tiers.values():
            tier.tick()
        results = self.loader.take()
        for result in results:
            self._receive(result.key, result)
        return [result.key for result in results]

    def advance(self) -> list[RegisteredAdapter]:
        """Start whatever can start, in the order asked for; returns whose load has failed over that."""
        self._starving = None
        failed = []
        for adapter in list(self._queue):
            self._advance(adapter)
            if adapter.failed:
                failed.append(adapter)
            if self._starving is None and self._starves(adapter):
                self._starving = adapter
        return failed

    def wait(self, timeout: float | None) -> bool:
        """Block until `take` and `advance` have something to do; False when they have nothing."""
        return self._due or self.loader.wait(timeout)

    def under_way(self, adapter: RegisteredAdapter) -> bool:
        return adapter in self._queue

    def lacking_room(self) -> dict[Tier, int]:
        """The tiers in which the first load that no job works for finds no room, with the bytes that it takes."""
        first = next((each for each in self._queue if not each.busy and each.size is not None), None)
        if first is None or first.size is None:
            return {}
        return {tier.name: first.size for tier in self.tiers.values() if self._lacks_room(first, tier)}

    def _lacks_room(self, adapter: RegisteredAdapter, tier: AdapterTier) -> bool:
        on_its_way = tier.name == "host" or adapter.goal == "device"
        if adapter.size is None or not on_its_way or tier.holds(adapter.digest):
            return False
        return tier.lacks_room(adapter.size, adapter.claim)

    def check(self) -> None:
        assert len(self._reading) <= FILES_IN_MEMORY
        for adapter in self._queue:
            assert not adapter.failed, f"{adapter.digest} has failed and is loading"
            assert not adapter.dropped, f"{adapter.digest} is gone and is loading"

    # ------------------------------------------------------------------ starting a stage

    def _advance(self, adapter: RegisteredAdapter) -> None:
        """Start the next stage of a load, if it has one, if there is room and if no job works for it yet."""
        if adapter.busy or adapter.wanted or adapter not in self._queue:
            return
        if adapter.state != "loading" or (adapter.goal and self.tiers[adapter.goal].holds(adapter.digest)):
            self._end(adapter)
        elif (reason := self._too_large(adapter)) is not None:
            self.fail(adapter, reason)
        elif adapter.goal == "device" and self._host.holds(adapter.digest):
            self._copy(adapter, self._host, self._device)
        elif adapter.goal == "host" and self._device.holds(adapter.digest):
            self._copy(adapter, self._device, self._host)
        else:
            self._fill_host(adapter)

    def _too_large(self, adapter: RegisteredAdapter) -> str | None:
        if adapter.size is None or adapter.goal is None:
            return None
        way = [self._device] if adapter.goal == "device" else []
        if not self._host.holds(adapter.digest):
            way.append(self._host)
        for tier in way:
            limit = tier.limit(adapter.digest)
            if adapter.size > limit:
                pinned = f", of which {tier.capacity_bytes - limit} are pinned" if limit < tier.capacity_bytes else ""
                return (
                    f"it takes {adapter.size} bytes, and {tier.name} adapter memory has {tier.capacity_bytes}{pinned}"
                )
        return None

    def _copy(self, adapter: RegisteredAdapter, source: AdapterTier, target: AdapterTier) -> None:
        assert adapter.size is not None
        if self._may_take(adapter, target) and self._reserve(adapter, adapter.size, target):
            source.acquire(adapter.digest)
            adapter.reading = source.name
            copy = (source.extent(adapter.digest), target.extent(adapter.digest))
            self._start(adapter, Task(adapter.digest, copy=copy), target.name)

    def _reserve(self, adapter: RegisteredAdapter, size: int, tier: AdapterTier) -> bool:
        if tier.reserve(adapter.digest, size, adapter.claim):
            return True
        if not self._due and tier.has_newcomers and not tier.lacks_room(size, adapter.claim):
            self._due = True
            if self.loader.on_change is not None:
                self.loader.on_change()
        return False

    def _fill_host(self, adapter: RegisteredAdapter) -> None:
        """Read the file and pack it; both at once if the file's size is known, so that only what has room is read."""
        digest, content = adapter.digest, adapter.content
        unread = content is None and not isinstance(adapter.source, Content)
        if unread and len(self._reading) >= FILES_IN_MEMORY:
            return
        if adapter.size is not None and not self._host.reserve(digest, adapter.size, adapter.claim):
            adapter.content = None
            self._reading.discard(adapter)
            return
        if unread:
            self._reading.add(adapter)
        source: Source | None = adapter.source if content is None else None
        if adapter.size is None:
            self._start(adapter, Task(digest, source))
            return
        extent = self._host.extent(digest)
        # The device's extent is taken once it is certain that there is something to put there.
        ready = not unread and adapter.goal == "device" and self._may_take(adapter, self._device)
        if ready and self._device.reserve(digest, adapter.size, adapter.claim):
            copy = (extent, self._device.extent(digest))
            self._start(adapter, Task(digest, source, content, extent, copy), "host", "device")
        else:
            self._start(adapter, Task(digest, source, content, extent), "host")

    def _may_take(self, adapter: RegisteredAdapter, tier: AdapterTier) -> bool:
        return tier is self._host or self._starving in (None, adapter) or tier.pinned(adapter.digest)

    def _starves(self, adapter: RegisteredAdapter) -> bool:
        """Whether a request at its turn has waited long for device memory, with its adapter ready in host memory."""
        return (
            not adapter.busy
            and adapter.goal == "device"
            and adapter.awaited_poll >= self._polls - 1
            and self._host.holds(adapter.digest)
            and self._clock() - adapter.asked_at >= ROOM_PATIENCE_SECONDS
        )

    def _start(self, adapter: RegisteredAdapter, task: Task, *filling: Tier) -> None:
        adapter.busy, adapter.filling = True, filling
        adapter.started_with = adapter.registrations
        self.loader.submit(adapter, task)

    # ------------------------------------------------------------------ ending a stage

    def _receive(self, adapter: RegisteredAdapter, result: Finished[RegisteredAdapter]) -> None:
        filling, moving = adapter.filling, adapter.moving
        adapter.busy, adapter.filling, adapter.moving = False, (), None
        if adapter.reading is not None:
            self.tiers[adapter.reading].release(adapter.digest)
            adapter.reading = None
        if moving is not None:
            self.tiers[moving].flip(adapter.digest, moved=result.error is None)
            adapter.sites = None
            return
        if filling or result.error is not None or adapter not in self._queue:
            self._reading.discard(adapter)
            adapter.content = None
        else:
            adapter.content = result.content
        if result.error is not None:
            for name in filling:
                self.tiers[name].drop(adapter.digest)
            self._fail_or_want(adapter, result.error)
        else:
            self._take_in(adapter, result, filling)

    def _take_in(
        self, adapter: RegisteredAdapter, result: Finished[RegisteredAdapter], filling: tuple[Tier, ...]
    ) -> None:
        adapter.stages |= result.seconds
        if result.content is not None:
            adapter.layout, adapter.brought = result.content.layout, False
            adapter.size = adapter.layout.elements * self._host.itemsize
        for name in filling:
            if name == "device":
                claim = Claim.EXPECTED if adapter.expected else Claim.NONE
                self._device.publish(adapter.digest, claim, GRACE_POLLS if adapter.expected else 0)
            else:
                self._host.publish(adapter.digest, adapter.claim if adapter.goal == "device" else Claim.NONE)
        if filling:
            adapter.seconds, adapter.stages = adapter.seconds | adapter.stages, {}
            adapter.retry_seconds = FIRST_RETRY_SECONDS
            self._touch_ahead()
        if adapter.goal is not None and self.tiers[adapter.goal].holds(adapter.digest):
            self._end(adapter)

    def _fail_or_want(self, adapter: RegisteredAdapter, error: BaseException) -> None:
        """A file that is not there or not right may be brought, once; whatever else is wrong will stay so."""
        adapter.stages = {}
        if adapter not in self._queue:
            return
        if isinstance(error, FileUnusable) and adapter.started_with != adapter.registrations:
            return  # it has been brought while it was looked for
        if isinstance(error, FileUnusable) and not adapter.brought:
            adapter.wanted, adapter.reason = True, str(error)
            return
        plain = isinstance(error, FileUnusable | InvalidAdapter)
        self.fail(adapter, str(error) if plain else f"{type(error).__name__}: {error}")

    def _end(self, adapter: RegisteredAdapter) -> None:
        self._queue.pop(adapter, None)
        if not adapter.busy:
            self._reading.discard(adapter)
        adapter.goal, adapter.claim, adapter.content = None, Claim.NONE, None
        self._host.claim(adapter.digest, Claim.NONE)

    def _touch_ahead(self) -> None:
        for tier in self.tiers.values():
            self.loader.touch(tier.ahead())

    def _count_host_use(self, adapter: RegisteredAdapter) -> None:
        if self._host.holds(adapter.digest):
            self._host.hits += 1
        else:
            self._host.misses += 1
