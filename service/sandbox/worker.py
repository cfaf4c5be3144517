"""The inside of a sandbox: a process that reads jobs from its input and writes an answer to each.

A job that takes too long ends the process, by a timer of the system that no code of the job can hold up; one that
wants too much memory does not get it; one that goes too deep ends the process.
"""

import resource
import signal
import struct
import sys

HEADER = struct.Struct("<Qd")  # before a job: its length in bytes, and the seconds of processor time that it may take
LENGTH = struct.Struct("<Q")  # before an answer
STARTED = b"+"


class Worker:
    """Standard input and output of this process, as jobs and answers, and its limits in bytes."""

    def __init__(self, memory_bytes: int, stack_bytes: int | None = None) -> None:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if stack_bytes is not None:
            resource.setrlimit(resource.RLIMIT_STACK, (stack_bytes, resource.getrlimit(resource.RLIMIT_STACK)[1]))
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the server ends this process
        self._jobs, self._answers = sys.stdin.buffer, sys.stdout.buffer
        self._write(STARTED)

    def next_job(self) -> bytes | None:
        """The next job, whose time begins now; None if there are no more."""
        header = self._jobs.read(HEADER.size)
        if not header:
            return None
        length, seconds = HEADER.unpack(header)
        job = self._jobs.read(length)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        return job

    def answer(self, content: bytes) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        self._write(LENGTH.pack(len(content)) + content)

    def _write(self, content: bytes) -> None:
        self._answers.write(content)
        self._answers.flush()
