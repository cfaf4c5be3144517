"""An adapter's own chat template: how it comes, where it is kept, and that it is used."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.service.adapters.adapter_bundles import CONFIG, WEIGHTS, bundle, config, multipart
from tests.service.adapters.adapter_service import Service, error, serving
from tests.service.live_server import LiveServer, fake_settings, live_server
from tests.service.tiny_model import write_tiny_model

TEMPLATE, TOKENIZER = "chat_template.jinja", "tokenizer_config.json"
OWN = "adapter:{{ messages[0].content }}"
IN_CONFIG = json.dumps({"model_max_length": 10**30, "chat_template": OWN}).encode()
SEVERAL = json.dumps({"chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": OWN}]})


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    (tmp_path / "allowed").mkdir()
    with serving(tmp_path / "data", allowed_sources=(f"file://{tmp_path}/allowed",)) as running:
        yield running


def put(client: httpx.Client, files: dict[str, bytes], name: str = "poet", seed: int = 0) -> httpx.Response:
    return client.put(
        f"/adapters/{name}", files={**multipart(*bundle(seed)), **{file: (file, files[file]) for file in files}}
    )


def kept(service: Service, name: str = "poet") -> str | None:
    version = service.catalog.versions.resolve(name)
    assert version is not None
    assert service.get(name)["chat_template"] is (version.record.chat_template is not None)
    return version.record.chat_template


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({TEMPLATE: OWN.encode()}, OWN),
        ({TOKENIZER: IN_CONFIG}, OWN),
        ({TOKENIZER: SEVERAL.encode()}, OWN),
        ({TOKENIZER: b'{"eos_token": "x"}'}, None),
        ({TOKENIZER: IN_CONFIG, TEMPLATE: "grüß {{ messages }}".encode()}, "grüß {{ messages }}"),
    ],
)
@pytest.mark.parametrize("way", ["multipart", "tar", "source"])
def test_a_bundle_may_bring_a_template(
    service: Service, tmp_path: Path, files: dict[str, bytes], expected: str | None, way: str
) -> None:
    everything = {**dict(zip((CONFIG, WEIGHTS), bundle(), strict=True)), **files}
    if way == "multipart":
        response = put(service.client, files)
    elif way == "tar":
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for name, content in everything.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        headers = {"content-type": "application/x-tar"}
        response = service.client.put("/adapters/poet", content=buffer.getvalue(), headers=headers)
    else:
        for name, content in everything.items():
            (tmp_path / "allowed" / name).write_bytes(content)
        response = service.post("/adapters", name="poet", src=f"file://{tmp_path}/allowed")
    assert response.status_code == 201, response.text
    assert response.json()["chat_template"] is (expected is not None)
    assert kept(service) == expected


def test_an_upload_of_the_same_weights_replaces_the_template(service: Service) -> None:
    put(service.client, {TEMPLATE: b"first"})
    assert put(service.client, {TEMPLATE: b"second"}).json()["generation"] == 1
    assert kept(service) == "second"
    put(service.client, {})
    assert kept(service) is None
    put(service.client, {TEMPLATE: b"third"})
    assert service.client.patch("/adapters/poet", json={"pinned": True}).status_code == 200
    assert kept(service) == "third"


@pytest.mark.parametrize(
    ("files", "expected", "reason"),
    [
        ({TEMPLATE: b"a\n{% if x %}"}, (422, "invalid_adapter", TEMPLATE), "line 2"),
        ({TEMPLATE: b"\xff"}, (422, "invalid_adapter", TEMPLATE), "UTF-8"),
        ({TEMPLATE: b"x" * (64 * 1024 + 1)}, (413, "body_too_large", TEMPLATE), "65536"),
        ({TOKENIZER: b'{"chat_template": "\\n\\n{{"}'}, (422, "invalid_adapter", TOKENIZER), "line 3"),
        ({TOKENIZER: b"{"}, (422, "invalid_adapter", TOKENIZER), "JSON"),
        ({TOKENIZER: b'{"chat_template": 1}'}, (422, "invalid_adapter", TOKENIZER), "chat_template"),
        ({TOKENIZER: b'{"chat_template": []}'}, (422, "invalid_adapter", TOKENIZER), '"default"'),
        (
            {TOKENIZER: json.dumps({"chat_template": "x" * 65537}).encode()},
            (422, "invalid_adapter", TOKENIZER),
            "65536",
        ),
    ],
)
def test_a_template_that_is_none_is_refused_with_its_file_and_line(
    service: Service, files: dict[str, bytes], expected: tuple[int, str, str], reason: str
) -> None:
    response = put(service.client, files)
    assert error(response) == expected
    assert reason in response.json()["error"]["message"]
    assert service.names() == []


def test_a_link_in_a_source_is_no_template(service: Service, tmp_path: Path) -> None:
    for name, content in zip((CONFIG, WEIGHTS), bundle(), strict=True):
        (tmp_path / "allowed" / name).write_bytes(content)
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "allowed" / TEMPLATE).symlink_to(tmp_path / "secret")
    response = service.post("/adapters", name="poet", src=f"file://{tmp_path}/allowed")
    assert error(response) == (403, "source_not_allowed", "src")


def test_a_template_outlives_a_restart_and_reaches_other_servers(tmp_path: Path) -> None:
    with serving(tmp_path, refresh_seconds=0.05) as theirs, serving(tmp_path, refresh_seconds=0.05) as mine:
        put(theirs.client, {TEMPLATE: OWN.encode()})
        mine.eventually(lambda: mine.names() == ["poet"])
        assert kept(mine) == OWN
        put(mine.client, {TEMPLATE: b"other"})
        theirs.eventually(lambda: kept(theirs) == "other")
    with serving(tmp_path) as again:
        assert kept(again) == "other"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server whose base has no chat template."""
    model = write_tiny_model(tmp_path_factory.mktemp("bare"))
    (model / TOKENIZER).write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with live_server(fake_settings(model, tmp_path_factory.mktemp("data"))) as running:
        yield running


