"""Code that may not end, or end its process, on data of strangers: run in processes of its own."""

import asyncio
import signal
import sys
from collections.abc import Mapping

import msgspec

from service.sandbox.worker import HEADER, LENGTH, STARTED


class JobFailed(Exception):
    """A job ended its process; `too_long` if it was by the time limit."""

    def __init__(self, *, too_long: bool) -> None:
        super().__init__()
        self.too_long = too_long


class Sandbox:
    """Owns processes of one program, a module that has a `Worker`.

    They are started when they are needed, and kept; one that a job has ended is replaced by the next job. At most
    `places` jobs run at one time, others wait. `seconds` of processor time are what one job may take. All calls belong
    to one event loop.
    """

    def __init__(self, module: str, places: int, seconds: float, environment: Mapping[str, str] | None = None) -> None:
        """`environment` is the whole one of the processes; None: that of this one."""
        self._module, self._seconds, self._environment = module, seconds, environment
        self._places = asyncio.Semaphore(places)
        self._idle: list[asyncio.subprocess.Process] = []

    async def run(self, job: msgspec.Struct) -> bytes:
        """The answer to a job. Raises JobFailed."""
        content = msgspec.json.encode(job)
        async with self._places:
            process = self._take() or await self._started()
            try:
                answer = await _ask(process, HEADER.pack(len(content), self._seconds) + content)
            except (asyncio.IncompleteReadError, ConnectionError):
                raise JobFailed(too_long=await process.wait() == -signal.SIGPROF) from None
            except BaseException:  # nobody waits for the answer
                await _end(process)
                raise
            self._idle.append(process)
        return answer

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

    async def _started(self) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", self._module),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=self._environment,
        )
        assert process.stdout is not None
        try:
            await process.stdout.readexactly(len(STARTED))
        except BaseException:
            await _end(process)
            raise
        return process


async def _ask(process: asyncio.subprocess.Process, job: bytes) -> bytes:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(job)
    await process.stdin.drain()
    [length] = LENGTH.unpack(await process.stdout.readexactly(LENGTH.size))
    return await process.stdout.readexactly(length)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()
