"""POST /adapters from buckets and from the hub, over their real protocols on the loopback."""

from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import boto3
import httpx
import huggingface_hub.constants
import pytest
from moto.server import ThreadedMotoServer

from service.ingest.sources import Sources
from service.settings import Settings
from storage.huggingface import HubRepository
from storage.s3 import S3Store
from tests.service.adapters.adapter_bundles import CONFIG, WEIGHTS, bundle
from tests.service.adapters.adapter_service import MAX_UPLOAD_BYTES, Service, error, serving
from tests.storage import loopback
from tests.storage.fake_hub import REPOSITORY, FakeHub

ORGANISATION = REPOSITORY.partition("/")[0]
FILES = dict(zip((CONFIG, WEIGHTS), bundle(), strict=True))
SECRETS = ("a-secret", "an-id", "hf_token")


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Credentials that no real account has, and no other place where the libraries could find some."""
    given = {"ACCESS_KEY_ID": "an-id", "SECRET_ACCESS_KEY": "a-secret", "DEFAULT_REGION": "us-east-1"}
    given |= {"EC2_METADATA_DISABLED": "true", "CONFIG_FILE": "/nowhere", "SHARED_CREDENTIALS_FILE": "/nowhere"}
    for name, value in given.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", "hf_token")


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def put_object(s3: str) -> Iterator[Callable[[str, bytes], Any]]:
    """Writes into the bucket `bucket`, which has the bundle `team-a/poet`."""
    client = boto3.client("s3", endpoint_url=s3)
    client.create_bucket(Bucket="bucket")

    def put(key: str, content: bytes) -> None:
        client.put_object(Bucket="bucket", Key=key, Body=content)

    for name, content in FILES.items():
        put(f"team-a/poet/{name}", content)
    yield put
    for found in client.list_objects_v2(Bucket="bucket").get("Contents", ()):
        client.delete_object(Bucket="bucket", Key=found["Key"])
    client.delete_bucket(Bucket="bucket")
    client.close()


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    hub.commit({**FILES, **{f"folder/{name}": content for name, content in FILES.items()}})
    with hub.running():
        yield hub


def fetching(s3: str = "http://127.0.0.1:9", hub: str = "http://127.0.0.1:9") -> Callable[[Settings], Sources]:
    """Sources whose buckets and repositories are at these addresses; nothing is tried twice."""

    def sources(settings: Settings) -> Sources:
        return Sources(
            settings.allowed_sources,
            settings.max_upload_bytes,
            lambda bucket, prefix, unsigned: S3Store(
                bucket, prefix, endpoint=s3, unsigned=unsigned, read_timeout_seconds=20, attempts=1
            ),
            lambda repo, revision, folder: HubRepository(
                repo, revision, folder, endpoint=hub, timeout_seconds=20, attempts=1
            ),
            settings.unsigned_sources,
        )

    return sources


@pytest.fixture
def service(tmp_path: Path, s3: str, hub: FakeHub) -> Iterator[Service]:
    allowed = ("s3://bucket/team-a", f"hf://{ORGANISATION}")
    with serving(tmp_path / "data", allowed_sources=allowed, sources=fetching(s3, hub.endpoint)) as running:
        yield running


def post(service: Service, src: str, **fields: Any) -> httpx.Response:
    response = service.post("/adapters", name="poet", src=src, **fields)
    assert not any(secret in response.text for secret in SECRETS)
    return response


def test_a_bucket_is_a_source(service: Service, put_object: Callable[[str, bytes], Any]) -> None:
    response = post(service, "s3://bucket/team-a/poet/")

    assert response.status_code == 201, response.text
    assert response.json()["source"] == "s3://bucket/team-a/poet"
    assert service.put("uploaded").json()["digest"] == response.json()["digest"]
    assert post(service, "s3://bucket/team-a/poet").json()["generation"] == 1


@pytest.mark.parametrize("folder", ["2026-01-02T03:04:05 für 100% (a+b)=@'~", "a?b#c"])
def test_keys_may_have_any_characters(
    service: Service, put_object: Callable[[str, bytes], Any], hub: FakeHub, folder: str
) -> None:
    for name, content in FILES.items():
        put_object(f"team-a/{folder}/{name}", content)
    hub.commit({f"{folder}/{name}": content for name, content in FILES.items()})
    digests = set()
    for place in ("s3://bucket/team-a/", f"hf://{REPOSITORY}/"):
        spellings = [quote(folder)] + ([folder] if "?" not in folder and place.startswith("s3") else [])
        for spelling in spellings:
            response = post(service, place + spelling)
            assert response.status_code in (200, 201), response.text
            digests.add(response.json()["digest"])
    assert len(digests) == 1


def test_a_public_bucket_is_read_without_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket that refuses who is signed in, as Amazon's do for accounts without rights, and a server without any."""

    def public(request: BaseHTTPRequestHandler) -> None:
        content = FILES.get(urlsplit(request.path).path.rpartition("/")[2])
        if "Authorization" in request.headers or content is None:
            loopback.send(request, 403, b"<Error><Code>AccessDenied</Code></Error>")
        else:
            loopback.send(request, 200, content, ETag='"1"')

    allowed = ("s3://public", "s3://private")
    with (
        loopback.serving(public) as address,
        serving(
            tmp_path, allowed_sources=allowed, unsigned_sources=("s3://public/a",), sources=fetching(s3=address)
        ) as service,
    ):
        assert post(service, "s3://public/a/poet").status_code == 201
        for src in ("s3://private/poet", "s3://public/b"):
            response = post(service, src)
            assert error(response) == (403, "source_access_denied", "src")
            assert "--unsigned-source" in response.json()["error"]["message"]
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        assert post(service, "s3://public/a/poet").status_code == 200
        assert "no AWS credentials" in post(service, "s3://private/poet").json()["error"]["message"]


