"""The adapter routes over a fake engine on a real server."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from runtime.config import EngineConfig
from service.adapters import dialects
from service.adapters import routes as adapters
from service.app import errors
from service.catalog.catalog import Catalog
from service.catalog.files import open_storage
from service.door.bodies import Bodies
from service.errors import RequestError
from service.http import json_response
from service.ingest.imports import Imports
from service.ingest.sources import Sources
from service.metrics import Metrics
from service.services import Services
from service.settings import Settings
from storage import identity
from tests.openapi.contract_hook import hold_to_contract
from tests.service.adapters.adapter_bundles import TINY, bundle, multipart
from tests.service.catalog.adapter_engine import AdapterEngine

MAX_UPLOAD_BYTES = 200_000
TEST_ROUTES = ("/use/", "/release", "/collect")  # of `Service`; the contract does not have them


class Service:
    """A running server over a data directory; `client` talks to it, `settings` are fields of `Settings`.

    `base` is the directory of the base's weights, `sources` stands for the fetching of sources.
    """

    def __init__(
        self,
        directory: Path,
        max_rank: int = 8,
        base: Path | None = None,
        sources: Callable[[Settings], Sources] | None = None,
        **settings: Any,
    ):
        self.directory, self.engine = directory, AdapterEngine()
        self._release = asyncio.Event()
        app = Starlette(
            routes=[
                *adapters.routes,
                *dialects.routes,
                Route("/use/{name}", self._use),
                Route("/release", self._on_release, methods=["POST"]),
                Route("/collect", self._on_collect, methods=["POST"]),
            ],
            exception_handlers=errors,
            lifespan=self._lifespan,
        )
        self.settings = Settings(
            **{
                "served_name": "base-model",
                "data_directory": directory,
                "cache_directory": directory / "cache",
                "max_upload_bytes": MAX_UPLOAD_BYTES,
                "max_body_bytes": 10_000,
                "engine": EngineConfig(
                    model=str(base or "/nowhere/tiny-model"),
                    load_format="safetensors" if base else "dummy",
                    max_lora_rank=max_rank,
                ),
                **settings,
            }
        )
        self.sources = (sources or _sources)(self.settings)
        listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = listener.getsockname()
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="critical", ws="none", timeout_graceful_shutdown=5))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]})
        self._thread.start()
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{self.address[1]}",
            timeout=30,
            event_hooks={"response": [_hold_to_contract]},
            verify=False,  # no TLS: to read all certificates takes longer than most requests
        )

    def close(self) -> None:
        self.client.close()
        self._server.should_exit = True
        self._thread.join()

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        settings, metrics = self.settings, Metrics()
        self.catalog = await Catalog.open(
            await asyncio.to_thread(open_storage, settings),
            self.engine,
            metrics,
            TINY,
            max_rank=settings.engine.max_lora_rank,
            refresh_seconds=settings.refresh_seconds,
            collect_after_seconds=settings.collect_after_seconds,
        )
        self.imports = Imports(settings.max_uploads)
        app.state.services = Services(
            settings=settings,
            started_at=0.0,
            model=TINY,
            metrics=metrics,
            engine=self.engine,
            catalog=self.catalog,
            sources=self.sources,
            imports=self.imports,
            tokenizer=None,  # nobody generates
            prompts=None,
            grammars=None,
            prefixes=None,
            responses=None,
            bodies=Bodies(settings.max_body_bytes),
            heads=None,
            max_model_len=128,
            vocab_size=TINY.vocab_size,
        )
        yield
        self._release.set()
        await self.imports.close()
        await self.catalog.until_idle()
        self.catalog.versions.check()
        await self.catalog.close()

    async def _use(self, request: Request) -> Response:
        """Stands for a completion: runs on the version that it resolved until all are released."""
        version = self.catalog.versions.resolve(request.path_params["name"])
        if version is None:
            raise RequestError("model_not_found", "there is no such adapter", "model")
        with self.catalog.versions.using(version):
            await self._release.wait()
            assert self.engine.registered[version.digest].exists()
            return json_response({"digest": version.digest, "generation": version.generation})

    async def _on_collect(self, request: Request) -> Response:
        await self.catalog.until_idle()
        await self.catalog.collect(0)
        return Response()

    async def _on_release(self, request: Request) -> Response:
        self._release.set()
        self._release = asyncio.Event()
        return Response()

    def put(self, name: str, seed: int = 0, **query: Any) -> httpx.Response:
        return self.client.put(f"/adapters/{name}", files=multipart(*bundle(seed)), params=query)

    def get(self, name: str) -> dict[str, Any]:
        response = self.client.get(f"/adapters/{name}")
        assert response.status_code == 200, response.text
        return response.json()

    def adapters(self) -> list[dict[str, Any]]:
        return self.client.get("/adapters").json()["adapters"]

    def names(self) -> list[str]:
        return [adapter["name"] for adapter in self.adapters()]

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def files(self) -> list[str]:
        """Every file that the service keeps, on disk and in memory, without the store's identity.

        A deleted name leaves an empty one, which is not counted.
        """
        memory = self.catalog.blobs._memory.path
        kept = [path for path in self.directory.rglob("*") if path.is_file() and path.stat().st_size]
        names = [str(path.relative_to(self.directory)) for path in kept if path.name != identity.FILE]
        return sorted([*names, *(f"memory/{path.relative_to(memory)}" for path in memory.rglob("*"))])

    def collect(self) -> list[str]:
        """What is left once everything that no name points at has been collected."""
        assert self.client.post("/collect").status_code == 200
        return self.files()

    def eventually(self, holds: Callable[[], bool]) -> None:
        """Ask until it holds; a service that never gets there is stopped by the deadline."""
        deadline = threading.Event()
        timer = threading.Timer(20, deadline.set)
        timer.start()
        try:
            while not holds():
                assert not deadline.wait(0.005), "it did not happen within 20 seconds"
        finally:
            timer.cancel()


def _hold_to_contract(response: httpx.Response) -> None:
    if not response.request.url.path.startswith(TEST_ROUTES):
        hold_to_contract(response)


def _sources(settings: Settings) -> Sources:
    return Sources(settings.allowed_sources, settings.max_upload_bytes)


@contextlib.contextmanager
def serving(directory: Path, **arguments: Any) -> Iterator[Service]:
    service = Service(directory, **arguments)
    try:
        service.client.get("/adapters")  # answered once it has started
        yield service
    finally:
        service.close()


def error(response: httpx.Response) -> tuple[int, str, str | None]:
    """An error's status, code and param; it must have the shape that every error has."""
    body = response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}, body
    assert body["message"]
    return response.status_code, body["code"], body["param"]
