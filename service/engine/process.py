"""One engine process: its start, its messages, its end."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import zmq
import zmq.asyncio

from runtime.config import EngineConfig
from runtime.messages import BROKEN, Command, Event, Ready, Shutdown, decode_events, encode
from storage.scratch import private_scratch

_log = logging.getLogger(__name__)

REASON_BYTES = 4096  # of standard error, kept for the reason why an engine did not start
SHUTDOWN_SECONDS = 3.0  # for an engine to end by itself before it is killed
KILL_SECONDS = 10.0  # for the kernel to end it; a process that waits for a driver may stay longer
WATCH_SECONDS = 0.5
# Of silence, if none is configured: so many times the longest one after which the engine went on, within these limits.
# An engine sends something each second or, if that is longer, after each step.
SILENCES, LEAST_SILENCE_SECONDS, MOST_SILENCE_SECONDS = 10, 30.0, 600.0

EndKind = Literal["died", "hung", "failed"]


class End(NamedTuple):
    """How an engine process ended."""

    kind: EndKind  # failed: by itself, because its steps failed for good
    reason: str


class EngineStartFailed(RuntimeError):
    """The engine process ended before it was ready; the message is the last line of its standard error."""


class EngineProcess:
    """An engine process until its end. A restarted engine gets a new socket, so no message of an old one reaches it."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None):
        """`environment` is the whole one of the process; None: that of this one."""
        self._command, self._environment = command, environment
        self._scratch = private_scratch()
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        for option in (zmq.LINGER, zmq.SNDHWM, zmq.RCVHWM):  # send never blocks, close never waits
            self._socket.setsockopt(option, 0)
        self._child: asyncio.subprocess.Process | None = None
        self._stderr = b""  # the last bytes of standard error
        self._ready = False  # an engine that is not ready would not read a Shutdown message
        self._silence = Silence(time.monotonic())
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def pid(self) -> int | None:
        return None if self._child is None else self._child.pid

    async def start(self, config: EngineConfig, on_event: Callable[[Event], None]) -> Ready:
        """Spawn the process, send its configuration, and wait until it is ready. Raises EngineStartFailed.

        `on_event` is called with every later event.
        """
        endpoint = f"ipc://{self._scratch.path}/engine"
        self._socket.bind(endpoint)
        try:
            self._child = await asyncio.create_subprocess_exec(
                *self._command,
                f"--parent={os.getpid()}",
                endpoint,
                stdin=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                env=self._environment,
                start_new_session=True,  # Ctrl-C in the terminal must reach the service only
            )
        except OSError as error:
            raise EngineStartFailed(f"the engine cannot be run: {error}") from None
        relay = asyncio.create_task(self._relay(), name="engine stderr")
        self._tasks.append(relay)
        first = asyncio.create_task(self._greet(config))
        exited = asyncio.create_task(self._child.wait())
        try:
            await asyncio.wait((first, exited), return_when=asyncio.FIRST_COMPLETED)
            if not first.done():
                await relay
                raise EngineStartFailed(self._reason())
        finally:
            first.cancel()
            exited.cancel()
        ready, *events = first.result()
        assert isinstance(ready, Ready)
        self._ready = True
        self._tasks.append(asyncio.create_task(self._read(events, on_event), name="engine events"))
        return ready

    def send(self, command: Command) -> None:
        """Send a command. It does not block: the socket has no limit."""
        self._socket.send(encode(command))

    @property
    def silent_seconds(self) -> float:
        """How long the engine, which is ready, has given no sign of life."""
        return self._silence.seconds

    async def ended(self, timeout_seconds: float | None = None) -> End:
        """Wait for the end of the process. One that gives no sign of life for so long is killed; None: a long time."""
        assert self._child is not None
        exited = asyncio.ensure_future(self._child.wait())
        try:
            while not exited.done():
                await asyncio.wait((exited,), timeout=WATCH_SECONDS)
                self._silence.tick(time.monotonic())
                if not exited.done() and self._silence.is_too_long(timeout_seconds):
                    self._kill()
                    return End("hung", f"no sign of life for {self._silence.seconds:.0f} s")
        finally:
            exited.cancel()
        if self._child.returncode == BROKEN:
            await asyncio.wait(self._tasks[:1], timeout=1.0)  # until all of standard error has been read
            return End("failed", self._reason())
        return End("died", self._status())

    async def close(self) -> None:
        """End the process, by a message and then by a signal, and wait for its end. Safe to call at any time."""
        try:
            await self._stop()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._socket.close()
            self._context.term()
            self._scratch.close()

    async def _stop(self) -> None:
        child = self._child
        if child is None or child.returncode is not None:
            return
        try:
            if self._ready:
                self.send(Shutdown())
                await asyncio.wait_for(child.wait(), SHUTDOWN_SECONDS)
        except TimeoutError:
            pass
        finally:  # also when cancelled: the engine must not outlive the service
            self._kill()
        try:
            await asyncio.wait_for(child.wait(), KILL_SECONDS)
        except TimeoutError:
            _log.error("the engine process %d does not end although it was killed: a driver may hold it", child.pid)

    def _kill(self) -> None:
        """Kill the process and all that it has started."""
        assert self._child is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)

    async def _greet(self, config: EngineConfig) -> list[Event]:
        await self._socket.send(encode(config))  # waits for the engine to connect, which it may never do
        return await self._receive()

    async def _receive(self) -> list[Event]:
        events = decode_events(await self._socket.recv())
        self._silence.end()
        return events

    async def _read(self, events: list[Event], on_event: Callable[[Event], None]) -> None:
        while True:
            for event in events:
                on_event(event)
            events = await self._receive()

    async def _relay(self) -> None:
        """Copy the engine's standard error to ours, and keep the last bytes."""
        assert self._child is not None
        assert self._child.stderr is not None
        while piece := await self._child.stderr.read(REASON_BYTES):  # not by lines: a line may have any length
            self._stderr = (self._stderr + piece)[-REASON_BYTES:]
            sys.stderr.write(piece.decode(errors="replace"))
            sys.stderr.flush()

    def _reason(self) -> str:
        lines = self._stderr.decode(errors="replace").strip().splitlines()
        return lines[-1].removeprefix("engine: ") if lines else f"the engine ended with {self._status()}"

    def _status(self) -> str:
        assert self._child is not None
        code = self._child.returncode or 0
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"


class Silence:
    """How long an engine has said nothing, as far as this process was awake to hear it."""

    def __init__(self, now: float) -> None:
        self.seconds = 0.0
        self._longest = 0.0  # of those that ended
        self._ticked_at = now

    def end(self) -> None:
        """The engine said something."""
        self._longest, self.seconds = max(self._longest, self.seconds), 0.0

    def tick(self, now: float) -> None:
        """Add the time since the last tick, but little of one in which this process was held up itself."""
        self.seconds += min(now - self._ticked_at, 2 * WATCH_SECONDS)
        self._ticked_at = now

    def is_too_long(self, limit_seconds: float | None) -> bool:
        if limit_seconds is None:
            limit_seconds = min(max(LEAST_SILENCE_SECONDS, SILENCES * self._longest), MOST_SILENCE_SECONDS)
        return self.seconds > limit_seconds
