"""One life of an engine process: its socket, its messages, its end."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable, Sequence

import zmq
import zmq.asyncio

from runtime.config import EngineConfig
from runtime.messages import Command, Event, Ready, Shutdown, decode_events, encode
from storage.scratch import private_scratch

REASON_BYTES = 4096  # of standard error, kept to say why an engine did not start
SHUTDOWN_SECONDS = 3.0  # for an engine to end by itself before it is killed


class EngineStartFailed(RuntimeError):
    """The engine process ended before it was ready; the message is what it said."""


class EngineProcess:
    """A started engine, until it dies. A new life gets a new socket, so no message of an old one can reach it."""

    def __init__(self, command: Sequence[str]):
        self._command = command
        self._scratch = private_scratch()
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        for option in (zmq.LINGER, zmq.SNDHWM, zmq.RCVHWM):  # send never blocks, close never waits
            self._socket.setsockopt(option, 0)
        self._child: asyncio.subprocess.Process | None = None
        self._said = b""
        self._greeted = False  # an engine that is not ready yet would not hear that it is to end
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def pid(self) -> int | None:
        return None if self._child is None else self._child.pid

    async def start(self, config: EngineConfig, on_event: Callable[[Event], None]) -> Ready:
        """Spawn the process, hand it its configuration, wait until it is ready; `on_event` gets all later events.

        Raises EngineStartFailed.
        """
        endpoint = f"ipc://{self._scratch.path}/engine"
        self._socket.bind(endpoint)
        try:
            self._child = await asyncio.create_subprocess_exec(
                *self._command,
                endpoint,
                stdin=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,  # a Ctrl-C in the terminal is for the service, which then ends the engine
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
        self._greeted = True
        self._tasks.append(asyncio.create_task(self._read(events, on_event), name="engine events"))
        return ready

    def send(self, command: Command) -> None:
        """Send at once: the socket has no limit, so an awaitable would only ever be done."""
        self._socket.send(encode(command))

    async def died(self) -> str:
        """Wait for the process to end; says how it did."""
        assert self._child is not None
        await self._child.wait()
        return self._status()

    async def close(self) -> None:
        """End the process, asking first; returns when it is gone. Safe to call on one that is dead or never lived."""
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
            if self._greeted:
                self.send(Shutdown())
                await asyncio.wait_for(child.wait(), SHUTDOWN_SECONDS)
        except TimeoutError:
            pass
        finally:  # cancelled or too slow: it must not outlive us
            with contextlib.suppress(ProcessLookupError):
                child.kill()
        await child.wait()

    async def _greet(self, config: EngineConfig) -> list[Event]:
        await self._socket.send(encode(config))  # waits for the engine to connect, which it may never do
        return await self._receive()

    async def _receive(self) -> list[Event]:
        return decode_events(await self._socket.recv())

    async def _read(self, events: list[Event], on_event: Callable[[Event], None]) -> None:
        while True:
            for event in events:
                on_event(event)
            events = await self._receive()

    async def _relay(self) -> None:
        """Pass on what the engine says, and remember the end of it."""
        assert self._child is not None
        assert self._child.stderr is not None
        while said := await self._child.stderr.read(REASON_BYTES):  # by pieces: a line may have any length
            self._said = (self._said + said)[-REASON_BYTES:]
            sys.stderr.write(said.decode(errors="replace"))
            sys.stderr.flush()

    def _reason(self) -> str:
        lines = self._said.decode(errors="replace").strip().splitlines()
        return lines[-1].removeprefix("engine: ") if lines else f"the engine ended with {self._status()}"

    def _status(self) -> str:
        assert self._child is not None
        code = self._child.returncode or 0
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
