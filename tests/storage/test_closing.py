"""Closing a store, a repository or a cache ends what waits on it, and nothing half done stays."""

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
from tests.storage.buckets import new_bucket
from tests.storage.fake_hub import REPOSITORY, FakeHub
from tests.storage.faulty_s3 import Answer, Fault, FaultyS3, Request, write

PART = 64 << 10
BIG = bytes(range(256)) * 1000
DIGEST = blake3(BIG).hexdigest()
AT_MOST_SECONDS = 3.0  # the timeouts are longer


@pytest.fixture
def s3(s3_server: str) -> Iterator[FaultyS3]:
    with FaultyS3(s3_server).running() as proxy:
        yield proxy


@pytest.fixture
def store(s3: FaultyS3, s3_client: Any, aws_environment: None) -> Iterator[S3Store]:
    with new_bucket(s3_client) as bucket:
        s3_client.put_object(Bucket=bucket, Key="blobs/big", Body=BIG)
        opened = S3Store(bucket, endpoint=s3.endpoint, part_bytes=PART, split_after_seconds=0.0)
        yield opened
        opened.close()


@contextmanager
def soon() -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < AT_MOST_SECONDS


def silent(reached: Event, s3: FaultyS3) -> Fault:
    """The server takes a request and says nothing."""

    def answer(request: Request, forward: Callable[[], Answer]) -> None:
        reached.set()
        s3.stall()

    return answer


def half(reached: Event, s3: FaultyS3) -> Fault:
    """The server falls silent in the middle of a body."""

    def answer(request: Request, forward: Callable[[], Answer]) -> None:
        whole = forward()
        write(request, whole, whole.body[: len(whole.body) // 2])
        request.wfile.flush()
        reached.set()
        s3.stall()

    return answer


@pytest.mark.parametrize("fault", [silent, half])
@pytest.mark.parametrize("part", [0, 1])
def test_closing_a_store_ends_its_downloads_and_the_cache_keeps_nothing(
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
        with soon():
            store.close()
            with pytest.raises(StoreUnavailable):
                fetching.result(20)
    cache.check()
    assert (cache.files, list(cache.scratch.path.iterdir())) == (0, [])
    cache.close()


@pytest.mark.parametrize("size", [1000, 20 << 20])
def test_closing_a_store_ends_its_uploads(s3: FaultyS3, store: S3Store, tmp_path: Path, size: int) -> None:
    reached = Event()
    (tmp_path / "file").write_bytes(bytes(size))
    s3.methods, s3.always = {"PUT"}, silent(reached, s3)
    with ThreadPoolExecutor(1) as threads:
        putting = threads.submit(store.put, "blobs/a", tmp_path / "file")
        assert reached.wait(10)
        with soon():
            store.close()
            with pytest.raises(StoreUnavailable):
                putting.result(20)


def test_a_closed_store_refuses_at_once(store: S3Store, tmp_path: Path) -> None:
    store.close()
    store.close()
    with soon():
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
        with soon(), pytest.raises(StoreUnavailable, match="was closed"):
            fetching.result(20)
        with soon(), pytest.raises(StoreUnavailable, match="was closed"):
            repository.get("small")
    assert list(tmp_path.iterdir()) == []
    assert other.get("small").content == b"small"


def test_closing_a_repository_ends_its_wait_for_a_silent_hub(hub: FakeHub) -> None:
    hub.commit({"small": b"small"})
    repository = HubRepository(REPOSITORY, endpoint=hub.endpoint)
    asked = len(hub.requests)
    hub.silent = True
    with ThreadPoolExecutor(1) as threads:
        getting = threads.submit(repository.get, "small")
        while len(hub.requests) == asked:
            assert not getting.done()
        with soon():
            repository.close()
            with pytest.raises(StoreUnavailable, match="was closed"):
                getting.result(20)


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
        with soon():
            cache.close()
            with pytest.raises(StoreUnavailable, match="closed"):
                waiting.result(20)