def put_own(live: LiveServer, name: str, template: str | None, **fields: object) -> None:
    files = {**multipart(config(**fields), bundle()[1])}
    if template is not None:
        files[TEMPLATE] = (TEMPLATE, template.encode())
    assert live.client.put(f"/adapters/{name}", files=files).status_code in (200, 201)


def answer(live: LiveServer, name: str, **fields: object) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 30, "ignore_eos": True, **fields}
    return live.post("/v1/chat/completions", model=name, **body)


def test_a_base_without_a_template_serves_adapters_that_have_one(bare: LiveServer) -> None:
    put_own(bare, "own", OWN)
    put_own(bare, "none", None, lora_alpha=8)
    found = bare.post("/tokenize", model="own", messages=[{"role": "user", "content": "hello"}]).json()["tokens"]
    assert bare.post("/detokenize", tokens=found).json()["prompt"] == "adapter:hello"
    response = answer(bare, "own", max_tokens=len(found))
    # The fake engine's answer on an adapter is the prompt turned round
    assert response.json()["choices"][0]["message"]["content"] == bare.services.tokenizer.decode(found[::-1])
    prefix = bare.post("/kv/prefixes", model="own", messages=[{"role": "user", "content": "hello"}], pin=False)
    assert prefix.status_code == 200, prefix.text
    for name in ("none", "tiny"):
        refused = answer(bare, name)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_chat")
        assert TEMPLATE in refused.json()["error"]["message"]
    mixed = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
    alone = bare.post("/v1/chat/completions", **mixed, adapters={"own": 0.5}, max_tokens=1)
    assert alone.status_code == 200, alone.text
    both = bare.post("/v1/chat/completions", **mixed, adapters={"own": 0.5, "none": 0.5}, max_tokens=1)
    assert both.json()["error"]["code"] == "invalid_chat"


def test_an_adapters_template_is_held_to_the_limits_of_the_sandbox(bare: LiveServer) -> None:
    put_own(bare, "endless", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    refused = answer(bare, "endless")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_chat")
    assert "longer than 2 s" in refused.json()["error"]["message"]
