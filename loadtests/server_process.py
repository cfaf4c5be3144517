"""Starts a server to measure, as a user starts it."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx

START_SECONDS = 300  # the first start converts the default model


class ServerFailed(RuntimeError):
    """The server ended or did not become ready; the message has the end of its output."""


class Model(NamedTuple):
    """The served model."""

    directory: Path
    config: dict[str, Any]  # its config.json

    @property
    def dtype(self) -> str:
        """The dtype of the stored weights."""
        return self.config.get("dtype") or self.config.get("torch_dtype") or "float32"


def find_model(directory: str | None) -> Model:
    """Return the model in a directory; None is the embedded one, which the first call converts."""
    if directory is None:
        command = [sys.executable, "-m", "service.default_model"]
        directory = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    return Model(Path(directory), json.loads((Path(directory) / "config.json").read_text()))


class Server(NamedTuple):
    """A server that runs."""

    url: str
    pid: int  # of its service process


@contextmanager
def running_server(arguments: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """As `started_server`; yield the server's URL only."""
    with started_server(arguments, environment) as server:
        yield server.url


@contextmanager
def started_server(arguments: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Start `python -m service` on a free port with an empty data directory; yield it when it is ready.

    `arguments` are appended and so override these; `environment` is added to this process's. It ends with this program,
    also if that is terminated. Only for the main thread. Raises ServerFailed.
    """
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        command = [sys.executable, "-m", "service", "--host", "127.0.0.1", "--port", "0"]
        command += ["--data-directory", f"{directory}/data", *arguments]
        variables = {**os.environ, **(environment or {})}
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=variables)
        former = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # by way of what follows
        try:
            yield Server(wait_until_ready(process, log), process.pid)
        finally:
            process.terminate()
            process.wait(timeout=60)
            signal.signal(signal.SIGTERM, former)


def wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        found = re.search(r"http://127\.0\.0\.1:[1-9]\d*", log.read_text())
        if found and is_ready(found[0]):
            return found[0]
        time.sleep(0.1)
    raise ServerFailed(f"the server did not become ready:\n{log.read_text()[-2000:]}")


def is_ready(url: str) -> bool:
    try:
        return httpx.get(url + "/health/ready").status_code == 200
    except httpx.TransportError:
        return False
