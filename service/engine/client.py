"""The service's end of the engine: open token streams, and an engine process that is kept alive."""

import asyncio
import itertools
import logging
import math
import time
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from typing import NamedTuple

from runtime.config import CPU_SIZES, EngineConfig
from runtime.messages import (
    Abort,
    AdapterState,
    Answer,
    Event,
    Failed,
    Generate,
    GetStats,
    KvChanges,
    PinsSet,
    PrefixEnded,
    PrefixHeld,
    Ready,
    SetPaused,
    Stats,
    Tokens,
)
from service.engine.adapters import EngineAdapters
from service.engine.backlog import Backlog
from service.engine.connection import Connection, fail, succeed
from service.engine.prefixes import EnginePrefixes
from service.engine.process import EngineProcess, EngineStartFailed
from service.errors import EngineError
from service.metrics import Metrics

_log = logging.getLogger(__name__)

RESTART_SECONDS = (0.2, 1.0, 5.0, 15.0, 30.0)  # backoff between attempts in a row; the last repeats
STEADY_SECONDS = 60.0  # an engine that lived this long resets the backoff
RECENT_SECONDS = 1.0  # a snapshot is current for so long
STATS_SECONDS = 0.8  # how long to wait for a snapshot: the engine answers between two steps
SILENT_SECONDS = 10.0  # without a sign of life, after which the last snapshot is told no longer


class Stream(NamedTuple):
    """An open token stream: the adapter of its request, and the events that have arrived for it."""

    adapter: str | None
    events: asyncio.Queue[Tokens | EngineError]


class Deadline(NamedTuple):
    """When a request has to have ended."""

    seconds: float  # after it came in
    at: float  # time.perf_counter()


class InFlight(NamedTuple):
    """Sequences that were sent to the engine and have not ended."""

    running: int
    waiting: int


