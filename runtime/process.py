"""The engine as a process of its own: commands in and events out over one ZeroMQ socket.

usage: python -m runtime.process [--parent=PID] ENDPOINT

The first message is the EngineConfig. An engine that cannot start prints the reason to stderr and exits with status 3;
one whose steps fail for good exits with status 4. It dies with its parent, whatever it is doing.
"""

import argparse
import contextlib
import gc
import logging
import os
import re
import select
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import msgspec
import zmq

from runtime.config import EngineConfig
from runtime.messages import (
    BROKEN,
    CANNOT_START,
    Abort,
    Answer,
    Command,
    DropNamespace,
    Event,
    FailAdapter,
    Failed,
    Generate,
    GetStats,
    HoldPrefix,
    LoadAdapter,
    RegisterAdapter,
    ReleasePrefix,
    RetireAdapter,
    SetPaused,
    SetPins,
    Shutdown,
    UnloadAdapter,
    decode_command,
    encode,
)
from runtime.output.logs import write_lines
from runtime.parent import die_with
from runtime.request import RequestRefused

if TYPE_CHECKING:
    from runtime.engine import Engine

_log = logging.getLogger("runtime.process")  # not __name__, which is __main__ in the engine's process

FAILED_STEPS = 3  # in a row, with none between them that was computed: the engine will not recover
# What CUDA says of errors after which no call of the process succeeds, in the words of cudaGetErrorString
LASTING = re.compile(
    "illegal memory access|unspecified launch failure|uncorrectable (ECC|NVLink) error|launch timed out|"
    "device-side assert|hardware stack error|illegal instruction|misaligned address|invalid program counter|"
    "not supported on global/shared address space|context is destroyed"
)
# Each operation of a step acquires the interpreter's lock again, and waits for it up to this long while a loader thread
# runs Python; the default of 5 ms is a fifth of a decode step.
SWITCH_SECONDS = 0.0005
PARENT_CHECK_MILLISECONDS = 1000
SIGN_SECONDS = 1.0  # the loop sends a message at least this often, if no step takes longer: it is how one sees it alive


class EngineBroken(RuntimeError):
    """No later step can succeed in this process; the message is the reason."""


