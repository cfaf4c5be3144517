"""The other ranks, as rank 0 sees them: processes that obey in order, and end when rank 0 does."""

import contextlib
import itertools
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from runtime.config import EngineConfig
from runtime.parallel.commands import Command, Done, Failed, Fill, Joining, Ready, Reload, Start, decode_report, encode
from runtime.parallel.group import GroupFailed

PROGRAM = "runtime.follower.process"
END_SECONDS = 1.0  # for a follower to end by itself before it is killed
# For the reason of the rank that failed first: the others lose their connections to it, and may say so before its own
# end is known
FIRST_SECONDS = 2.0

T = TypeVar("T")


class RankFault(RuntimeError):
    """Another rank could not do what it was asked for, or has ended; the message begins with which."""

    def __init__(self, rank: int, fault: str, kind: str = "") -> None:
        super().__init__(f"rank {rank}: {fault}")
        self.fault, self.kind = fault, kind  # the class of the error there


class _Follower:
    """One process, and the connection to it."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.connection, theirs = Pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", PROGRAM, f"--parent={os.getpid()}", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self.stages: queue.SimpleQueue[Joining | Ready | RankFault] = queue.SimpleQueue()  # of its start
        self._sending = threading.Lock()

    def send(self, message: bytes) -> None:
        with self._sending:
            self.connection.send_bytes(message)

    def hang_up(self) -> None:
        """End the connection for both sides; to close it would not, while a thread here reads from it."""
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.connection.fileno())) as own:
            own.shutdown(socket.SHUT_RDWR)

    def end(self) -> str:
        """End the connection, and wait for the end of the process. Returns how it ended."""
        self.hang_up()
        try:
            code = self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        return f"it was ended by {signal.Signals(-code).name}" if code < 0 else f"it ended with status {code}"


class Followers:
    """Owns the processes of ranks 1 and up; false if there are none. Any thread may ask, the engine's alone tells.

    When one ends, everything that was asked of it fails, and `failure` says why: the engine cannot go on.
    """

    def __init__(self) -> None:
        self.bytes_sent = 0  # of commands, counted for each rank that got them
        self._first: Future[RankFault] = Future()  # why the first one ended
        self._followers: list[_Follower] = []
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._tickets = itertools.count(1)
        self._asked: dict[tuple[int, int], Future[None]] = {}  # by rank and ticket
        self._lock = threading.Lock()  # of what the threads that listen change
        self._closing = False

    def start(self, config: EngineConfig) -> None:
        """Start a process for each rank but this one, and wait until all are about to join the group.

        Raises ValueError with the reason of one that cannot start.
        """
        config = msgspec.structs.replace(config, bars=False)  # one rank shows how far all are
        self._scratch = tempfile.TemporaryDirectory(prefix="rootstock-ranks-")
        for rank in range(1, config.tensor_parallel_size):
            follower = _Follower(rank)
            self._followers.append(follower)
            threading.Thread(target=self._listen, args=(follower,), name=f"rank {rank}", daemon=True).start()
        for follower in self._followers:
            self._send_to(follower, encode(Start(config, follower.rank, self.store)))
        self._await_stage()

    @property
    def store(self) -> str:
        """The path of the file by which the ranks find each other."""
        assert self._scratch is not None
        return str(Path(self._scratch.name) / "store")

    def meet(self, join: Callable[[], T]) -> T:
        """Return what `join` returns, which waits for all ranks. Raises ValueError with the reason of one that ended.

        `join` runs on a thread of its own, which nothing can end before its time: it may be left waiting.
        """
        joined: list[T] = []
        faults: list[GroupFailed] = []
        done: Future[None] = Future()

        def run() -> None:
            try:
                joined.append(join())
            except GroupFailed as error:
                faults.append(error)
            finally:
                done.set_result(None)

        threading.Thread(target=run, name="join", daemon=True).start()
        either: list[Future[Any]] = [done, self._first]
        wait(either, return_when=FIRST_COMPLETED)
        if joined and self.failure is None:
            return joined[0]
        raise ValueError(self.reason() or f"the ranks cannot meet: {', '.join(map(str, faults))}")

    def wait_until_ready(self) -> None:
        """Wait until every rank can compute a step. Raises ValueError with the reason of one that cannot."""
        try:
            self._await_stage()
        except ValueError:
            self.close()
            raise
        if self._scratch is not None:
            self._scratch.cleanup()  # all have met there

    def watch(self, on_end: Callable[[RankFault], None]) -> None:
        """Call `on_end`, from a thread, when a follower ends before it should."""
        self._first.add_done_callback(lambda first: on_end(first.result()))

    def __bool__(self) -> bool:
        return bool(self._followers)

    @property
    def failure(self) -> RankFault | None:
        """Why the engine cannot go on."""
        return self._first.result() if self._first.done() else None

    @property
    def pids(self) -> list[int]:
        return [follower.process.pid for follower in self._followers]

    def tell(self, command: Command) -> None:
        """Have all ranks obey a command, after those before it."""
        if self._followers:
            self._send(encode(command))

    def ask(self, command: Fill | Reload) -> Callable[[], None]:
        """As `tell`; the result waits until all ranks have done it. It raises RankFault."""
        if not self._followers:
            return lambda: None
        with self._lock:
            ticket = next(self._tickets)
            answers: list[Future[None]] = [Future() for _ in self._followers]
            for follower, answer in zip(self._followers, answers, strict=True):
                if self.failure is None:
                    self._asked[follower.rank, ticket] = answer
                else:
                    answer.set_exception(self.failure)
        self._send(encode(msgspec.structs.replace(command, ticket=ticket)))

        def wait() -> None:
            faults = [answer.exception() for answer in answers]
            for fault in filter(None, faults):
                raise fault

        return wait

    def reason(self) -> str | None:
        """Why a follower ended, if one has: calls that need it may fail a moment before that is known."""
        wait((self._first,), FIRST_SECONDS)
        return None if self.failure is None else str(self.failure)

    def close(self) -> None:
        """End all processes. Safe to call at any time."""
        self._closing = True
        for follower in self._followers:
            follower.end()
        if self._scratch is not None:
            self._scratch.cleanup()

    def _await_stage(self) -> None:
        for follower in self._followers:
            report = follower.stages.get()
            if isinstance(report, RankFault):
                raise ValueError(str(report))

    def _send(self, message: bytes) -> None:
        for follower in self._followers:
            self.bytes_sent += len(message)
            self._send_to(follower, message)

    def _send_to(self, follower: _Follower, message: bytes) -> None:
        with contextlib.suppress(OSError):  # it has ended: the thread that listens to it says why
            follower.send(message)

    def _listen(self, follower: _Follower) -> None:
        failed: Failed | None = None
        with contextlib.suppress(EOFError, OSError):
            while True:
                match decode_report(follower.connection.recv_bytes()):
                    case Done() as done:
                        self._answer(follower.rank, done)
                    case Failed() as failed:
                        pass
                    case stage:
                        follower.stages.put(stage)
        if failed is not None and failed.group:
            wait((self._first,), FIRST_SECONDS)
        if not self._closing:
            self._fail(follower, follower.end() if failed is None else failed.reason)

    def _answer(self, rank: int, done: Done) -> None:
        with self._lock:
            answer = self._asked.pop((rank, done.ticket))
        if done.fault:
            answer.set_exception(RankFault(rank, done.fault, done.kind))
        else:
            answer.set_result(None)

    def _fail(self, follower: _Follower, reason: str) -> None:
        fault = RankFault(follower.rank, reason)
        with self._lock:
            fault = self.failure or fault
            failed, self._asked = list(self._asked.values()), {}
            if not self._first.done():
                self._first.set_result(fault)
        for answer in failed:
            answer.set_exception(fault)
        follower.stages.put(fault)
