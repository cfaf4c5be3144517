"""A full disk cache: what waits for room, what fails at once, and what lets it go on."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event

import pytest
from blake3 import blake3

from storage.cache import DiskCache
from storage.store import NotFound, StoreFull

LONG = 60.0


def content(number: int, size: int = 100) -> bytes:
    return bytes([number]) * size


def digest(number: int, size: int = 100) -> str:
    return blake3(content(number, size)).hexdigest()


def fetch(cache: DiskCache, number: int, wait_seconds: float = 0.0, size: int = 100) -> Path:
    def download(path: Path) -> object:
        return path.write_bytes(content(number, size))

    return cache.fetch(digest(number, size), size, download, wait_seconds=wait_seconds)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[DiskCache]:
    opened = DiskCache(tmp_path / "cache", 300)
    yield opened
    opened.check()
    opened.close()


def until_waiting(cache: DiskCache, call: Future[Path]) -> None:
    while not cache._room._waiters:  # type: ignore[attr-defined]
        assert not call.done()


def waits_until(cache: DiskCache, happens: Callable[[], object]) -> None:
    """A fetch of another file has no room, and gets it when something happens."""
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(fetch, cache, 9, LONG)
        until_waiting(cache, waiting)
        cache.check()
        happens()
        assert waiting.result(10).read_bytes() == content(9)


def test_twelve_files_go_one_after_another_through_a_cache_that_holds_three(cache: DiskCache) -> None:
    start = Barrier(12)

    def read(number: int) -> bytes:
        start.wait()
        cache.hold(digest(number))
        try:
            found = fetch(cache, number, LONG).read_bytes()
            cache.check()
        finally:
            cache.release(digest(number))
        return found

    with ThreadPoolExecutor(12) as threads:
        assert list(threads.map(read, range(12))) == [content(number) for number in range(12)]
    assert (cache.files, cache.evictions) == (3, 9)


def test_a_release_makes_room(cache: DiskCache) -> None:
    for number in (1, 2, 3):
        cache.hold(digest(number))
        fetch(cache, number)

    waits_until(cache, lambda: cache.release(digest(2)))
    assert [cache.has(digest(number)) for number in (1, 2, 3, 9)] == [True, False, True, True]


@pytest.mark.parametrize("outcome", ["arrives", "fails"])
def test_the_end_of_a_download_makes_room(cache: DiskCache, outcome: str) -> None:
    going, done = Event(), Event()

    def slow(path: Path) -> object:
        going.set()
        assert done.wait(10)
        if outcome == "fails":
            raise NotFound("it is gone")
        return path.write_bytes(content(1, 300))

    with ThreadPoolExecutor(1) as threads:
        flight = threads.submit(cache.fetch, digest(1, 300), 300, slow)
        assert going.wait(10)
        waits_until(cache, done.set)
        assert isinstance(flight.exception(10), NotFound if outcome == "fails" else type(None))


def test_an_upload_of_the_same_bytes_ends_the_wait(cache: DiskCache) -> None:
    cache.hold(digest(1, 250))
    fetch(cache, 1, size=250)

    def upload() -> None:
        file = cache.scratch.path / "an upload"
        file.write_bytes(content(9))
        cache.release(digest(1, 250))
        cache.add(digest(9), file)

    waits_until(cache, upload)


def test_what_does_not_fit_beside_pinned_files_fails_at_once(cache: DiskCache) -> None:
    for number in (1, 2, 3):
        cache.hold(digest(number), pinned=number != 3)
        fetch(cache, number)
    started = time.monotonic()
    for size in (101, 301):
        with pytest.raises(StoreFull, match=f"{size} bytes"):
            fetch(cache, 9, LONG, size)
    assert time.monotonic() - started < LONG / 2

    waits_until(cache, lambda: cache.release(digest(3)))
    cache.hold(digest(9))
    cache.hold(digest(1))
    cache.release(digest(1), pinned=True)  # still held, but not for ever
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(fetch, cache, 8, LONG)
        until_waiting(cache, waiting)
        cache.release(digest(1))
        assert waiting.result(10).read_bytes() == content(8)


def test_the_wait_has_an_end(cache: DiskCache) -> None:
    cache.hold(digest(1, 300))
    fetch(cache, 1, size=300)
    with pytest.raises(StoreFull, match="100 bytes do not fit"):
        fetch(cache, 2, 0.05)