class EngineServer:
    """Runs an engine by the commands from a socket: steps while there is work, and sleeps otherwise."""

    def __init__(self, engine: "Engine", socket: "zmq.Socket[bytes]", parent: int):
        self.engine = engine
        self.socket = socket
        self.parent = parent  # the process id of the service
        self.stopping = False
        self._failed_steps = 0  # in a row
        self._sent_at = 0.0  # time.monotonic() of the last message
        self._wake_reader, self._wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        engine.watch(self._wake)
        self.poller = zmq.Poller()
        self.poller.register(socket, zmq.POLLIN)
        self.poller.register(self._wake_reader, zmq.POLLIN)

    def run(self) -> None:
        """Run until a Shutdown, or until the parent process is gone. Raises EngineBroken."""
        self._send([self.engine.ready])
        progressed = False
        while not self.stopping and os.getppid() == self.parent:
            if not progressed:
                self._sleep()
            events = [event for command in self._commands() for event in self._obey(command)]
            steps = self.engine.steps
            stepped = self._step()
            progressed = self.engine.steps > steps or bool(stepped)  # the end of a request may let another one start
            self._send(events + stepped)

    def _step(self) -> list[Event]:
        completed = self.engine.completed_steps
        try:
            events = self.engine.step()
        except Exception as error:  # an error in a step ends the requests, not the engine
            _log.exception("a step failed")
            self._failed_steps += 1
            self._refuse_to_go_on(error)
            return self.engine.fail_all("engine_error", "the engine failed while it computed this request")
        if self.engine.completed_steps > completed:
            self._failed_steps = 0
        return events

    def _refuse_to_go_on(self, error: Exception) -> None:
        """Raise EngineBroken if later steps would fail as well: a new process may do better."""
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        followers = self.engine.runner.followers
        if followers:  # which wait for the rest of the step
            raise EngineBroken(followers.reason() or f"a step of several ranks failed: {reason}") from error
        if LASTING.search(str(error)):
            raise EngineBroken(f"the device failed: {reason}") from error
        if self._failed_steps >= FAILED_STEPS:
            raise EngineBroken(f"{FAILED_STEPS} steps in a row failed: {reason}") from error

    def _sleep(self) -> None:
        """Wait for a command, or for the end of a load or a reload."""
        self.poller.poll(PARENT_CHECK_MILLISECONDS)
        while select.select([self._wake_reader], [], [], 0)[0]:
            os.read(self._wake_reader, 4096)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # the pipe is full: the engine will wake up
            os.write(self._wake_writer, b"\0")

    def _commands(self) -> Iterator[Command]:
        while True:
            try:
                yield decode_command(self.socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return

    def _send(self, events: list[Event]) -> None:
        """Send events; a message without any says that the loop goes round."""
        now = time.monotonic()
        if events or now - self._sent_at >= SIGN_SECONDS:
            self.socket.send(encode(events))
            self._sent_at = now

    def _obey(self, command: Command) -> list[Event]:
        engine = self.engine
        match command:
            case Generate() | HoldPrefix():
                return self._queue(command)
            case ReleasePrefix(prefix_id=prefix_id):
                engine.release_prefix(prefix_id)
            case DropNamespace(request_id=request_id, namespace=namespace):
                engine.drop_namespace(namespace)
                return [Answer(request_id=request_id)]
            case SetPaused(request_id=request_id, paused=paused):
                engine.set_paused(paused)
                return [Answer(request_id=request_id)]
            case Abort(request_id=request_id):
                engine.abort(request_id)
            case RegisterAdapter(digest=digest, path=path):
                engine.register_adapter(digest, Path(path))
            case FailAdapter(digest=digest, reason=reason):
                engine.adapters.fail(digest, reason)
            case LoadAdapter(digest=digest, tier=tier, request_id=asked):
                engine.adapters.load(digest, tier, asked)
            case UnloadAdapter(request_id=request_id, digest=digest, tier=tier):
                engine.adapters.unload(request_id, digest, tier)
            case SetPins(request_id=request_id, pins=pins):
                engine.adapters.set_pins(request_id, pins)
            case RetireAdapter(digest=digest):
                engine.retire_adapter(digest)
            case GetStats():
                return [engine.stats()]
            case Shutdown():
                self.stopping = True
        return []

    def _queue(self, command: Generate | HoldPrefix) -> list[Event]:
        try:
            if isinstance(command, Generate):
                self.engine.add_request(command)
            else:
                self.engine.hold_prefix(command)
        except RequestRefused as refusal:
            return [Failed(request_id=command.request_id, code=refusal.code, message=str(refusal))]
        return []


def main(endpoint: str, parent: int) -> None:
    """Connect, read the configuration, start the engine and run it, until the process `parent` is gone."""
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.connect(endpoint)
    config = msgspec.msgpack.decode(socket.recv(), type=EngineConfig)
    write_lines(config.log_format, config.log_level.upper())
    from runtime.engine import Engine  # which takes seconds; what comes before it is to be ready at once

    start = time.monotonic()
    try:
        engine = Engine(config)
    except (ValueError, OSError) as error:
        _end(CANNOT_START, str(error))
    _log.info("started with %s in %.1f s", config.model, time.monotonic() - start)
    engine.runner.followers.watch(lambda fault: _end(BROKEN, str(fault)))
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.collect()
    gc.freeze()  # these objects stay for ever; collecting among them took 150 ms while requests ran
    try:
        EngineServer(engine, socket, parent).run()
    except EngineBroken as broken:
        _end(BROKEN, str(broken))
    engine.close()
    socket.close()


def _end(status: int, reason: str) -> NoReturn:
    """End the process at once: threads that wait for a broken device would hold up any other end.

    The reason is the last line of standard error: who logs from now on waits for the end.
    """
    for handler in logging.getLogger().handlers:
        handler.acquire()
    print(f"engine: {reason}", file=sys.stderr, flush=True)
    os._exit(status)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(prog="python -m runtime.process")
    # Given, because the parent may die while this process imports its modules: then getppid() names another process.
    arguments.add_argument("--parent", type=int, default=os.getppid(), help="process id of the service")
    arguments.add_argument("endpoint", help="ZeroMQ endpoint of the service")
    given = arguments.parse_args()
    die_with(given.parent)
    main(given.endpoint, given.parent)
