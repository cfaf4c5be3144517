"""Rendering chat templates of strangers: in processes that end if a template runs for too long."""

import asyncio
import signal
import sys

import msgspec

from service.text.rendering import Conversation, InvalidChat
from service.text.template_process import LENGTH, STARTED, Answer, Job, framed

SECONDS = 2.0  # of processor time for one prompt
PLACES = 4  # prompts that are rendered at one time; others wait


class TemplateSandbox:
    """Owns the processes. They are started when they are needed, and kept. All calls belong to one event loop."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._places = asyncio.Semaphore(PLACES)
        self._idle: list[asyncio.subprocess.Process] = []

    async def render(self, template: str, conversation: Conversation) -> str:
        """The prompt. Raises InvalidChat, also for a template that takes longer than the limit."""
        job = framed(Job(template=template, conversation=conversation, seconds=self._seconds))
        async with self._places:
            process = self._take() or await _started()
            try:
                answer = await _ask(process, job)
            except (asyncio.IncompleteReadError, ConnectionError):
                raise InvalidChat(self._reason(await process.wait())) from None
            except BaseException:  # nobody waits for the answer
                await _end(process)
                raise
            self._idle.append(process)
        if answer.text is None:
            raise InvalidChat(answer.refusal)
        return answer.text

    async def close(self) -> None:
        while self._idle:
            await _end(self._idle.pop())

    def _take(self) -> asyncio.subprocess.Process | None:
        """An idle process that runs."""
        while self._idle:
            process = self._idle.pop()
            if process.returncode is None:
                return process
        return None

    def _reason(self, status: int) -> str:
        if status == -signal.SIGPROF:
            return f"the chat template takes longer than {self._seconds:g} s for these messages: make it simpler"
        return "the chat template ended the process that renders it: make it simpler"


async def _started() -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "service.text.template_process"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdout is not None
    try:
        await process.stdout.readexactly(len(STARTED))
    except BaseException:
        await _end(process)
        raise
    return process


async def _ask(process: asyncio.subprocess.Process, job: bytes) -> Answer:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(job)
    await process.stdin.drain()
    [length] = LENGTH.unpack(await process.stdout.readexactly(LENGTH.size))
    return msgspec.msgpack.decode(await process.stdout.readexactly(length), type=Answer)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()
