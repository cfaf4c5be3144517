"""The disk cache: what it keeps, what it lets go, and what it never believes."""

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from blake3 import blake3

from storage.cache import DiskCache
from storage.store import Corrupt, InvalidKey, NotFound, StoreError, StoreFull

ROOT = Path(__file__).parents[2]


def content(number: int, size: int = 100) -> bytes:
    return bytes([number]) * size


def digest(of: bytes) -> str:
    return blake3(of).hexdigest()


def bringing(what: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(what)


def must_be_here(path: Path) -> object:
    raise AssertionError("this was in the cache")


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[DiskCache]:
    opened = DiskCache(tmp_path / "cache", 300)
    yield opened
    opened.check()
    opened.close()


def fetch(cache: DiskCache, number: int, size: int = 100) -> str:
    """Have a file brought if it is not here, and return its digest."""
    one = content(number, size)
    cache.fetch(digest(one), size, bringing(one))
    cache.check()
    return digest(one)


def here(cache: DiskCache, *numbers: int) -> list[bool]:
    return [cache.has(digest(content(number))) for number in numbers]


def test_a_file_is_brought_once(cache: DiskCache) -> None:
    one = content(1)

    path = cache.fetch(digest(one), 100, bringing(one))
    assert path.read_bytes() == one
    assert path == cache.path(digest(one)) == cache.fetch(digest(one), 100, must_be_here)
    assert (cache.hits, cache.misses, cache.evictions, cache.files, cache.bytes_used) == (1, 1, 0, 1, 100)


def test_the_least_recently_used_file_goes_first(cache: DiskCache) -> None:
    for number in (1, 2, 3, 1, 4):
        fetch(cache, number)

    assert here(cache, 1, 2, 3, 4) == [True, False, True, True]
    assert cache.evictions == 1


def test_what_is_held_stays(cache: DiskCache) -> None:
    first = fetch(cache, 1)
    cache.hold(first)
    cache.hold(first)
    for number in (2, 3, 4, 5):
        fetch(cache, number)
    assert here(cache, 1, 2, 3, 4, 5) == [True, False, False, True, True]
    assert cache.held_bytes == 100

    cache.release(first)
    fetch(cache, 6)
    assert cache.has(first)
    cache.release(first)
    fetch(cache, 7)
    fetch(cache, 8)
    assert not cache.has(first)
    assert cache.held_bytes == 0


def test_what_does_not_fit_beside_held_files_is_refused_and_evicts_nothing(cache: DiskCache) -> None:
    for number in (1, 2, 3):
        cache.hold(fetch(cache, number))
    cache.release(digest(content(3)))

    with pytest.raises(StoreFull, match=r"200 bytes do not fit.*200 of its 300"):
        cache.fetch(digest(content(4, 200)), 200, must_be_here)
    with pytest.raises(StoreFull, match="301 bytes"):
        cache.fetch(digest(content(4, 301)), 301, must_be_here)
    assert here(cache, 1, 2, 3) == [True, True, True]


def test_a_corrupt_file_is_brought_again(cache: DiskCache) -> None:
    first = fetch(cache, 1)
    cache.path(first).write_bytes(content(9))

    path = cache.fetch(first, 100, bringing(content(1)))
    assert path.read_bytes() == content(1)
    assert (cache.hits, cache.misses) == (0, 2)


def test_a_file_that_somebody_removed_is_brought_again(cache: DiskCache) -> None:
    first = fetch(cache, 1)
    cache.path(first).unlink()

    assert cache.fetch(first, 100, bringing(content(1))).exists()


@pytest.mark.parametrize("brought", [b"", content(1, 99), content(1, 101), content(2)])
def test_bytes_that_are_not_what_their_digest_says_are_refused(cache: DiskCache, brought: bytes) -> None:
    with pytest.raises(Corrupt, match=digest(content(1))):
        cache.fetch(digest(content(1)), 100, bringing(brought))
    cache.check()
    assert cache.files == 0


def test_a_failed_download_leaves_nothing_and_the_next_call_tries_again(cache: DiskCache) -> None:
    def fails(path: Path) -> object:
        path.write_bytes(b"half")
        raise NotFound("it is gone")

    with pytest.raises(NotFound, match="it is gone"):
        cache.fetch(digest(content(1)), 100, fails)
    cache.check()
    fetch(cache, 1)


def test_all_who_ask_at_once_share_one_download_and_its_failure(cache: DiskCache) -> None:
    one, asked, going = content(1), threading.Event(), threading.Event()
    downloads = []

    def slow(path: Path) -> object:
        downloads.append(path)
        going.set()
        assert asked.wait(10)
        if len(downloads) == 1:
            raise NotFound("not this time")
        return path.write_bytes(one)

    for outcome in ("failure", "success"):
        asked.clear()
        going.clear()
        with ThreadPoolExecutor(4) as threads:
            first = threads.submit(cache.fetch, digest(one), 100, slow)
            assert going.wait(10)
            flight = cache._flights[digest(one)]
            rest = [threads.submit(cache.fetch, digest(one), 100, must_be_here) for _ in range(3)]
            while len(flight._condition._waiters) < 3:  # type: ignore[attr-defined]
                assert not first.done()
            asked.set()
            calls = [first, *rest]
            if outcome == "failure":
                assert {str(call.exception(10)) for call in calls} == {"not this time"}
            else:
                assert {call.result(10) for call in calls} == {cache.path(digest(one))}
    assert len(downloads) == 2


def test_room_is_kept_for_what_is_on_its_way(cache: DiskCache) -> None:
    going, done = threading.Event(), threading.Event()

    def slow(path: Path) -> object:
        going.set()
        assert done.wait(10)
        return path.write_bytes(content(1, 200))

    with ThreadPoolExecutor(1) as threads:
        flight = threads.submit(cache.fetch, digest(content(1, 200)), 200, slow)
        assert going.wait(10)
        cache.check()
        with pytest.raises(StoreFull):
            cache.fetch(digest(content(2, 101)), 101, must_be_here)
        fetch(cache, 3)
        done.set()
        flight.result(10)
    assert cache.bytes_used == 300


def test_threads_that_do_everything_at_once_keep_the_books_right(cache: DiskCache) -> None:
    def work(seed: int) -> None:
        chance = random.Random(seed)
        for turn in range(150):
            one = content(chance.randrange(6), 90)
            name = digest(one)
            match chance.randrange(3):
                case 0:
                    upload = cache.scratch.path / f"{seed}-{turn}"
                    upload.write_bytes(one)
                    cache.add(name, upload)
                case _:
                    cache.hold(name)
                    with suppress(StoreFull):
                        assert cache.fetch(name, 90, bringing(one)).read_bytes() == one
                    cache.release(name)
            cache.check()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    assert not any(cache.scratch.path.iterdir())


def test_a_file_that_is_being_fetched_is_not_evicted(cache: DiskCache) -> None:
    going, done = threading.Event(), threading.Event()

    def slow(path: Path) -> object:
        going.set()
        assert done.wait(10)
        return path.write_bytes(content(1))

    with ThreadPoolExecutor(1) as threads:
        flight = threads.submit(cache.fetch, digest(content(1)), 100, slow)
        assert going.wait(10)
        upload = cache.scratch.path / "an upload"
        upload.write_bytes(content(1))
        cache.add(digest(content(1)), upload)  # the same, while it is on its way
        fetch(cache, 2)
        fetch(cache, 3)
        assert here(cache, 1, 2, 3) == [True, False, True]
        done.set()
        flight.result(10)
    assert cache.bytes_used == 200


def test_an_upload_moves_in(cache: DiskCache) -> None:
    for number in (1, 2, 3, 4, 4):
        upload = cache.scratch.path / "an upload"
        upload.write_bytes(content(number))
        cache.add(digest(content(number)), upload)
        assert not upload.exists()
        cache.check()

    assert here(cache, 1, 2, 3, 4) == [False, True, True, True]
    assert cache.fetch(digest(content(4)), 100, must_be_here).read_bytes() == content(4)


def test_an_upload_that_does_not_fit_is_let_go(cache: DiskCache) -> None:
    first = fetch(cache, 1)
    cache.hold(first)
    upload = cache.scratch.path / "an upload"
    upload.write_bytes(content(2, 250))

    cache.add(digest(content(2, 250)), upload)
    assert not upload.exists()
    assert (cache.files, cache.has(first)) == (1, True)
    cache.release(first)


@pytest.mark.parametrize("name", ["", "../x", "A" * 64, "0" * 63, "0" * 64 + "\n"])
def test_what_is_no_digest_is_refused(cache: DiskCache, name: str) -> None:
    with pytest.raises(InvalidKey):
        cache.fetch(name, 1, must_be_here)
    with pytest.raises(InvalidKey):
        cache.path(name)


def test_the_next_process_takes_over_files_and_order_and_nothing_else(tmp_path: Path) -> None:
    first = DiskCache(tmp_path, 300)
    for age, number in enumerate((3, 1, 2)):
        path = first.path(fetch(first, number))
        os.utime(path, (1000 + age, 1000 + age))
    first.close()
    for name in ("notes.txt", "abc.safetensors", f"{digest(b'')}.txt"):
        (tmp_path / name).write_bytes(b"not ours")
    (tmp_path / f"{digest(b'link')}.safetensors").symlink_to(tmp_path / "notes.txt")

    second = DiskCache(tmp_path, 300)
    assert (second.files, second.bytes_used) == (3, 300)
    fetch(second, 4)
    assert here(second, 1, 2, 3, 4) == [True, True, False, True]
    second.close()
    third = DiskCache(tmp_path, 150)  # smaller than what it finds
    assert here(third, 1, 2, 4) == [False, False, True]
    third.check()
    third.close()
    assert {path.name for path in tmp_path.iterdir()} >= {"notes.txt", "abc.safetensors", f"{digest(b'')}.txt"}


def test_a_directory_has_one_cache(tmp_path: Path) -> None:
    first = DiskCache(tmp_path, 300)
    with pytest.raises(StoreError, match="another process uses"):
        DiskCache(tmp_path, 300)
    first.close()
    first.close()
    DiskCache(tmp_path, 300).close()


KILLED_IN_A_DOWNLOAD = """
import sys
from pathlib import Path
from blake3 import blake3
from storage.cache import DiskCache
cache = DiskCache(Path(sys.argv[1]), 10_000_000)
whole = b"whole" * 1000
cache.fetch(blake3(whole).hexdigest(), len(whole), lambda path: path.write_bytes(whole))
def download(path):
    with path.open("wb") as file:
        file.write(b"half")
        file.flush()
        print("half", flush=True)
        sys.stdin.read()
cache.fetch(blake3(b"half a file").hexdigest(), 11, download)
"""


def test_a_kill_in_the_middle_of_a_download_leaves_what_was_whole(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_IN_A_DOWNLOAD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        with pytest.raises(StoreError, match="another process"):
            DiskCache(tmp_path, 10_000_000)
        process.kill()
        assert process.wait() == -signal.SIGKILL

    cache = DiskCache(tmp_path, 10_000_000)
    cache.check()
    assert cache.fetch(digest(b"whole" * 1000), 5000, must_be_here).read_bytes() == b"whole" * 1000
    assert (cache.files, not cache.has(digest(b"half a file"))) == (1, True)
    cache.close()
    assert [path.name for path in (tmp_path / ".scratch").iterdir()] == []


FILLS_THE_DISK = """
import resource, sys
from pathlib import Path
from blake3 import blake3
from storage.cache import DiskCache
from storage.local import LocalStore
from storage.store import StoreFull
cache = DiskCache(Path(sys.argv[1]) / "cache", 10_000_000)
store = LocalStore(Path(sys.argv[1]) / "store")
big = b"x" * 1_000_000
store.put("big", big)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    cache.fetch(blake3(big).hexdigest(), len(big), lambda path: store.fetch("big", path))
except StoreFull as error:
    print(error, flush=True)
cache.check()
assert not cache.files
cache.fetch(blake3(b"small").hexdigest(), 5, lambda path: path.write_bytes(b"small"))
cache.check()
"""


def test_a_full_disk_is_said_so_and_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FILLS_THE_DISK, str(tmp_path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True)
    assert "'big'" in done.stdout
