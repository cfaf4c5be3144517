"""The catalog on S3: several servers on one bucket, and a kill between any two of its calls."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import boto3
import pytest
from blake3 import blake3
from moto.server import ThreadedMotoServer

from service.catalog.files import AdapterStorage, cached_storage
from service.catalog.record import Condition
from service.catalog.seen import Seen
from service.errors import RequestError, answer_of
from service.keys.caller import ANYONE
from storage.cache import DiskCache
from storage.s3 import S3Store
from tests.service.catalog.adapter_engine import AdapterEngine
from tests.service.catalog.catalogs import FREE, blob, opened, publish, run
from tests.service.catalog.test_catalog_kills import FIRST, OUTCOMES, ROOT

BUCKET = "adapters"
S3_ENDPOINT = "ROOTSTOCK_TEST_S3_ENDPOINT"  # as in tests/storage/conftest.py


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    if outside := os.environ.get(S3_ENDPOINT):
        yield outside
        return
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(autouse=True)
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty bucket, credentials that no real account has, and no other place where boto3 could find some."""
    given = {"ENDPOINT_URL_S3": endpoint, "EC2_METADATA_DISABLED": "true"}
    if S3_ENDPOINT not in os.environ:
        given |= {"ACCESS_KEY_ID": "an-id", "SECRET_ACCESS_KEY": "a-secret", "DEFAULT_REGION": "us-east-1"}
        given |= {"CONFIG_FILE": "/nowhere", "SHARED_CREDENTIALS_FILE": "/nowhere"}
    for name, value in given.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    client = boto3.session.Session().client("s3")
    client.create_bucket(Bucket=BUCKET)
    yield
    for entry in client.list_objects_v2(Bucket=BUCKET).get("Contents", ()):
        client.delete_object(Bucket=BUCKET, Key=entry["Key"])
    client.delete_bucket(Bucket=BUCKET)
    client.close()


def storage(cache: Path, prefix: str = "") -> AdapterStorage:
    return cached_storage(S3Store(BUCKET, prefix), DiskCache(cache, 1 << 20))


def test_what_one_server_writes_another_reads_from_the_bucket_when_a_request_names_it(tmp_path: Path) -> None:
    async def program() -> None:
        async with opened(storage(tmp_path / "a")) as theirs, opened(storage(tmp_path / "b")) as mine:
            seen = Seen(mine, ANYONE)
            for generation in (1, 2):
                version = await publish(theirs, "org/poet", seed=generation)
                await seen.know("org/poet", generation)
                found = seen.resolve("org/poet")
                assert found is not None
                assert found.record == version.record
            await theirs.delete("org/poet", FREE)
            await seen.know("org/poet", 3)
            assert seen.resolve("org/poet") is None

    run(program())


def test_what_one_server_uploads_another_serves_after_a_look_at_the_bucket(tmp_path: Path) -> None:
    async def program() -> None:
        engine = AdapterEngine()
        async with opened(storage(tmp_path / "a")) as theirs, opened(storage(tmp_path / "b"), engine) as mine:
            version = await publish(theirs, "poet", pin=True)
            await mine.refresh()
            engine.want(version.digest)
            await mine.until_idle()
            assert blake3(engine.registered[version.digest].read_bytes()).hexdigest() == version.digest
            assert engine.pins == {version.digest: "device"}
            await theirs.delete("poet", FREE)
            await mine.refresh()
            assert mine.versions.list() == []
            await mine.until_idle()
            assert await theirs.collect(-1) == (1, version.record.bytes)

    run(program())


def test_writers_of_one_name_lose_nothing_and_agree_in_the_end(tmp_path: Path) -> None:
    async def program() -> None:
        async with opened(storage(tmp_path / "a")) as one, opened(storage(tmp_path / "b")) as two:

            async def write(turn: int) -> int:
                while True:
                    with suppress(RequestError):  # the other was faster too often: the client sends it again
                        return (await publish((one, two)[turn % 2], "poet", seed=turn)).generation

            assert sorted(await asyncio.gather(*map(write, range(8)))) == list(range(1, 9))
            await asyncio.gather(one.refresh(), two.refresh())
            [mine], [theirs] = one.versions.list(), two.versions.list()
            assert mine.record == theirs.record
            stale = Condition(frozenset({"0" * 64}))
            with pytest.raises(RequestError) as refused:
                await two.delete("poet", stale)
            assert answer_of(refused.value).status == 412

    run(program())


@pytest.mark.parametrize("operation", ["upload", "replace", "pin", "delete", "collect"])
def test_a_kill_between_any_two_calls_shows_all_or_nothing(tmp_path: Path, operation: str) -> None:
    async def prepare() -> None:
        async with opened(storage(tmp_path / "prepared", "base")) as catalog:
            await publish(catalog, "first", seed=9)
            await publish(catalog, "first", seed=0)

    run(prepare())
    (tmp_path / "killed").mkdir()
    command = [
        sys.executable,
        "-m",
        "tests.service.catalog.killed_catalog",
        operation,
        "base",
        tmp_path / "killed",
        BUCKET,
    ]
    steps = int(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout)
    assert steps >= 4, "an operation with fewer steps has not been taken apart"
    seen = []

    async def look(step: int) -> None:
        done = (tmp_path / "killed" / f"{step}.done").exists()
        remote = S3Store(BUCKET, f"killed/{step}")
        async with opened(cached_storage(remote, DiskCache(tmp_path / "killed" / str(step), 1 << 20))) as catalog:
            shown = {version.name: (version.generation, version.record.pinned) for version in catalog.versions.list()}
            assert shown in ([OUTCOMES[operation]] if done else [FIRST, OUTCOMES[operation]])
            seen.append(shown)
            await catalog.collect(-1)
            stored = [entry.key for entry in remote.list() if entry.bytes]
            names = [f"names/{version.name}.json" for version in catalog.versions.list()]
            assert stored == sorted([*(blob(version.digest) for version in catalog.versions.list()), *names])

    for step in range(steps + 1):
        run(look(step))
    assert (seen[0], seen[-1]) == (FIRST, OUTCOMES[operation])
