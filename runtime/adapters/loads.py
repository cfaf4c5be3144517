"""The loads: which stage each is at, which is next, and which has waited too long for memory."""

from collections.abc import Callable

from runtime.adapter_format.errors import InvalidAdapter
from runtime.adapter_format.safetensors_header import MAX_HEADER_BYTES
from runtime.adapters.adapter import FIRST_RETRY_SECONDS, LAST, Adapter, Job, Load, State
from runtime.adapters.errors import FileUnusable
from runtime.adapters.events import AdapterEvents
from runtime.adapters.layout import LayOut
from runtime.adapters.loader import READER_THREADS, AdapterLoader, Content, Copy, Finished, Task
from runtime.adapters.tier import AdapterTier
from runtime.messages import EngineCode, Tier
from runtime.models.config import ModelConfig
from runtime.parallel.followers import RankFault

# Files that are being read or wait to be packed: as many as the threads can pack until the next poll.
FILES_IN_MEMORY = 2 * READER_THREADS
# How long a request that could run but for its adapter waits for device memory before it is given precedence.
PATIENCE_SECONDS = 1.0


class AdapterLoads:
    """Owns the loads and decides who gets memory: in the order of their places in line, the first come first.

    A load goes from the file to host memory and from there to the device. A load that finds no room keeps its place in
    line; meanwhile later loads may use free memory. It can evict every adapter that is neither referenced nor pinned,
    unless a request or load with an earlier place waits for that adapter.

    When a request has waited for `PATIENCE_SECONDS` at its turn, its load is `starving`. No other load may then take
    device memory, and requests behind it in line may not acquire the adapters that have to leave for it. So it gets its
    memory once the requests that use those adapters have ended.
    """

    def __init__(
        self,
        model: ModelConfig,
        host: AdapterTier,
        device: AdapterTier,
        max_rank: int,
        lay_out: LayOut,
        events: AdapterEvents,
        clock: Callable[[], float],
    ) -> None:
        self.tiers: dict[Tier, AdapterTier] = {"host": host, "device": device}
        # The largest a file can be that fits: float32 weights for an arena of half their width.
        max_file_bytes = 2 * host.capacity_bytes + MAX_HEADER_BYTES
        self.loader: AdapterLoader[Adapter] = AdapterLoader(model, max_file_bytes, max_rank, lay_out)
        self.clock = clock  # seconds
        self.polls = 0
        self._host, self._device = host, device
        self._events = events
        self._queue: dict[Adapter, None] = {}  # the adapters that have a load
        self._with_file: set[Adapter] = set()  # the adapters whose file is in memory or being read
        self._starving: Adapter | None = None
        self._draining: set[str] = set()  # the adapters that have to leave for the starving one
        self._prefault()

    @property
    def quiet(self) -> bool:
        """Whether nothing is loading."""
        return not self._queue and self.loader.idle

    def ask(self, adapter: Adapter, goal: Tier | None, place: int = LAST, *, at_turn: bool = False) -> None:
        """Load an adapter into a tier, or (None) read its size; starts at once if there is room, and may fail at once.

        `at_turn` if a request could run now but for the adapter.
        """
        load = adapter.load
        if load is None:
            if goal is not None and self.tiers[goal].holds(adapter.digest):
                return
            adapter.ask(load := Load(goal=goal, place=place, asked_at=self.clock()))
            self._queue[adapter] = None
            if adapter.job is not None:
                adapter.job.unload = None
            self._count_host_use(adapter, goal)
            self._events.touch(adapter)
        else:
            known = goal in (None, load.goal) or load.goal == "device"
            load.place = min(load.place, place)
            if at_turn:
                load.turn = self.polls
            if known:
                return
            load.goal = goal
            self._count_host_use(adapter, goal)
        if at_turn:
            load.turn = self.polls
        self._advance(adapter)

    def refetched(self, adapter: Adapter) -> None:
        """The file that a load waits for has been registered again."""
        adapter.refetch()
        self._events.touch(adapter)
        self._advance(adapter)

    def fail(self, adapter: Adapter, reason: str) -> None:
        """End a load that cannot be done; the tiers that the adapter has reached keep it."""
        del self._queue[adapter]
        load = adapter.fail(reason, self.clock())
        self._after_end(adapter, load, "adapter_failed", f"adapter {adapter.digest} failed to load: {reason}")

    def cancel(self, adapter: Adapter) -> None:
        """End a load, if there is one; a task under way goes on and its result is kept."""
        if adapter.load is not None:
            self._end(adapter, "load_cancelled", f"adapter {adapter.digest} was unloaded while it was loading")

    def retire(self, adapter: Adapter) -> None:
        """Forget an adapter, and end its load if there is one."""
        self._queue.pop(adapter, None)
        load = adapter.retire()
        if load is not None:
            self._after_end(adapter, load, "unknown_adapter", f"adapter {adapter.digest} is not registered")

    def holds_back(self, adapter: Adapter) -> bool:
        """Whether the next request for a resident adapter has to leave it to run out, for the starving load."""
        if self._starving is None or adapter.digest not in self._draining:
            return False
        return not adapter.waiting or adapter.waiting[0] > self._starving.place

    def take(self) -> list[tuple[Adapter, Job]]:
        """End the stages whose tasks have finished."""
        finished = self.loader.take()
        return [(result.key, self._finish(result.key, result)) for result in finished]

    def advance(self) -> None:
        """Start every stage for which there is room, in the order of the places in line."""
        self._starving, self._draining = None, set()
        for tier in self.tiers.values():
            tier.look_again()
        for adapter in sorted(self._queue, key=lambda adapter: adapter.place):
            self._advance(adapter)
            if self._starving is None and adapter.size is not None and self._starves(adapter):
                self._starving = adapter
                self._draining = self._device.draining(adapter.size, adapter.place)

    def check(self) -> None:
        """Recount the loads."""
        assert all(adapter.load is not None for adapter in self._queue)
        assert all(adapter.holds_file for adapter in self._with_file)
        assert len(self._with_file) <= FILES_IN_MEMORY + READER_THREADS  # tasks of cancelled loads read on

    # Starting a stage

    def _advance(self, adapter: Adapter) -> None:
        """Start the next stage of a load if it waits for one and there is room."""
        load = adapter.load
        if load is None or adapter.state is not State.QUEUED:
            return
        if (adapter.size is not None) if load.goal is None else self.tiers[load.goal].holds(adapter.digest):
            self._end(adapter)
        elif adapter.size is not None and load.goal is not None and self._cannot_fit(adapter, adapter.size, load.goal):
            pass
        elif load.goal == "device" and self._host.holds(adapter.digest):
            self._copy(adapter, self._host, self._device)
        elif load.goal == "host" and self._device.holds(adapter.digest):
            self._copy(adapter, self._device, self._host)
        elif load.goal != "device" or not self._fill_device(adapter):
            self._fill_host(adapter, load)

    def _cannot_fit(self, adapter: Adapter, size: int, goal: Tier) -> bool:
        """Fail a load that needs a tier which cannot hold the adapter beside the pinned ones."""
        on_its_way = [self._device] if goal == "device" else []
        if not self._host.holds(adapter.digest):
            on_its_way.append(self._host)
        reasons = (tier.cannot_hold(adapter.digest, size) for tier in on_its_way)
        reason = next((reason for reason in reasons if reason is not None), None)
        if reason is not None:
            self.fail(adapter, reason)
        return reason is not None

    def _copy(self, adapter: Adapter, source: AdapterTier, target: AdapterTier) -> None:
        assert adapter.size is not None
        digest = adapter.digest
        if self._may_take(adapter, target) and target.reserve(adapter, adapter.size, adapter.place):
            source.acquire(digest)
            job = Job(filling=(target.name,), source=source.name, layout=source.layout(digest))
            copy = Copy(source.extent(digest), target.extent(digest), target.name)
            self._start(adapter, Task(digest, copy=copy), job)

    def _fill_device(self, adapter: Adapter) -> bool:
        """Pack an adapter on the device, if its tensors are there and there is room for it."""
        source = adapter.source
        if not isinstance(source, Content) or source.on_device is None or adapter.size is None:
            return False
        if not self._may_take(adapter, self._device):
            return False
        if not self._device.reserve(adapter, adapter.size, adapter.place):
            return False
        task = Task(adapter.digest, content=source, pack_on_device=self._device.extent(adapter.digest))
        self._start(adapter, task, Job(filling=("device",)))
        return True

    def _fill_host(self, adapter: Adapter, load: Load) -> None:
        """Read the file and pack it: in one task if the size is known, so that nothing is read without room for it."""
        digest, content, source = adapter.digest, load.content, adapter.source
        reads = content is None and not isinstance(source, Content)
        if reads and len(self._with_file) >= FILES_IN_MEMORY:
            return
        if adapter.size is None:
            self._start(adapter, Task(digest, source), Job(filling=(), reads_file=reads))
            return
        if not self._host.reserve(adapter, adapter.size, adapter.place):
            load.content = None
            self._with_file.discard(adapter)
            return
        extent = self._host.extent(digest)
        task = Task(digest, source, content, extent)
        # An extent of the device is taken only for content that is certain to be there.
        to_device = not reads and load.goal == "device" and self._may_take(adapter, self._device)
        if to_device and self._device.reserve(adapter, adapter.size, adapter.place):
            task = task._replace(copy=Copy(extent, self._device.extent(digest), "device"))
            self._start(adapter, task, Job(filling=("host", "device")))
        else:
            self._start(adapter, task, Job(filling=("host",), reads_file=reads))

    def _start(self, adapter: Adapter, task: Task, job: Job) -> None:
        adapter.start(job)
        self._note_file(adapter)
        self.loader.submit(adapter, task)

    def _may_take(self, adapter: Adapter, tier: AdapterTier) -> bool:
        return tier is self._host or self._starving in (None, adapter) or tier.pinned(adapter.digest)

    def _starves(self, adapter: Adapter) -> bool:
        """Whether a request at its turn has waited long for device memory, with its adapter ready in host memory."""
        load = adapter.load
        return (
            load is not None
            and adapter.state is State.QUEUED
            and load.goal == "device"
            and load.turn >= self.polls - 1
            and self._host.holds(adapter.digest)
            and self.clock() - load.asked_at >= PATIENCE_SECONDS
        )

    # Ending a stage

    def _finish(self, adapter: Adapter, result: Finished[Adapter]) -> Job:
        job, load = adapter.finish(), adapter.load
        if load is not None:
            load.content = None
        if result.error is None:
            self._finish_stage(adapter, job, result)
        else:
            for name in job.filling:
                self.tiers[name].drop(adapter.digest)
        if job.source is not None:
            self.tiers[job.source].release(adapter.digest)
        if result.error is not None and load is not None:
            self._fail_or_miss(adapter, load, job, result.error)
        self._note_file(adapter)
        self._events.touch(adapter)
        return job

    def _finish_stage(self, adapter: Adapter, job: Job, result: Finished[Adapter]) -> None:
        load, content = adapter.load, result.content
        if job.filling == ("device",) and content is not None and adapter.source is content:
            adapter.source = content._replace(on_device=None)  # it has served: the host's copy can fill another extent
        if content is not None:
            adapter.size = content.layout.elements * self._host.itemsize
        if load is not None:
            load.stages |= result.stages
            load.refetched &= content is None
        if job.filling:
            layout = job.layout if content is None else content.layout
            assert layout is not None
            for name in job.filling:
                self.tiers[name].publish(adapter.digest, layout)
            self._prefault()
            adapter.retry_seconds = FIRST_RETRY_SECONDS
            adapter.stages |= result.stages if load is None else load.stages
        if load is None:
            return
        if not job.filling:
            load.content = content
            return
        load.stages = {}
        waiters, load.waiters = load.waiters, []
        for request_id, tier in waiters:
            self.answer_when_loaded(request_id, adapter, tier)
        if load.goal is not None and self.tiers[load.goal].holds(adapter.digest):
            self._end(adapter)

    def answer_when_loaded(self, request_id: str, adapter: Adapter, tier: Tier) -> None:
        """Answer a command when its load has ended, or at once if the adapter is there or has failed."""
        digest = adapter.digest
        if self._device.holds(digest) or (tier == "host" and self._host.holds(digest)):
            self._events.answer(request_id)
        elif adapter.failure is not None:
            reason = adapter.failure.reason
            self._events.answer(request_id, "adapter_failed", f"adapter {digest} failed to load: {reason}")
        else:
            assert adapter.load is not None
            adapter.load.waiters.append((request_id, tier))

    def _fail_or_miss(self, adapter: Adapter, load: Load, job: Job, error: BaseException) -> None:
        """An unusable file may be fetched again, once for each load; with any other error the load fails."""
        load.stages = {}
        if isinstance(error, FileUnusable) and job.outdated:
            return  # the file has been registered again while this task looked for it: try that one
        if isinstance(error, FileUnusable) and not load.refetched:
            adapter.miss(str(error))
            return
        known = isinstance(error, FileUnusable | InvalidAdapter | RankFault)
        self.fail(adapter, str(error) if known else f"{type(error).__name__}: {error}")

    def _end(self, adapter: Adapter, code: EngineCode | None = None, message: str = "") -> None:
        del self._queue[adapter]
        self._after_end(adapter, adapter.end_load(), code, message)

    def _after_end(self, adapter: Adapter, load: Load, code: EngineCode | None, message: str) -> None:
        for request_id, _ in load.waiters:
            self._events.answer(request_id, code, message)
        self._note_file(adapter)
        self._host.look_again()  # the copy in host memory is not held for the load any more
        self._events.touch(adapter)

    def _prefault(self) -> None:
        for tier in self.tiers.values():
            self.loader.prefault(tier.ahead())

    def _note_file(self, adapter: Adapter) -> None:
        if adapter.holds_file:
            self._with_file.add(adapter)
        else:
            self._with_file.discard(adapter)

    def _count_host_use(self, adapter: Adapter, goal: Tier | None) -> None:
        """Count whether host memory had an adapter that is loaded to the device."""
        if goal == "device" and self._host.holds(adapter.digest):
            self._host.hits += 1
        elif goal == "device":
            self._host.misses += 1
