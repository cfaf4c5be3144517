"""The service's end of the engine: open token streams, and an engine process that is kept alive."""

import asyncio
import itertools
import logging
import math
import time
from collections.abc import AsyncGenerator, Sequence
from typing import NamedTuple

from runtime.config import EngineConfig
from runtime.messages import (
    Abort,
    AdapterState,
    Answer,
    Command,
    Event,
    Failed,
    Generate,
    GetStats,
    PrefixEnded,
    PrefixHeld,
    Ready,
    Stats,
    Tokens,
)
from service.engine.adapters import RequestFailed
from service.engine.prefixes import EnginePrefixes
from service.engine.process import EngineProcess, EngineStartFailed

log = logging.getLogger(__name__)

RESTART_SECONDS = (0.2, 1.0, 5.0, 15.0, 30.0)  # before each attempt in a row; the last repeats
STEADY_SECONDS = 60.0  # an engine that lived this long starts the row anew
RECENT_SECONDS = 1.0  # the age at which a snapshot is still taken for the present
STATS_SECONDS = 0.8  # how long to wait for one: the engine answers between two steps


class Stream(NamedTuple):
    """An open token stream: the adapter its request runs on, and what has come for it."""

    adapter: str | None
    events: asyncio.Queue[Tokens | Failed]


class EngineClient(EnginePrefixes):
    """Generates through an engine process, and restarts it when it dies; owns the open token streams."""

    def __init__(self, config: EngineConfig, command: Sequence[str]):
        super().__init__()
        self.ready: Ready | None = None  # None while there is no engine to serve
        self._config, self._command = config, command
        self._process: EngineProcess | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._streams: dict[str, Stream] = {}
        self.last_stats: Stats | None = None
        self._stats_at = -math.inf  # time.monotonic()
        self._stats: asyncio.Future[Stats] | None = None

    # ------------------------------------------------------------------ the process

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
        if self._process is not None:
            await self._process.close()

    async def _launch(self) -> None:
        self._process = EngineProcess(self._command)
        try:
            self.ready = await self._process.start(self._config, self._on_event)
        except BaseException:
            await self._process.close()
            raise
        self._tell_all()

    async def _supervise(self) -> None:
        """Wait for the engine to die, fail what ran on it, and start another, for ever."""
        loop = asyncio.get_running_loop()
        delays = _delays()
        while True:
            born = loop.time()
            assert self._process is not None
            status = await self._process.died()
            self.ready = None
            self._forget_engine(f"the engine died ({status}); it is being restarted")
            log.error("the engine died (%s) with %d requests running; restarting it", status, len(self._streams))
            self.end_requests("engine_died", f"the engine died ({status}); it is being restarted")
            self._answer_stats(RequestFailed("engine_died", f"the engine died ({status})"))
            self.last_stats = None
            await self._process.close()
            if loop.time() - born > STEADY_SECONDS:
                delays = _delays()
            await self._restart(delays)

    async def _restart(self, delays: "itertools.chain[float]") -> None:
        while True:
            await asyncio.sleep(next(delays))
            try:
                await self._launch()
            except EngineStartFailed as error:
                log.error("the engine did not start again: %s", error)
            else:
                log.warning("the engine serves again")
                return

    @property
    def pid(self) -> int | None:
        """The process id of the engine that runs now."""
        return None if self._process is None else self._process.pid

    # ------------------------------------------------------------------ requests

    def busy(self) -> bool:
        """Whether any request runs or waits to."""
        return bool(self._streams)

    async def generate(self, command: Generate) -> AsyncGenerator[Tokens, None]:
        """Run one sequence and yield its tokens as they come; closing the generator aborts it.

        Raises RequestFailed when the engine refuses it, fails at it, or dies.
        """
        process = self._serving_process()
        stream = self._streams[command.request_id] = Stream(command.adapter, asyncio.Queue())
        ended = False
        try:
            process.send(command)
            while not ended:
                event = await stream.events.get()
                ended = isinstance(event, Failed) or event.finish_reason is not None
                if isinstance(event, Failed):
                    raise RequestFailed(event.code, event.message)
                yield event
        finally:
            del self._streams[command.request_id]
            if not ended and process is self._process and self.ready is not None:
                process.send(Abort(request_id=command.request_id))

    def end_requests(self, code: str, message: str, digest: str | None = None) -> None:
        """Fail every running request and end every held prefix, or those on one adapter."""
        for request_id, stream in self._streams.items():
            if digest is None or stream.adapter == digest:
                self._send(Abort(request_id=request_id))
                stream.events.put_nowait(Failed(request_id=request_id, code=code, message=message))
        self._end_prefixes(RequestFailed(code, message), digest)

    # ------------------------------------------------------------------ looking in

    async def stats(self) -> Stats:
        """A snapshot of the engine's counters; it answers between two steps, so callers set their own deadline.

        Raises RequestFailed when there is no engine.
        """
        process = self._serving_process()
        if self._stats is None:
            self._stats = asyncio.get_running_loop().create_future()
            process.send(GetStats())
        return await asyncio.shield(self._stats)

    async def latest_stats(self) -> Stats | None:
        """A fresh snapshot, or the last one where a busy engine takes too long; None while there is no engine."""
        try:
            async with asyncio.timeout(STATS_SECONDS):
                return await self.stats()
        except TimeoutError:
            return self.last_stats
        except RequestFailed:
            return None

    async def recent_stats(self) -> Stats | None:
        """A snapshot that is hardly older than a second; None where a busy engine takes too long, or there is none."""
        if self.stats_age > RECENT_SECONDS:
            await self.latest_stats()
        return self.last_stats if self.stats_age <= RECENT_SECONDS else None

    @property
    def stats_age(self) -> float:
        """Seconds since the last snapshot came."""
        return time.monotonic() - self._stats_at

    @property
    def serving(self) -> bool:
        return self.ready is not None and self._process is not None

    def _send(self, command: Command) -> None:
        if self.ready is not None and self._process is not None:
            self._process.send(command)

    def _serving_process(self) -> EngineProcess:
        self._require_engine()
        assert self._process is not None
        return self._process

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Tokens | Failed):
            stream = self._streams.get(event.request_id)
            if stream is not None:  # what was aborted may have had a token on its way
                stream.events.put_nowait(event)
            elif isinstance(event, Failed):
                self._on_prefix(event)
        elif isinstance(event, PrefixHeld | PrefixEnded):
            self._on_prefix(event)
        elif isinstance(event, AdapterState):
            self._on_state(event)
        elif isinstance(event, Answer):
            self._on_answer(event)
        elif isinstance(event, Stats):
            self.last_stats, self._stats_at = event, time.monotonic()
            self._answer_stats(event)

    def _answer_stats(self, answer: Stats | RequestFailed) -> None:
        waiting, self._stats = self._stats, None
        if waiting is None:
            return
        if isinstance(answer, Stats):
            waiting.set_result(answer)
        else:
            waiting.set_exception(answer)
            waiting.exception()  # its caller may have given up: then nobody is left to see it


def _delays() -> "itertools.chain[float]":
    return itertools.chain(RESTART_SECONDS, itertools.repeat(RESTART_SECONDS[-1]))
