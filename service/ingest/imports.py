"""Imports: adapters that the server fetches from a source. How far each is, how many run at once, why one failed."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from runtime.background import yield_to_others
from service.catalog.record import AdapterVersion
from service.errors import RequestError, request_error
from service.source_urls import Source
from storage.store import StoreError

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
MAX_WAITING = 1000  # imports that wait for others; each is a few hundred bytes
CLOSE_SECONDS = 5.0  # for the threads of cancelled imports to end
MAX_FAILED, FAILED_SECONDS = 1000, 3600.0  # how many failures are kept, and for how long


class ImportCancelled(Exception):
    """Raised on the thread of an import whose name was deleted."""


class Import:
    """The import of one source under a name for a client. Times are seconds since 1970."""

    def __init__(self, name: str, source: Source, client: str = "", *, ephemeral: bool = False) -> None:
        self.name, self.source, self.client, self.ephemeral = name, source, client, ephemeral
        self.created_at, self.ended_at = time.time(), 0.0
        self.bytes = 0  # of the weights, fetched so far
        self.total_bytes: int | None = None  # None until the source has said it
        self.error: RequestError | None = None  # why it failed
        self.committing = False  # it is being published, which must not be interrupted: a delete waits for its end
        self._cancelled = threading.Event()

    def progressed(self, done: int, total: int) -> None:
        """Record the bytes fetched so far; called on the fetching thread. Raises ImportCancelled after `cancel`."""
        if self._cancelled.is_set():
            raise ImportCancelled
        self.bytes, self.total_bytes = done, total

    def cancel(self) -> None:
        """End the fetch at its next progress."""
        self._cancelled.set()


Published = tuple[AdapterVersion, bool]  # the version that a name has now, and whether the name is new
Work = Callable[[Import], Coroutine[Any, Any, Published]]


class Imports:
    """Owns the running imports, the recent failures, and the threads of imports and uploads.

    At most `max_running` imports and uploads run at once: further imports wait, further uploads are refused. No client,
    by the id of its key or else its address, has all of these places, so that slow ones of one do not keep out
    another's. Each may hold one thread for as long as its source or its client likes, so the threads are not those that
    other work needs. All calls belong to one event loop.
    """

    def __init__(self, max_running: int) -> None:
        self._slots = asyncio.Semaphore(max_running)
        self._most = max(1, max_running - 1)  # of one client
        self._of_clients: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()  # those in use
        self._threads = ThreadPoolExecutor(max_running, "import", yield_to_others)
        self._tasks: dict[Import, asyncio.Task[Published]] = {}
        self._running: dict[str, Import] = {}  # by name
        self._failed: dict[str, Import] = {}  # by name, in the order of their ends

    def start(self, job: Import, work: Work) -> Import:
        """Run an import's work as soon as a slot is free.

        Raises RequestError: `import_in_progress` for its name, `too_many_uploads`.
        """
        self.require_idle(job.name)
        if len(self._running) >= MAX_WAITING:
            raise RequestError("too_many_uploads", f"{MAX_WAITING} imports are waiting already")
        self._failed.pop(job.name, None)
        self._running[job.name] = job
        self._tasks[job] = task = asyncio.create_task(self._run(job, work), name=f"import {job.name}")
        task.add_done_callback(lambda ended: self._ended(job, ended))
        return job

    async def result(self, job: Import) -> Published:
        """Wait for an import. Raises its failure."""
        task = self._tasks[job]
        await asyncio.wait([task])
        if self._failed.get(job.name) is job:
            del self._failed[job.name]  # its caller is told here
        if task.cancelled():
            raise RequestError("import_cancelled", f"adapter {job.name!r} was deleted while it was imported", "name")
        error = task.exception()
        if isinstance(error, Exception):
            raise request_error(error) or error
        return task.result()

    def get(self, name: str) -> Import | None:
        """The running import of a name, or its last one if that failed."""
        self._expire()
        return self._running.get(name) or self._failed.get(name)

    def jobs(self) -> list[Import]:
        """Every import that `get` would return."""
        self._expire()
        return [*self._running.values(), *self._failed.values()]

    def require_idle(self, name: str) -> None:
        """Raise RequestError `import_in_progress` while an import of the name runs."""
        if name in self._running:
            message = f"adapter {name!r} is being imported: wait for that, or delete it first"
            raise RequestError("import_in_progress", message, "name")

    async def forget(self, name: str) -> bool:
        """Cancel the import of a name, or drop its failure; returns whether there was one.

        An import that is being published is waited for. Any other one frees its name at once and cleans up later,
        because its thread may be blocked by a store that does not answer.
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
        """A name has a new version: its import has nothing left but to clean up, and an earlier failure is outdated."""
        self._running.pop(name, None)
        self._failed.pop(name, None)

    @asynccontextmanager
    async def uploading(self, client: str) -> AsyncIterator[None]:
        """Occupy a place for a client, whose bytes cannot wait for one. Raises RequestError `too_many_uploads`."""
        own = self._places_of(client)
        if self._slots.locked():
            raise RequestError("too_many_uploads", "too many uploads and imports are under way")
        if own.locked():
            message = f"{self._most} uploads and imports of this key or address are under way, and none has more"
            raise RequestError("too_many_uploads", message)
        async with own, self._slots:
            yield

    async def on_thread(self, cancel: Callable[[], None], work: Callable[..., _T], *arguments: Any) -> _T:
        """Run a blocking part of an import or an upload, whose slot the caller occupies.

        When the caller is cancelled, this calls `cancel`, which makes the work end soon, and waits for the thread: it
        uses files that the caller removes next.
        """
        future = asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            cancel()
            await asyncio.wait([future])
            if not future.cancelled():
                future.exception()  # marks it as seen
            raise

    async def close(self) -> None:
        """Cancel the running imports and wait until they have cleaned up, but not for a store that does not answer."""
        tasks = list(self._tasks.values())
        for job, task in self._tasks.items():
            if not job.committing:
                task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_SECONDS)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, job: Import, work: Work) -> Published:
        async with self._places_of(job.client), self._slots:
            return await work(job)

    def _places_of(self, client: str) -> asyncio.Semaphore:
        found = self._of_clients.get(client)
        if found is None:
            self._of_clients[client] = found = asyncio.Semaphore(self._most)
        return found

    def _ended(self, job: Import, task: asyncio.Task[Published]) -> None:
        del self._tasks[job]
        failure = None if task.cancelled() else task.exception()
        error = request_error(failure) if isinstance(failure, Exception) else None
        if failure is not None and error is None:
            _log.error("the import of %s failed", job.name, exc_info=failure)
            error = RequestError("internal_error", "an internal error; the server's log has it")
        elif isinstance(failure, StoreError | OSError):
            _log.error("the import of %s failed: %s", job.name, failure)
        if self._running.get(job.name) is job:  # else its name is free, and another import may have it
            del self._running[job.name]
            if error is not None:
                job.error, job.ended_at = error, time.time()
                self._failed[job.name] = job

    def _expire(self) -> None:
        oldest = time.time() - FAILED_SECONDS
        for name, job in list(self._failed.items()):
            if job.ended_at >= oldest and len(self._failed) <= MAX_FAILED:
                break
            del self._failed[name]
