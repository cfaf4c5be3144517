"""One engine process: its start, its messages, its end."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence

import zmq
import zmq.asyncio

from runtime.config import EngineConfig
from runtime.messages import Command, Event, Ready, Shutdown, decode_events, encode
from storage.scratch import private_scratch

REASON_BYTES = 4096  # of standard error, kept for the reason why an engine did not start
SHUTDOWN_SECONDS = 3.0  # for an engine to end by itself before it is killed


class EngineStartFailed(RuntimeError):
    """The engine process ended before it was ready; the message is the last line of its standard error."""


class EngineProcess:
    """An engine process until its end. A restarted engine gets a new socket, so no message of an old one reaches it."""

    def __init__(self, command: Sequence[str]):
        self._command = command
        self._scratch = private_scratch()
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        for option in (zmq.LINGER, zmq.SNDHWM, zmq.RCVHWM):  # send never blocks, close never waits
            self._socket.setsockopt(option, 0)
        self._child: asyncio.subprocess.Process | None = None
        self._stderr = b""  # the last bytes of standard error
        self._ready = False  # an engine that is not ready would not read a Shutdown message
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

    async def died(self) -> str:
        """Wait for the end of the process; returns its signal or its exit status."""
        assert self._child is not None
        await self._child.wait()
        return self._status()

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
