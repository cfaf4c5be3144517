"""What only a bucket must do: large objects in parts, odd prefixes, long lists, any endpoint."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from email.utils import format_datetime, parsedate_to_datetime
from pathlib import Path
from typing import Any

import pytest

from storage.s3 import S3Store
from storage.store import StoreError, StoreUnavailable
from tests.storage.faulty_s3 import FaultyS3, lost, passed_on, status

ROOT = Path(__file__).parents[2]
MIB = 1 << 20


@pytest.fixture
def proxy(s3_server: str) -> Iterator[FaultyS3]:
    with FaultyS3(s3_server).running() as proxy:
        yield proxy


@pytest.fixture
def store(proxy: FaultyS3, bucket: str) -> Iterator[S3Store]:
    opened = S3Store(bucket, endpoint=proxy.endpoint, attempts=2, part_bytes=MIB, split_after_seconds=0.0)
    yield opened
    opened.close()


def test_a_large_object_is_fetched_in_parts_of_one_version(proxy: FaultyS3, store: S3Store, tmp_path: Path) -> None:
    content = bytes(range(250)) * 17_000
    etag = store.put("blobs/big", content)
    proxy.requests.clear()

    assert store.fetch("blobs/big", tmp_path / "file") == etag
    assert (tmp_path / "file").read_bytes() == content
    ranges = {f"bytes={start * MIB}-{min((start + 1) * MIB, 4_250_000) - 1}" for start in range(1, 5)}
    assert {asked for _, asked in proxy.requests} == {"bytes=0-", *ranges}


def test_a_fast_connection_brings_a_large_object_alone(proxy: FaultyS3, bucket: str, tmp_path: Path) -> None:
    content = bytes(range(250)) * 17_000
    with closing(S3Store(bucket, endpoint=proxy.endpoint, part_bytes=MIB, split_after_seconds=60.0)) as store:
        store.put("blobs/big", content)
        proxy.requests.clear()

        store.fetch("blobs/big", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content
    assert proxy.requests == [("GET", "bytes=0-")]


@pytest.mark.parametrize("size", [MIB - 1, MIB, MIB + 1, 2 * MIB])
def test_sizes_around_a_part_come_out_whole(store: S3Store, tmp_path: Path, size: int) -> None:
    content = bytes(range(251)) * (size // 251 + 1)
    store.put("blobs/big", content[:size])

    store.fetch("blobs/big", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content[:size]


@pytest.fixture
def large_file(tmp_path: Path) -> Path:
    """A file of three parts, the last one short; S3 accepts no smaller ones than 5 MiB, and s3transfer sends none."""
    file = tmp_path / "source"
    file.write_bytes(bytes(range(256)) * 45_000)
    return file


def test_a_large_file_is_put_in_parts(proxy: FaultyS3, store: S3Store, large_file: Path, tmp_path: Path) -> None:
    etag = store.put("blobs/big", large_file)

    methods = [method for method, _ in proxy.requests]
    assert methods[:5] == ["POST", "PUT", "PUT", "PUT", "POST"]
    assert methods[5:] in ([], ["HEAD"])  # of a server whose last answer has no ETag as it should be
    assert store.fetch("blobs/big", tmp_path / "file") == etag
    assert (tmp_path / "file").read_bytes() == large_file.read_bytes()
    assert store.touch("blobs/big")
    store.fetch("blobs/big", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == large_file.read_bytes()


def test_a_large_put_whose_last_answer_was_lost_is_known_to_be_done(
    proxy: FaultyS3, store: S3Store, large_file: Path, tmp_path: Path
) -> None:
    proxy.methods, proxy.faults = {"POST"}, [passed_on, lost]

    assert store.put("blobs/big", large_file) == store.fetch("blobs/big", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == large_file.read_bytes()


def test_a_large_put_that_fails_leaves_no_parts(
    proxy: FaultyS3, store: S3Store, large_file: Path, s3_client: Any, bucket: str
) -> None:
    proxy.methods, proxy.always = {"PUT"}, status(500, "InternalError")
    with pytest.raises(StoreUnavailable):
        store.put("blobs/big", large_file)

    assert s3_client.list_multipart_uploads(Bucket=bucket).get("Uploads", []) == []
    assert store.list() == []


def test_a_file_that_is_not_there_is_an_error_of_its_own(store: S3Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="No such file"):
        store.put("blobs/big", tmp_path / "nothing")


@pytest.mark.parametrize("prefix", ["a b/c+d", "é/%2F", "..", "a//b", "/x/", "q?x=1&y#z"])
def test_a_prefix_may_hold_any_character(s3_server: str, bucket: str, s3_client: Any, prefix: str) -> None:
    store = S3Store(bucket, prefix, endpoint=s3_server)
    store.put("names/a", b"one")

    assert store.get("names/a").content == b"one"
    assert store.touch("names/a")
    assert [entry.key for entry in store.list("names/")] == ["names/a"]
    found = [found["Key"] for found in s3_client.list_objects_v2(Bucket=bucket)["Contents"]]
    assert found == [f"{prefix.strip('/')}/names/a"]
    store.delete("names/a")
    assert store.list() == []
    store.close()


def test_a_prefix_hides_what_is_beside_it(s3_server: str, bucket: str, s3_client: Any) -> None:
    for key in ("one/a", "one-more/b", "c", "one/not a key", "one/folder/"):
        s3_client.put_object(Bucket=bucket, Key=key, Body=b"x")
    store = S3Store(bucket, "one", endpoint=s3_server)

    assert [entry.key for entry in store.list()] == ["a"]
    store.close()


def test_a_list_of_several_pages_is_read_to_its_end(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")  # MinIO answers with one page
    for number in range(10):
        store.put(f"names/{number}", b"x")

    assert [entry.key for entry in store.list()] == [f"names/{number}" for number in range(10)]


def test_the_endpoint_comes_from_the_environment_unless_it_is_given(
    proxy: FaultyS3, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
    store = S3Store(bucket)  # bucket by path: no name of a host begins with it
    store.put("names/a", b"one")

    assert store.get("names/a").content == b"one"
    assert [method for method, _ in proxy.requests] == ["PUT", "GET"]
    store.close()


def test_what_is_no_endpoint_is_said_so(aws_environment: None) -> None:
    with pytest.raises(StoreError, match="nonsense"):
        S3Store("bucket", endpoint="nonsense")


def test_a_bucket_that_no_bucket_can_be_called_is_refused(store: S3Store, s3_server: str) -> None:
    other = S3Store("no bucket/at all", endpoint=s3_server)
    with pytest.raises(StoreError):
        other.get("names/a")
    other.close()


COUNTS_UP = """
import sys
from storage.s3 import S3Store
from storage.store import PreconditionFailed
store = S3Store(sys.argv[1], endpoint=sys.argv[2])
added = 0
while added < 20:
    content, etag = store.get("counter")
    try:
        store.put("counter", b"%d" % (int(content) + 1), if_match=etag)
        added += 1
    except PreconditionFailed:
        pass