def test_a_bucket_and_a_repository_may_have_a_chat_template(
    service: Service, put_object: Callable[[str, bytes], Any], hub: FakeHub
) -> None:
    def kept() -> str | None:
        version = service.catalog.versions.resolve("poet")
        assert version is not None
        return version.record.chat_template

    put_object("team-a/poet/tokenizer_config.json", b'{"chat_template": "of the bucket"}')
    assert post(service, "s3://bucket/team-a/poet").json()["chat_template"] is True
    assert kept() == "of the bucket"
    hub.commit({**FILES, "chat_template.jinja": b"of the hub", "tokenizer_config.json": b"{}"})
    assert post(service, f"hf://{REPOSITORY}").json()["chat_template"] is True
    assert kept() == "of the hub"
    hub.commit({**FILES, "README.md": b"no template"})
    assert post(service, f"hf://{REPOSITORY}").json()["chat_template"] is False
    put_object("team-a/poet/chat_template.jinja", b"\n{{")
    refused = post(service, "s3://bucket/team-a/poet")
    assert error(refused) == (422, "invalid_adapter", "chat_template.jinja")
    assert "line 2" in refused.json()["error"]["message"]


def test_a_bucket_that_denies_what_it_has_not_is_a_source_all_the_same(tmp_path: Path) -> None:
    """As S3 does for readers that may not list the bucket."""

    def denying(request: BaseHTTPRequestHandler) -> None:
        content = FILES.get(urlsplit(request.path).path.rpartition("/")[2])
        if content is None:
            loopback.send(request, 403, b"<Error><Code>AccessDenied</Code></Error>")
        else:
            loopback.send(request, 200, content, ETag='"1"')

    with (
        loopback.serving(denying) as address,
        serving(tmp_path / "data", allowed_sources=("s3://bucket",), sources=fetching(s3=address)) as service,
    ):
        response = post(service, "s3://bucket/poet")
        assert (response.status_code, response.json()["chat_template"]) == (201, False)


def test_a_bucket_is_read_only_below_what_is_allowed(service: Service, put_object: Callable[[str, bytes], Any]) -> None:
    for name, content in FILES.items():
        put_object(f"team-b/poet/{name}", content)
    for src in ("s3://bucket/team-b/poet", "s3://bucket", "s3://bucket/team-ab", "s3://other/team-a/poet"):
        assert error(post(service, src)) == (403, "source_not_allowed", "src")
    for src in ("s3://bucket/team-a/../team-b/poet", "s3://bucket/team-a/%2e%2e/team-b", "S3://bucket/team-a/poet"):
        assert error(post(service, src)) == (400, "unsupported_source", "src")
    assert service.files() == []


