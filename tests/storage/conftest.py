"""The stores that the one suite runs over."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import huggingface_hub.constants
import pytest
from moto.server import ThreadedMotoServer

from storage.huggingface import HubRepository
from storage.local import LocalStore
from storage.s3 import S3Store
from storage.store import Reader, Store
from tests.storage.buckets import new_bucket
from tests.storage.fake_hub import REPOSITORY, FakeHub

S3_ENDPOINT = "ROOTSTOCK_TEST_S3_ENDPOINT"  # of MinIO, say; the credentials for it are then the environment's own
CREDENTIALS = {"aws_access_key_id": "an-id", "aws_secret_access_key": "a-secret", "region_name": "us-east-1"}


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 server on the loopback."""
    if outside := os.environ.get(S3_ENDPOINT):
        yield outside
        return
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def aws_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Credentials that no real account has, and no other place where boto3 could find some."""
    if S3_ENDPOINT in os.environ:
        yield
        return
    nowhere = tmp_path_factory.getbasetemp() / "no-such-file"
    ours = {
        "AWS_ACCESS_KEY_ID": CREDENTIALS["aws_access_key_id"],
        "AWS_SECRET_ACCESS_KEY": CREDENTIALS["aws_secret_access_key"],
        "AWS_DEFAULT_REGION": CREDENTIALS["region_name"],
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(nowhere),
        "AWS_SHARED_CREDENTIALS_FILE": str(nowhere),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in ours.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def s3_client(s3_server: str) -> Iterator[Any]:
    """A client of boto3's own, to look at a bucket from outside of the store."""
    ours = {} if S3_ENDPOINT in os.environ else CREDENTIALS
    client = boto3.session.Session(**ours).client("s3", endpoint_url=s3_server)
    yield client
    client.close()


@pytest.fixture
def bucket(s3_client: Any, aws_environment: None) -> Iterator[str]:
    """A bucket of this test alone."""
    with new_bucket(s3_client) as name:
        yield name


@pytest.fixture(scope="module")
def shared_store(s3_client: Any, s3_server: str, aws_environment: None) -> Iterator[S3Store]:
    """One store for the tests of a module, empty for each of them: to open one takes longer than most tests."""
    with new_bucket(s3_client) as bucket:
        opened = S3Store(bucket, "some/prefix", endpoint=s3_server)
        yield opened
        opened.close()


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "local":
        local = LocalStore(tmp_path / "store")
        yield local
        local.close()
    else:
        shared: S3Store = request.getfixturevalue("shared_store")
        yield shared
        for entry in shared.list():
            shared.delete(entry.key)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    """A hub with nothing in it yet; no token, and a home of the library's that must stay empty."""
    home = tmp_path_factory.mktemp("home") / "huggingface"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # as tests/conftest.py sets it
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home / "hub"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with FakeHub().running() as hub:
        yield hub
    assert not home.exists()


@pytest.fixture(params=["local", "s3", "hub"])
def reader_of(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[dict[str, bytes]], Reader]]:
    """A function that returns a reader of the objects that it is called with."""
    if request.param == "hub":
        hub: FakeHub = request.getfixturevalue("hub")

        def of(objects: dict[str, bytes]) -> Reader:
            hub.commit(objects)
            return HubRepository(REPOSITORY, endpoint=hub.endpoint)

        yield of
        return
    opened: Store = (
        LocalStore(tmp_path / "store") if request.param == "local" else request.getfixturevalue("shared_store")
    )

    def stored(objects: dict[str, bytes]) -> Reader:
        for key, content in objects.items():
            opened.put(key, content)
        return opened

    yield stored
    for entry in opened.list():
        opened.delete(entry.key)
    if request.param == "local":
        opened.close()
