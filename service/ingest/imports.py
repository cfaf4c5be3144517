"""Adapters on their way from a source to a name: how far each is, how many at once, and why one failed."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from service.catalog.record import AdapterVersion
from service.errors import RequestError, request_error
from service.source_urls import Source

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
MAX_WAITING = 1000  # imports that wait for others; each is a few hundred bytes
CLOSE_SECONDS = 5.0
MAX_FAILED, FAILED_SECONDS = 1000, 3600.0  # how many failures are remembered, and how long


class ImportCancelled(Exception):
    """Raised on the thread of an import whose name was deleted."""


class Import:
    """One source on its way to a name. `bytes` of `total_bytes` have come; `error` is why it failed."""

    def __init__(self, name: str, source: Source, *, ephemeral: bool = False) -> None:
        self.name, self.source, self.ephemeral = name, source, ephemeral
        self.created_at, self.ended_at = time.time(), 0.0
        self.bytes = 0
        self.total_bytes: int | None = None
        self.error: RequestError | None = None
        self.committing = False  # from here on its end is waited for, as half of a change is none
        self._cancelled = threading.Event()

    def progressed(self, done: int, total: int) -> None:
        """To be called from the thread that fetches, which it stops when nobody wants the adapter any more."""
        if self._cancelled.is_set():
            raise ImportCancelled
        self.bytes, self.total_bytes = done, total

    def stop(self) -> None:
        self._cancelled.set()


Published = tuple[AdapterVersion, bool]  # what a name means now, and whether it is a new one
Work = Callable[[Import], Coroutine[Any, Any, Published]]


class Imports:
    """Owns the imports under way and the failures of late ones; all calls belong to one event loop.

    At most `max_running` imports and uploads run at once: further imports wait, further uploads are refused.
    The threads are its own: sources that do not answer must not hold those that everything else needs.
    """

    def __init__(self, max_running: int) -> None:
        self._slots = asyncio.Semaphore(max_running)
        self._threads = ThreadPoolExecutor(max_running, thread_name_prefix="import")
        self._tasks: dict[Import, asyncio.Task[Published]] = {}
        self._running: dict[str, Import] = {}
        self._failed: dict[str, Import] = {}

    def start(self, job: Import, work: Work) -> Import:
        """Run an import's work as soon as there is room. Raises RequestError 409 while another has its name, 503."""
        self.require_idle(job.name)
        if len(self._running) >= MAX_WAITING:
            raise RequestError("too_many_uploads", f"{MAX_WAITING} imports are waiting already")
        self._failed.pop(job.name, None)
        self._running[job.name] = job
        self._tasks[job] = task = asyncio.create_task(self._run(job, work), name=f"import {job.name}")
        task.add_done_callback(lambda ended: self._ended(job, ended))
        return job

    async def result(self, job: Import) -> Published:
        """What an import has published, and whether the name is new. Raises its failure."""
        task = self._tasks[job]
        await asyncio.wait([task])
        if self._failed.get(job.name) is job:
            del self._failed[job.name]  # its caller knows
        if task.cancelled():
            raise RequestError("import_cancelled", f"adapter {job.name!r} was deleted while it was imported", "name")
        error = task.exception()
        if isinstance(error, Exception):
            raise request_error(error) or error
        return task.result()

    def get(self, name: str) -> Import | None:
        """The import of a name that is under way, or has failed and was not replaced since."""
        self._expire()
        return self._running.get(name) or self._failed.get(name)

    def jobs(self) -> list[Import]:
        """Every import that `get` would find."""
        self._expire()
        return [*self._running.values(), *self._failed.values()]

    def require_idle(self, name: str) -> None:
        """Raise RequestError 409 while a name is imported."""
        if name in self._running:
            message = f"adapter {name!r} is being imported: wait for that, or delete it first"
            raise RequestError("import_in_progress", message, "name")

    async def forget(self, name: str) -> bool:
        """End the import of a name, or drop its failure; whether there was one.

        One that is being published is waited for. Any other is over for its name at once, and clears up by itself: its
        thread may be held by a store that does not answer.
        """
        if (job := self._running.get(name)) is None:
            return self._failed.pop(name, None) is not None
        if job.committing:
            await asyncio.wait([self._tasks[job]])
            self._failed.pop(name, None)
        else:
            self._running.pop(name)
            self._tasks[job].cancel()
        return True

    def published(self, name: str) -> None:
        """A name means something new: its import is over but for clearing up, and an earlier failure no news."""
        self._running.pop(name, None)
        self._failed.pop(name, None)

    @asynccontextmanager
    async def uploading(self) -> AsyncIterator[None]:
        """Take one of the places. Raises RequestError 503 when there is none: an upload's bytes cannot wait."""
        if self._slots.locked():
            raise RequestError("too_many_uploads", "too many uploads and imports are under way")
        async with self._slots:
            yield

    async def on_thread(self, job: Import, work: Callable[..., _T], *arguments: Any) -> _T:
        """Run one of an import's blocking steps; when cancelled, wait until its thread has let go of the files."""
        future = asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            job.stop()
            await asyncio.wait([future])
            future.exception()  # nobody else asks
            raise

    async def close(self) -> None:
        """Cancel what is under way and wait until it has cleared up, but not for a store that does not answer."""
        tasks = list(self._tasks.values())
        for job, task in self._tasks.items():
            if not job.committing:
                task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_SECONDS)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, job: Import, work: Work) -> Published:
        async with self._slots:
            return await work(job)

    def _ended(self, job: Import, task: asyncio.Task[Published]) -> None:
        del self._tasks[job]
        failure = None if task.cancelled() else task.exception()
        error = request_error(failure) if isinstance(failure, Exception) else None
        if failure is not None and error is None:
            _log.error("the import of %s failed", job.name, exc_info=failure)
            error = RequestError("internal_error", "an internal error; the server's log has it")
        if self._running.get(job.name) is job:  # else its name is free already, and may be another import's
            del self._running[job.name]
            if error is not None:
                job.error, job.ended_at = error, time.time()
                self._failed[job.name] = job

    def _expire(self) -> None:
        """Failures are in the order of their end."""
        oldest = time.time() - FAILED_SECONDS
        for name, job in list(self._failed.items()):
            if job.ended_at >= oldest and len(self._failed) <= MAX_FAILED:
                break
            del self._failed[name]