class EngineClient:
    """Generates through an engine process, restarts it when it dies, and owns the open token streams."""

    def __init__(
        self,
        config: EngineConfig,
        command: Sequence[str],
        metrics: Metrics,
        timeout_seconds: float | None = None,  # without a sign of life, after which an engine is killed
        max_queue_seconds: float = 0.0,  # that a request may be expected to wait; 0: any time
        environment: Mapping[str, str] | None = None,  # of the engine's process; None: that of this one
    ):
        self._connection = Connection()
        self._metrics, self._timeout_seconds = metrics, timeout_seconds
        self.adapters = EngineAdapters(self._connection, metrics)
        self.prefixes = EnginePrefixes(self._connection)
        self._config, self._command, self._environment = config, command, environment
        self._backlog = Backlog(config.sizes(CPU_SIZES).max_running)  # until an engine says what it has
        self._max_queue_seconds = max_queue_seconds
        self._supervisor: asyncio.Task[None] | None = None
        self._streams: dict[str, Stream] = {}  # by request id
        self._last_stats: Stats | None = None
        self._stats_at = -math.inf  # time.monotonic() when the last snapshot arrived
        self._asked_stats: asyncio.Future[Stats] | None = None
        self.paused = False  # by `pause`; another engine, started after this one's death, is not
        self.kv_changes: asyncio.Queue[KvChanges | None] = asyncio.Queue()  # None: an engine began, and knows no block

    @property
    def ready(self) -> Ready | None:
        """What the engine said of itself; None while no engine serves."""
        return self._connection.ready

    @property
    def pid(self) -> int | None:
        """The process id of the engine that runs now."""
        return None if self._connection.process is None else self._connection.process.pid

    @property
    def answers(self) -> bool:
        """Whether an engine serves that has given a sign of life lately."""
        process = self._connection.process
        return self.ready is not None and process is not None and process.silent_seconds < SILENT_SECONDS

    async def start(self) -> None:
        """Start the engine and wait until it is ready. Raises EngineStartFailed with the engine's reason."""
        await self._launch()
        self._supervisor = asyncio.create_task(self._supervise(), name="engine supervisor")

    async def close(self) -> None:
        """End running requests and the engine; returns when its process is gone."""
        self.end_requests("shutting_down", "the service is shutting down")
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        if self._connection.process is not None:
            await self._connection.process.close()

    def busy(self) -> bool:
        """Whether any request runs or waits."""
        return bool(self._streams)

    def refuse_long_wait(self, tenant: str, adapters: Collection[str | None]) -> None:
        """Raise EngineError if a new call on these adapters would wait longer for its turn than is allowed."""
        if not self._max_queue_seconds:
            return
        seconds = max(self._backlog.wait_seconds(tenant, adapter) for adapter in adapters)
        if seconds > self._max_queue_seconds:
            longest = self._max_queue_seconds
            message = f"this request's turn would come in about {seconds:.0f} s, later than the {longest:g} s allowed"
            later = math.ceil(seconds - longest)
            raise EngineError("queue_full", f"{message}: try again in {later} s", retry_seconds=later)

    def queue_seconds(self) -> float:
        """How long a new call on the base, of a tenant without any other, would wait for its turn."""
        return self._backlog.wait_seconds("", None)

    @property
    def places(self) -> int:
        """Sequences that can run at one time."""
        return self._backlog.places

    def in_flight(self) -> InFlight:
        """How many sequences there are now: a busy engine, which answers late, does not know of the last ones.

        Which of them wait is the engine's word if it is of the last second, else those wait that have no token yet.
        """
        last = self._last_stats if self.stats_age <= RECENT_SECONDS else None
        waiting = min(self._backlog.waiting if last is None else last.waiting, len(self._streams))
        return InFlight(running=len(self._streams) - waiting, waiting=waiting)

    async def generate(self, command: Generate, deadline: Deadline | None = None) -> AsyncGenerator[Tokens, None]:
        """Run one sequence and yield its tokens as they come; closing the generator aborts it.

        Raises EngineError when the engine refuses it, fails at it, or dies, and at the deadline.
        """
        process = self._connection.require()
        stream = self._streams[command.request_id] = Stream(command.adapter, asyncio.Queue())
        timer = None if deadline is None else self._timer(command.request_id, deadline)
        ended = False
        try:
            self._backlog.queued(command)
            process.send(command)
            while not ended:
                event = await stream.events.get()
                ended = isinstance(event, EngineError) or event.finish_reason is not None
                if isinstance(event, EngineError):
                    raise event
                self._backlog.started(command.request_id)
                yield event
        finally:
            if timer is not None:
                timer.cancel()
            self._backlog.ended(command.request_id)
            del self._streams[command.request_id]
            if not ended and process is self._connection.process:
                self._connection.send(Abort(request_id=command.request_id))

    def _timer(self, request_id: str, deadline: Deadline) -> asyncio.TimerHandle:
        """Ends a request at its deadline, unless it is cancelled."""

        def expire() -> None:
            self._connection.send(Abort(request_id=request_id))
            message = f"the request did not end within its {deadline.seconds:g} s"
            self._streams[request_id].events.put_nowait(EngineError("timeout", message))

        return asyncio.get_running_loop().call_later(deadline.at - time.perf_counter(), expire)

    async def pause(self) -> None:
        """Let the engine compute nothing until `resume`. Raises EngineError."""
        await self._set_paused(True)

    async def resume(self) -> None:
        """Let the engine go on. Raises EngineError."""
        await self._set_paused(False)

    async def _set_paused(self, paused: bool) -> None:
        request_id = self._connection.new_id()
        await self._connection.ask(request_id, SetPaused(request_id=request_id, paused=paused))
        self.paused = paused

    def end_requests(self, code: str, message: str, digest: str | None = None, *, prefixes: bool = True) -> None:
        """Fail every running request and end every held prefix, or those on one adapter; or no prefix."""
        for request_id, stream in self._streams.items():
            if digest is None or stream.adapter == digest:
                self._connection.send(Abort(request_id=request_id))
                stream.events.put_nowait(EngineError(code, message))
        if prefixes:
            self.prefixes.end(EngineError(code, message), digest)

    async def stats(self) -> Stats:
        """A snapshot of the engine's counters. It answers between two steps, so callers set their own deadline.

        Raises EngineError when there is no engine.
        """
        process = self._connection.require()
        if self._asked_stats is None:
            self._asked_stats = asyncio.get_running_loop().create_future()
            process.send(GetStats())
        return await asyncio.shield(self._asked_stats)

    async def latest_stats(self) -> Stats | None:
        """A fresh snapshot, or the last one where a busy engine takes too long; None while no engine answers."""
        try:
            async with asyncio.timeout(STATS_SECONDS):
                return await self.stats()
        except TimeoutError:
            return self._last_stats if self.answers else None
        except EngineError:
            return None

    async def recent_stats(self) -> Stats | None:
        """A snapshot of the last second; None where a busy engine takes too long, or there is none."""
        if self.stats_age > RECENT_SECONDS:
            await self.latest_stats()
        return self._last_stats if self.stats_age <= RECENT_SECONDS else None

    @property
    def last_stats(self) -> Stats | None:
        """The last snapshot, however old; None before the first one of an engine."""
        return self._last_stats

    @property
    def stats_age(self) -> float:
        """Seconds since the last snapshot arrived."""
        return time.monotonic() - self._stats_at

    async def _launch(self) -> None:
        process = EngineProcess(self._command, self._environment)
        self._connection.process = process
        try:
            self._connection.ready = await process.start(self._config, self._on_event)
        except BaseException:
            await process.close()
            raise
        self._backlog.places = self._connection.ready.max_running
        if self._config.kv_changes:
            self.kv_changes.put_nowait(None)
        self.adapters.tell_all()

    async def _supervise(self) -> None:
        """Wait for the engine to end or to hang, fail the requests that ran on it, start another, for ever."""
        loop = asyncio.get_running_loop()
        delays = _delays()
        while True:
            born = loop.time()
            assert self._connection.process is not None
            kind, reason = await self._connection.process.ended(self._timeout_seconds)
            _log.error("the engine %s (%s) with %d requests running; restarting it", kind, reason, len(self._streams))
            self._metrics.engine_ends[kind].inc()
            self._lost(EngineError("engine_died", f"the engine {kind} ({reason}); it is being restarted"))
            await self._connection.process.close()
            if loop.time() - born > STEADY_SECONDS:
                delays = _delays()
            await self._restart(delays)

    def _lost(self, failure: EngineError) -> None:
        self._connection.lost(failure)
        self.adapters.lost()
        self.paused = False
        self.end_requests(failure.code, failure.message)
        asked, self._asked_stats, self._last_stats = self._asked_stats, None, None
        if asked is not None:
            fail(asked, failure)
            asked.exception()  # marks it as seen: its caller may have given up

    async def _restart(self, delays: "itertools.chain[float]") -> None:
        while True:
            await asyncio.sleep(next(delays))
            try:
                await self._launch()
            except EngineStartFailed as error:
                _log.error("the engine did not start again: %s", error)
            else:
                _log.warning("the engine serves again")
                return

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Tokens | Failed) and event.request_id in self._streams:
            outcome = EngineError(event.code, event.message) if isinstance(event, Failed) else event
            self._streams[event.request_id].events.put_nowait(outcome)
        elif isinstance(event, PrefixHeld | PrefixEnded | Failed):
            self.prefixes.on_event(event)
        elif isinstance(event, AdapterState):
            self.adapters.on_state(event)
        elif isinstance(event, KvChanges):
            self.kv_changes.put_nowait(event)
        elif isinstance(event, Answer | PinsSet):
            self._connection.on_answer(event)
        elif isinstance(event, Stats):
            self._last_stats, self._stats_at = event, time.monotonic()
            asked, self._asked_stats = self._asked_stats, None
            if asked is not None:
                succeed(asked, event)


def _delays() -> "itertools.chain[float]":
    return itertools.chain(RESTART_SECONDS, itertools.repeat(RESTART_SECONDS[-1]))
