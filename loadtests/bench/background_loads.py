"""Loads or uploads adapters during a measurement, in a second process, so that it does not delay the client."""

import multiprocessing
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Literal

import httpx

from loadtests.adapter_client import AdapterClient, CallFailed
from loadtests.random_adapter import adapter_file, number_file
from loadtests.server_process import Model

Work = Literal["none", "load", "put"]
START_SECONDS = 120


class BackgroundLoads:
    """The process, which loads or uploads adapters one after the other from `start` to `stop`.

    "load" unloads an adapter and loads it to the device again; "put" uploads a new ephemeral adapter. `pause` is the
    time between them in seconds.
    """

    def __init__(self, url: str, model: Model, adapters: int, pause: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, url, model.config, adapters, pause), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> "BackgroundLoads":
        self._receive()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.join(START_SECONDS)

    def start(self, work: Work) -> None:
        self._pipe.send(work)

    def stop(self) -> list[float]:
        """End the work and return the seconds of each load or upload. Raises CallFailed."""
        self._pipe.send(None)
        return self._receive()

    def _receive(self) -> list[float]:
        if not self._pipe.poll(START_SECONDS):
            raise CallFailed(f"the process that loads adapters did not answer in {START_SECONDS} s")
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise CallFailed("the process that loads adapters is gone") from None
        if isinstance(answer, str):
            raise CallFailed(answer)
        return list(answer)


def serve(pipe: Connection, url: str, config: dict[str, Any], adapters: int, pause: float) -> None:
    """Run the process: obey until the pipe is closed, then delete the adapters."""
    try:
        with AdapterClient(url) as client:
            loads = Loads(client, config, adapters)
            pipe.send([])
            try:
                while True:
                    work = pipe.recv()
                    pipe.send(loads.work_until(pipe, work, pause) if work else [])
            finally:
                loads.close()
    except (EOFError, KeyboardInterrupt):
        pass
    except (CallFailed, httpx.HTTPError) as error:
        with suppress(OSError):  # the parent process may have ended
            pipe.send(f"{type(error).__name__}: {error}")


class Loads:
    """The adapters on the server, and their files."""

    def __init__(self, client: AdapterClient, config: dict[str, Any], adapters: int) -> None:
        self._client = client
        self._loaded = [f"bench-load-{number}" for number in range(adapters)]
        self._pushed: dict[str, None] = {}
        self._file = adapter_file(config, 0)
        self._turns = self._number = 0
        for name in self._loaded:
            client.put(name, self._next_file())

    def close(self) -> None:
        for name in (*self._loaded, *self._pushed):
            self._client.delete(name)

    def work_until(self, pipe: Connection, work: Work, pause: float) -> list[float]:
        """Work until the pipe has a message; return the seconds of each load or upload."""
        seconds: list[float] = []
        while not pipe.poll(pause if work != "none" else None):
            start = time.perf_counter()
            self._once(work)
            seconds.append(time.perf_counter() - start)
        pipe.recv()
        return seconds

    def _once(self, work: Work) -> None:
        turn, self._turns = self._turns % len(self._loaded), self._turns + 1
        if work == "load":
            self._client.unload(self._loaded[turn], "host")
            self._client.load(self._loaded[turn], "device")
        else:
            name = f"bench-push-{turn}"
            self._client.put(name, self._next_file(), ephemeral=True)
            self._pushed[name] = None

    def _next_file(self) -> bytearray:
        """Return a file that differs from all earlier ones."""
        self._number += 1
        number_file(self._file, self._number)
        return self._file
