"""The service inside another program: settings without a command line, an application below another one."""

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount

from service.app import create_app
from service.configure import settings_for
from service.door.server import drain
from tests.service.adapters.adapter_bundles import bundle, multipart
from tests.service.engine import fake_engine
from tests.service.live_server import fake_settings, wait_until

ROOT = Path(__file__).parents[2]


def test_a_program_names_options_and_gets_settings(tiny_model: Path, tmp_path: Path) -> None:
    settings = settings_for(
        tiny_model,
        data_directory=tmp_path,
        adapter_bytes="2M",
        drain_seconds=1.5,
        allow_source=(f"file://{tmp_path}",),
        served_model_name="mine",
        api_key=None,
    )
    assert (settings.engine.model, settings.engine.adapter_bytes) == (str(tiny_model), 2 << 20)
    assert (settings.data_directory, settings.drain_seconds, settings.served_name) == (tmp_path, 1.5, "mine")
    assert settings.allowed_sources == (f"file://{tmp_path}",)
    assert settings.sources["drain_seconds"] == "program"
    assert settings_for(tiny_model).served_name == tiny_model.name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"adapter_byte": "2M"}, "adapter_byte is no option: do you mean adapter-bytes"),
        ({"drain_seconds": "soon"}, "drain_seconds: expected a number, not a text"),
        ({"port": 70000}, "port: "),
        ({"refresh_seconds": 0}, "refresh_seconds must be more than 0"),
        ({"max_loras": 4}, "max_loras: device memory for adapters is counted in bytes"),
        ({"engine_command": "rm"}, "engine_command is no option"),
    ],
)
def test_what_is_wrong_is_raised_and_ends_no_process(
    tiny_model: Path, options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROOTSTOCK_PORT", "no number")  # and no variable is read
    with pytest.raises(ValueError, match=re.escape(said)):
        settings_for(tiny_model, **options)
    with pytest.raises(ValueError, match="does not exist"):
        settings_for("/no/such/model")


@contextmanager
def served(app: Starlette) -> Iterator[httpx.Client]:
    """A plain uvicorn, which knows nothing of ours."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        with httpx.Client(base_url=url, timeout=20) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()


def test_an_application_that_is_mounted_in_another_serves_below_its_path(tiny_model: Path, tmp_path: Path) -> None:
    adapted = create_app(fake_settings(tiny_model, tmp_path, api_key="secret"))

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with adapted.router.lifespan_context(adapted):
            yield
            await drain(adapted, seconds=5)

    with served(Starlette(routes=[Mount("/llm", app=adapted)], lifespan=lifespan)) as client:
        assert client.get("/llm/health/ready").status_code == 200, "a path that needs no key"
        assert client.get("/llm/v1/models").status_code == 401
        assert client.get("/v1/models").status_code == 404
        client.headers["authorization"] = "Bearer secret"
        assert client.put("/llm/adapters/poet", files=multipart(*bundle())).status_code == 201
        body = {"model": "poet", "prompt": "hello world", "max_tokens": 2}
        whole = client.post("/llm/v1/completions", json=body)
        assert whole.json()["choices"][0]["text"] == " worldhello"
        with client.stream("POST", "/llm/v1/completions", json=body | {"stream": True}) as streamed:
            assert list(streamed.iter_lines())[-2] == "data: [DONE]"
        pid = adapted.state.services.engine.pid
        assert pid is not None
    assert adapted.state.gate.closed
    assert not Path(f"/proc/{pid}").exists(), "the lifespan ends the engine"


def test_an_application_of_its_own_has_its_life(tiny_model: Path, tmp_path: Path) -> None:
    settings = settings_for(tiny_model, data_directory=tmp_path, cache_directory=tmp_path / "cache")
    app = create_app(msgspec.structs.replace(settings, engine_command=fake_engine.COMMAND))
    with served(app) as client:
        assert client.get("/health/ready").json() == {"status": "ready"}
        source = client.get("/config").json()["options"]["data-directory"]["source"]
        assert source == "program"


def test_an_upload_goes_to_a_file_in_pieces(tiny_model: Path, tmp_path: Path) -> None:
    """The application asks for one piece after another, and the next only when the last one is written."""
    app = create_app(fake_settings(tiny_model, tmp_path))
    request = httpx.Request("PUT", "http://test/adapters/poet", files=multipart(*bundle()))
    content = request.read()
    pieces = [content[start : start + 100] for start in range(0, len(content), 100)]
    asked: list[int] = []
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        asked.append(len(asked))
        if len(asked) > len(pieces):
            await asyncio.Event().wait()
        return {"type": "http.request", "body": pieces[len(asked) - 1], "more_body": len(asked) < len(pieces)}

    async def send(message: Any) -> None:
        sent.append(message)

    async def program() -> None:
        headers = [(name.lower().encode(), value.encode()) for name, value in request.headers.items()]
        path = "/adapters/poet"
        scope = {"type": "http", "http_version": "1.1", "method": "PUT", "path": path, "raw_path": path.encode()}
        scope |= {"query_string": b"", "headers": headers, "client": ("test", 1), "scheme": "http", "root_path": ""}
        async with app.router.lifespan_context(app):
            await app(scope, receive, send)

    asyncio.run(program())
    assert sent[0]["status"] == 201
    assert len(asked) >= len(pieces) > 5


def test_the_documented_program_makes_an_application(tiny_model: Path) -> None:
    [program] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "embedding.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(program.replace("/models/mine", str(tiny_model)), names)
    assert names["adapted"].state.settings.engine.adapter_bytes == 512 << 20
    assert [route.path for route in names["app"].routes] == ["/llm"]