def test_what_a_bucket_has_not_is_named(service: Service, put_object: Callable[[str, bytes], Any]) -> None:
    put_object(f"team-a/half/{CONFIG}", FILES[CONFIG])
    for src, missing in (("nothing", CONFIG), ("half", WEIGHTS)):
        response = post(service, f"s3://bucket/team-a/{src}")
        assert error(response) == (404, "source_not_found", "src")
        assert missing in response.json()["error"]["message"]
    assert service.files() == []


def test_a_bucket_that_does_not_exist_is_not_found(service: Service) -> None:
    assert error(post(service, "s3://bucket/team-a/poet")) == (404, "source_not_found", "src")


def test_objects_over_the_limits_are_refused(service: Service, put_object: Callable[[str, bytes], Any]) -> None:
    put_object(f"team-a/poet/{WEIGHTS}", b"x" * (MAX_UPLOAD_BYTES + 1))
    assert error(post(service, "s3://bucket/team-a/poet")) == (413, "body_too_large", WEIGHTS)
    put_object(f"team-a/poet/{CONFIG}", b" " * ((1 << 20) + 1))
    assert error(post(service, "s3://bucket/team-a/poet")) == (413, "body_too_large", CONFIG)
    assert service.files() == []


def test_a_repository_is_a_source_pinned_to_its_commit(service: Service, hub: FakeHub) -> None:
    commit = hub.revisions["main"]
    response = post(service, f"hf://{REPOSITORY}")

    assert response.status_code == 201, response.text
    assert response.json()["source"] == f"hf://{REPOSITORY}@{commit}"
    other = hub.commit({CONFIG: FILES[CONFIG], WEIGHTS: bundle(seed=2)[1]}, "v2")
    assert (
        service.post("/adapters", name="second", src=f"hf://{REPOSITORY}", revision="v2")
        .json()["source"]
        .endswith(other)
    )
    for fields in ({"src": f"hf://{REPOSITORY}/folder@main"}, {"src": f"hf://{REPOSITORY}/folder", "revision": commit}):
        in_folder = service.post("/adapters", name="third", **fields).json()
        assert in_folder["source"] == f"hf://{REPOSITORY}/folder@{commit}"
        assert in_folder["digest"] == response.json()["digest"]


