"""Closing a store, a repository or a cache does not block, ends what goes on, and leaves nothing half done."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from blake3 import blake3

from storage.cache import DiskCache
from storage.huggingface import HubRepository
from storage.s3 import S3Store
from storage.store import StoreUnavailable
from tests.storage.fake_hub import REPOSITORY, FakeHub
from tests.storage.faulty_s3 import Answer, Fault, FaultyS3, Request, write

ROOT = Path(__file__).parents[2]
PART = 64 << 10
BIG = bytes(range(256)) * 1000
DIGEST = blake3(BIG).hexdigest()
READ_TIMEOUT_SECONDS = 2.0
AT_MOST_SECONDS = 3.0  # a retry of a transfer that is not ended would take longer


@pytest.fixture
def s3(s3_server: str) -> Iterator[FaultyS3]:
    with FaultyS3(s3_server).running() as proxy:
        yield proxy


@pytest.fixture
def store(s3: FaultyS3, s3_client: Any, bucket: str) -> Iterator[S3Store]:
    s3_client.put_object(Bucket=bucket, Key="blobs/big", Body=BIG)
    opened = S3Store(
        bucket,
        endpoint=s3.endpoint,
        read_timeout_seconds=READ_TIMEOUT_SECONDS,
        attempts=10,
        part_bytes=PART,
        split_after_seconds=0.0,
    )
    yield opened
    opened.close()


@contextmanager
def within(seconds: float) -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds


def silent(reached: Event, s3: FaultyS3) -> Fault:
    """The server takes a request and does not answer."""

    def answer(request: Request, forward: Callable[[], Answer]) -> None:
        reached.set()
        s3.stall()

    return answer


def half(reached: Event, s3: FaultyS3) -> Fault:
    """The server stalls in the middle of a body."""

    def answer(request: Request, forward: Callable[[], Answer]) -> None:
        whole = forward()
        write(request, whole, whole.body[: len(whole.body) // 2])
        request.wfile.flush()
        reached.set()
        s3.stall()

    return answer


@pytest.mark.parametrize("fault", [silent, half])
@pytest.mark.parametrize("part", [0, 1])
def test_closing_a_store_does_not_wait_for_a_stalled_download_and_that_ends_with_its_timeout(
    s3: FaultyS3, store: S3Store, tmp_path: Path, fault: Callable[[Event, FaultyS3], Fault], part: int
) -> None:
    reached = Event()
    store.fetch("blobs/big", tmp_path / "big")  # so that connections are reused, too
    s3.faults = [lambda request, forward: write(request, answer := forward(), answer.body)] * part
    s3.always = fault(reached, s3)
    cache = DiskCache(tmp_path / "cache", 1 << 20)
    with ThreadPoolExecutor(1) as threads:
        fetching = threads.submit(cache.fetch, DIGEST, len(BIG), lambda path: store.fetch("blobs/big", path))
        assert reached.wait(10)
        with within(READ_TIMEOUT_SECONDS / 2):
            store.close()
        with within(AT_MOST_SECONDS), pytest.raises(StoreUnavailable):
            fetching.result(20)
    cache.check()
    assert (cache.files, list(cache.scratch.path.iterdir())) == (0, [])
    cache.close()


def test_closing_a_store_ends_a_download_that_goes_on(store: S3Store, tmp_path: Path) -> None:
    seen, go_on = Event(), Event()

    def stop(done: int, total: int) -> None:
        seen.set()
        assert go_on.wait(10)

    with ThreadPoolExecutor(1) as threads:
        fetching = threads.submit(store.fetch, "blobs/big", tmp_path / "file", on_progress=stop)
        assert seen.wait(10)
        store.close()
        go_on.set()
        with within(READ_TIMEOUT_SECONDS), pytest.raises(StoreUnavailable, match="the store was closed"):
            fetching.result(20)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [1000, 20 << 20])
def test_closing_a_store_does_not_wait_for_a_stalled_upload_and_that_ends_with_its_timeout(
    s3: FaultyS3, store: S3Store, tmp_path: Path, size: int
) -> None:
    reached = Event()
    (tmp_path / "file").write_bytes(bytes(size))
    s3.methods, s3.always = {"PUT"}, silent(reached, s3)
    with ThreadPoolExecutor(1) as threads:
        putting = threads.submit(store.put, "blobs/a", tmp_path / "file")
        assert reached.wait(10)
        with within(READ_TIMEOUT_SECONDS / 2):
            store.close()
        with within(AT_MOST_SECONDS), pytest.raises(StoreUnavailable):
            putting.result(20)


LEAVES_WITH_A_STALLED_DOWNLOAD = """
import os, sys, threading
from pathlib import Path
from storage.s3 import S3Store
store = S3Store(sys.argv[1], endpoint=sys.argv[2], read_timeout_seconds=60.0)
threading.Thread(target=store.fetch, args=("blobs/big", Path(sys.argv[3]))).start()
print("started", flush=True)
sys.stdin.readline()
store.close()
os._exit(0)  # as the service ends
"""


def test_a_process_that_leaves_is_not_held_by_a_stalled_download(
    s3: FaultyS3, s3_client: Any, bucket: str, tmp_path: Path
) -> None:
    s3_client.put_object(Bucket=bucket, Key="blobs/big", Body=BIG)
    reached = Event()
    s3.always = half(reached, s3)
    command = [sys.executable, "-c", LEAVES_WITH_A_STALLED_DOWNLOAD, bucket, s3.endpoint, str(tmp_path / "file")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert reached.wait(60)
        with within(AT_MOST_SECONDS):
            process.communicate("go\n", timeout=20)
        assert process.returncode == 0


def test_a_closed_store_refuses_at_once(store: S3Store, tmp_path: Path) -> None:
    store.close()
    store.close()
    with within(AT_MOST_SECONDS):
        for call in (store.list, lambda: store.fetch("blobs/big", tmp_path / "file"), lambda: store.put("a", b"x")):
            with pytest.raises(StoreUnavailable, match="the store was closed"):
                call()
    assert list(tmp_path.iterdir()) == []


def test_closing_a_repository_ends_its_downloads(hub: FakeHub, tmp_path: Path) -> None:
    hub.commit({"small": b"small", "big": BIG * 100})
    repository = HubRepository(REPOSITORY, endpoint=hub.endpoint)
    other = HubRepository(REPOSITORY, endpoint=hub.endpoint)
    seen = Event()
    go_on = Event()

    def stop(done: int, total: int) -> None:
        seen.set()
        assert go_on.wait(10)

    with ThreadPoolExecutor(1) as threads:
        fetching = threads.submit(repository.fetch, "big", tmp_path / "file", on_progress=stop)
        assert seen.wait(10)
        repository.close()
        repository.close()
        go_on.set()
        with within(AT_MOST_SECONDS), pytest.raises(StoreUnavailable, match="was closed"):
            fetching.result(20)
        with within(AT_MOST_SECONDS), pytest.raises(StoreUnavailable, match="was closed"):
            repository.fetch("small", tmp_path / "file")
    assert list(tmp_path.iterdir()) == []
    other.fetch("small", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"small"


def test_a_closed_repository_does_not_ask_a_silent_hub_again(hub: FakeHub, tmp_path: Path) -> None:
    hub.commit({"small": b"small"})
    repository = HubRepository(REPOSITORY, endpoint=hub.endpoint, timeout_seconds=READ_TIMEOUT_SECONDS, attempts=10)
    asked = len(hub.requests)
    hub.silent = True
    with ThreadPoolExecutor(1) as threads:
        fetching = threads.submit(repository.fetch, "small", tmp_path / "file")
        while len(hub.requests) == asked:
            assert not fetching.done()
        repository.close()
        with within(AT_MOST_SECONDS), pytest.raises(StoreUnavailable, match="was closed"):
            fetching.result(20)


def test_closing_a_cache_ends_the_wait_for_room(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 100)
    first, second = b"1" * 100, b"2" * 100
    cache.hold(blake3(first).hexdigest())
    cache.fetch(blake3(first).hexdigest(), 100, lambda path: path.write_bytes(first))
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(
            cache.fetch, blake3(second).hexdigest(), 100, lambda path: path.write_bytes(second), wait_seconds=60
        )
        while not cache._room._waiters:  # type: ignore[attr-defined]
            assert not waiting.done()
        with within(AT_MOST_SECONDS):
            cache.close()
            with pytest.raises(StoreUnavailable, match="closed"):
                waiting.result(20)