store.close()
"""


def test_two_processes_lose_no_update_to_each_other(store: S3Store, s3_server: str, bucket: str) -> None:
    store.put("counter", b"0")
    command = [sys.executable, "-c", COUNTS_UP, bucket, s3_server]
    with subprocess.Popen(command, cwd=ROOT) as first, subprocess.Popen(command, cwd=ROOT) as second:
        assert (first.wait(), second.wait()) == (0, 0)

    assert store.get("counter").content == b"40"


FILLS_THE_DISK = """
import resource, sys
from pathlib import Path
from storage.s3 import S3Store
from storage.store import StoreFull
store = S3Store(sys.argv[1], endpoint=sys.argv[2], part_bytes=100_000, split_after_seconds=0.0)
store.put("blobs/big", b"x" * 1_000_000)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    store.fetch("blobs/big", Path(sys.argv[3]) / "file")
except StoreFull as error:
    print(error, flush=True)
store.close()
"""


def test_a_full_disk_is_said_so_and_leaves_nothing(s3_server: str, bucket: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", FILLS_THE_DISK, bucket, s3_server, str(tmp_path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True)
    assert "'blobs/big'" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ahead", [-3600, 0, 3600])
def test_the_time_is_that_of_the_server(s3_server: str, bucket: str, ahead: int) -> None:
    def skewed(parsed: dict[str, Any], **_: object) -> None:
        headers = parsed["ResponseMetadata"]["HTTPHeaders"]
        headers["date"] = format_datetime(parsedate_to_datetime(headers["date"]) + timedelta(seconds=ahead))

    store = S3Store(bucket, "one", endpoint=s3_server)
    store._client.meta.events.register("after-call.s3.ListObjectsV2", skewed)
    assert abs(store.now() - time.time() - ahead) < 60
    store.close()


def test_a_server_that_does_not_say_the_time_is_an_error(s3_server: str, bucket: str) -> None:
    def silent(parsed: dict[str, Any], **_: object) -> None:
        del parsed["ResponseMetadata"]["HTTPHeaders"]["date"]

    store = S3Store(bucket, endpoint=s3_server)
    store._client.meta.events.register("after-call.s3.ListObjectsV2", silent)
    with pytest.raises(StoreError, match="have no date"):
        store.now()
    store.close()
