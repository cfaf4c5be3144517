"""A service on a real socket in this process, so that tests talk to it as clients do."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from starlette.applications import Starlette

from runtime.config import EngineConfig
from service.app import create_app
from service.door.server import Server
from service.services import Services
from service.settings import Settings
from tests.openapi.contract_hook import HOOKS
from tests.service.engine import fake_engine

NAME = "tiny"


class LiveServer:
    """A running service: `url`, an HTTP client on it, the application and its parts."""

    def __init__(self, app: Starlette, url: str, client: httpx.Client, server: Server):
        self.app, self.url, self.client, self.server = app, url, client, server

    def connect(self, content: bytes = b"") -> socket.socket:
        """A connection on which some bytes have been sent."""
        host, port = self.url.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)), timeout=20)
        connection.sendall(content)
        return connection

    @property
    def services(self) -> Services:
        services: Services = self.app.state.services
        return services

    def post(self, path: str, **body: object) -> httpx.Response:
        return self.client.post(path, json=body)

    def complete(self, prompt: object, **body: object) -> httpx.Response:
        return self.post("/v1/completions", model=NAME, prompt=prompt, **body)

    def chat(self, content: object, **body: object) -> httpx.Response:
        return self.post("/v1/chat/completions", model=NAME, messages=[{"role": "user", "content": content}], **body)

    def running(self) -> float:
        """How many sequences the engine runs, by the server's own metrics."""
        lines = self.client.get("/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith("vllm:num_requests_running{")).rsplit(" ", 1)[1])


def fake_settings(model: Path, data: Path, **changes: object) -> Settings:
    """Settings of a service on the fake engine; `changes` are fields of Settings or of EngineConfig."""
    engine = {field: changes.pop(field) for field in list(changes) if field in EngineConfig.__struct_fields__}
    given = {"engine_command": fake_engine.COMMAND, "served_name": NAME, "data_directory": data}
    given |= {"cache_directory": data / "cache", "drain_seconds": 0.0, **changes}
    return Settings(engine=EngineConfig(model=str(model), **{"threads": 1} | engine), **given)


@contextmanager
def live_server(settings: Settings) -> Iterator[LiveServer]:
    """Serve on a free port of loopback until the block ends."""
    app = create_app(settings)
    server = Server(app, port=0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        assert server.started, "the service did not start"
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        # No TLS: to read all certificates takes longer than most requests
        with httpx.Client(base_url=url, timeout=20, event_hooks=HOOKS, verify=False) as client:
            yield LiveServer(app, url, client, server)
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive(), "the service did not stop"


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Poll a condition; fails when it does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        threading.Event().wait(0.01)
