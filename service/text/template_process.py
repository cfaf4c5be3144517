"""A process that renders chat templates of strangers: python -m service.text.template_process

It reads jobs from its input and writes an answer to each. A template that runs for too long ends the process, by a
timer of the system that no code of the template can hold up; one that wants too much memory does not get it.
"""

import resource
import signal
import struct
import sys
from typing import BinaryIO

import msgspec

from service.text.rendering import Conversation, InvalidChat, render

MEMORY_BYTES = 1 << 30
LENGTH = struct.Struct("<Q")  # before each message, in bytes
STARTED = b"+"


class Job(msgspec.Struct, frozen=True, kw_only=True):
    template: str
    conversation: Conversation
    seconds: float  # of processor time


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    text: str | None = None
    refusal: str | None = None


def framed(message: msgspec.Struct) -> bytes:
    content = msgspec.msgpack.encode(message)
    return LENGTH.pack(len(content)) + content


def main(jobs: BinaryIO, answers: BinaryIO) -> None:
    """Answer jobs until there are no more."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the server ends this process
    answers.write(STARTED)
    answers.flush()
    while length := jobs.read(LENGTH.size):
        job = msgspec.msgpack.decode(jobs.read(LENGTH.unpack(length)[0]), type=Job)
        signal.setitimer(signal.ITIMER_PROF, job.seconds)
        answer = _answer(job)
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(framed(answer))
        answers.flush()


def _answer(job: Job) -> Answer:
    try:
        return Answer(text=render(job.template, job.conversation))
    except InvalidChat as error:
        return Answer(refusal=str(error))


if __name__ == "__main__":
    main(sys.stdin.buffer, sys.stdout.buffer)