@pytest.mark.parametrize("offline", [True, False])
def test_what_the_hub_cache_has_is_not_fetched_and_offline_it_is_all_there_is(
    tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    commit = hub.revisions["main"]
    kept = tmp_path / "hub" / f"models--{ORGANISATION}--adapter"
    snapshot = kept / "snapshots" / commit
    for directory in (snapshot, kept / "refs", kept / "blobs"):
        directory.mkdir(parents=True)
    (kept / "refs" / "main").write_text(commit)
    for name, content in FILES.items():
        (kept / "blobs" / name).write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    allowed = (f"hf://{ORGANISATION}",)
    with serving(tmp_path / "data", allowed_sources=allowed, sources=fetching(hub=hub.endpoint)) as service:
        for revision in ("", "@main", f"@{commit}"):
            response = post(service, f"hf://{REPOSITORY}{revision}")
            assert response.status_code in (200, 201), response.text
            assert response.json()["source"] == f"hf://{REPOSITORY}@{commit}"
        fetched = [path for path, _ in hub.requests if "safetensors" in path]
        assert (fetched, bool(hub.requests)) == ([], not offline)
        for src in (f"{REPOSITORY}@v2", f"{ORGANISATION}/other"):
            refused = post(service, f"hf://{src}")
            assert error(refused) == (404, "source_not_found", "src")
            assert ("HF_HUB_OFFLINE" in refused.json()["error"]["message"]) == offline
        if offline:
            (snapshot / WEIGHTS).unlink()
            refused = post(service, f"hf://{REPOSITORY}")
            assert error(refused) == (404, "source_not_found", "src")
            assert "hf download" in refused.json()["error"]["message"]
            assert hub.requests == []


@pytest.mark.parametrize(
    ("src", "fields", "status", "code", "param"),
    [
        (f"hf://{REPOSITORY}@main", {"revision": "v2"}, 400, "conflicting_revisions", "revision"),
        (f"hf://{REPOSITORY}", {"revision": "../x"}, 400, "unsupported_revision", "revision"),
        ("s3://bucket/team-a/poet", {"revision": "main"}, 400, "unsupported_revision", "revision"),
        (f"hf://{REPOSITORY}@nothing", {}, 404, "source_not_found", "src"),
        (f"hf://{REPOSITORY}/nothing", {}, 404, "source_not_found", "src"),
        (f"hf://{ORGANISATION}/nothing", {}, 404, "source_not_found", "src"),
        ("hf://nobody/nothing", {}, 403, "source_not_allowed", "src"),
        (f"hf://{ORGANISATION.upper()}/adapter", {}, 403, "source_not_allowed", "src"),
    ],
)
def test_a_wrong_repository_or_revision_is_named(
    service: Service, src: str, fields: dict[str, str], status: int, code: str, param: str
) -> None:
    assert error(post(service, src, **fields)) == (status, code, param)
    assert service.files() == []


def test_a_repository_that_the_server_may_not_read_says_what_is_needed_and_logs_why(
    service: Service, hub: FakeHub, caplog: pytest.LogCaptureFixture
) -> None:
    for gated, token, status in ((True, None, "403"), (False, "another", "401")):
        hub.gated, hub.token = gated, token
        caplog.clear()
        refused = post(service, f"hf://{REPOSITORY}")
        assert error(refused) == (403, "source_access_denied", "src")
        assert f"the hub answered {status}" in refused.json()["error"]["message"]
        assert "needs HF_TOKEN" in refused.json()["error"]["message"]
        assert [record.levelname for record in caplog.records if "with the token given" in record.message] == [
            "WARNING"
        ]
    hub.gated = False
    hub.token = "hf_token"
    assert post(service, f"hf://{REPOSITORY}").status_code == 201


@pytest.mark.parametrize(
    ("status", "body", "answer"),
    [
        (403, b"<Error><Code>AccessDenied</Code><Message>arn:secret</Message></Error>", (403, "source_access_denied")),
        (500, b"", (503, "source_unavailable")),
        (503, b"<Error><Code>SlowDown</Code></Error>", (503, "source_unavailable")),
        (404, b"<Error><Code>NoSuchKey</Code></Error>", (404, "source_not_found")),
        (200, b"", (422, "invalid_adapter")),
    ],
)
def test_what_a_broken_bucket_answers_becomes_a_clear_error(
    tmp_path: Path, status: int, body: bytes, answer: tuple[int, str]
) -> None:
    def broken(request: BaseHTTPRequestHandler) -> None:
        loopback.send(request, status, body, ETag='"1"')

    with (
        loopback.serving(broken) as address,
        serving(tmp_path / "data", allowed_sources=("s3://bucket",), sources=fetching(s3=address)) as service,
    ):
        response = post(service, "s3://bucket/poet")
        assert error(response)[:2] == answer
        assert ("retry-after" in response.headers) == (answer[0] == 503)
        assert "arn:secret" not in response.text
        assert service.files() == []


def test_a_store_that_cannot_be_reached_is_unavailable(tmp_path: Path) -> None:
    allowed = ("s3://bucket", "hf://org")
    with serving(tmp_path / "data", allowed_sources=allowed, sources=fetching()) as service:
        for src in ("s3://bucket/poet", "hf://org/poet"):
            response = post(service, src)
            assert error(response) == (503, "source_unavailable", "src")
            assert "127.0.0.1" not in response.text
            assert src.startswith("s3") or "no answer of the hub (ConnectError)" in response.text
        assert service.files() == []


def test_many_names_may_come_from_one_source_at_once(service: Service, put_object: Callable[[str, bytes], Any]) -> None:
    for number in range(12):
        response = service.client.post(
            "/adapters?wait=false", json={"name": f"poet-{number}", "src": "s3://bucket/team-a/poet"}
        )
        assert response.status_code == 202
    service.eventually(lambda: all(adapter["state"] != "loading" for adapter in service.adapters()))
    assert [adapter["reason"] for adapter in service.adapters()] == [None] * 12
    assert len({adapter["digest"] for adapter in service.adapters()}) == 1
