"""Files that are missing, corrupt or of no use: who is told, who waits, and what comes after."""

import errno
import os

import pytest
import torch

from runtime.adapter_format.safetensors_header import write_header
from runtime.adapters.errors import AdapterFailed
from runtime.adapters.pool import AdapterPool
from tests.runtime.adapter_format.adapter_files import MODEL, ONE, SIZE, Clock, adapter, settle, settled

DIGEST, CONTENT = ONE


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def pool(clock):
    made = AdapterPool(MODEL, 8 * SIZE, 8 * SIZE, torch.float32, "cpu", clock=clock)
    yield made
    made.check()
    made.close()


def asked(pool, path):
    """Register a file and ask for it; how that ended."""
    pool.register(DIGEST, path)
    assert not pool.acquire(DIGEST)
    return settle(pool)[-1]


@pytest.mark.parametrize("content", [None, CONTENT[:-1], CONTENT[:-1] + b"\xff", b""])
def test_a_file_that_is_missing_or_corrupt_is_asked_for_once_and_loads_when_it_is_there(pool, tmp_path, content):
    path = tmp_path / "adapter"
    if content is not None:
        path.write_bytes(content)
    assert asked(pool, path) == (DIGEST, "missing", None)
    for _ in range(3):
        assert not pool.acquire(DIGEST), "it waits"
        assert settle(pool) == []
    assert list(pool.missing) == [DIGEST]
    path.write_bytes(CONTENT)
    pool.register(DIGEST, path)
    assert settle(pool)[-1] == (DIGEST, "idle", "device")
    assert pool.acquire(DIGEST)
    assert pool.missing == {}


def test_a_file_brought_to_another_place_is_read_there(pool, tmp_path):
    assert asked(pool, tmp_path / "nowhere" / "adapter") == (DIGEST, "missing", None)
    (tmp_path / "adapter").write_bytes(CONTENT)
    pool.register(DIGEST, tmp_path / "adapter")
    settle(pool)
    assert pool.acquire(DIGEST)


def test_a_file_that_is_brought_while_it_is_looked_for_is_looked_for_again(pool, tmp_path):
    path = tmp_path / "adapter"
    pool.register(DIGEST, path)
    assert not pool.acquire(DIGEST)
    pool.wait()
    path.write_bytes(CONTENT)
    pool.register(DIGEST, path)
    assert settle(pool)[-1] == (DIGEST, "idle", "device")


def test_a_file_that_is_wrong_again_after_it_was_brought_fails(pool, clock, tmp_path):
    path = tmp_path / "adapter"
    assert asked(pool, path) == (DIGEST, "missing", None)
    path.write_bytes(CONTENT[:-1])
    pool.register(DIGEST, path)
    assert settle(pool)[-1] == (DIGEST, "failed", None)
    with pytest.raises(AdapterFailed, match="corrupt"):
        pool.acquire(DIGEST)
    clock.now += 1.1
    assert not pool.acquire(DIGEST)
    assert settle(pool)[-1] == (DIGEST, "missing", None), "it may be brought anew"


def test_a_file_that_cannot_be_had_fails_with_the_reason_for_longer_each_time(pool, clock, tmp_path):
    path = tmp_path / "adapter"
    assert asked(pool, path) == (DIGEST, "missing", None)
    pool.fail(DIGEST, "the bucket is gone")
    [state] = settled(pool)
    assert (state.state, state.reason) == ("failed", "the bucket is gone")
    pool.fail(DIGEST, "again")
    with pytest.raises(AdapterFailed, match="the bucket is gone"):
        pool.prefetch(DIGEST)
    clock.now += 1.1
    pool.prefetch(DIGEST)
    assert settle(pool)[-1] == (DIGEST, "missing", None)
    pool.fail(DIGEST, "the bucket is still gone")
    clock.now += 1.1
    with pytest.raises(AdapterFailed, match="still gone"):
        pool.prefetch(DIGEST)
    clock.now += 1.0
    path.write_bytes(CONTENT)
    pool.prefetch(DIGEST)
    settle(pool)
    assert pool.acquire(DIGEST)


def test_registering_a_failed_adapter_again_gives_it_a_new_start(pool, tmp_path):
    assert asked(pool, tmp_path / "adapter") == (DIGEST, "missing", None)
    pool.fail(DIGEST, "gone")
    pool.register(DIGEST, CONTENT)
    pool.prefetch(DIGEST)
    assert settle(pool)[-1] == (DIGEST, "idle", "device")


def test_only_an_adapter_whose_file_is_missing_can_be_said_to_fail(pool):
    pool.fail("never heard of", "gone")
    pool.register(DIGEST, CONTENT)
    pool.fail(DIGEST, "gone")
    assert not pool.acquire(DIGEST)
    pool.fail(DIGEST, "gone")
    settle(pool)
    assert pool.acquire(DIGEST)


def test_a_file_is_needed_only_while_no_tier_has_the_adapter(pool, tmp_path):
    path = tmp_path / "adapter"
    path.write_bytes(CONTENT)
    pool.register(DIGEST, path)
    pool.load(DIGEST, "host")
    assert settle(pool)[-1] == (DIGEST, "idle", "host")
    path.unlink()
    assert not pool.acquire(DIGEST)
    assert settle(pool)[-1] == (DIGEST, "idle", "device")


@pytest.mark.parametrize("start", [b"", CONTENT])
def test_a_file_larger_than_what_could_be_read_is_asked_for_again_as_it_cannot_be_right(pool, tmp_path, start):
    path = tmp_path / "adapter"
    with path.open("wb") as file:
        file.write(start)
        file.truncate(10 << 30)
    assert asked(pool, path) == (DIGEST, "missing", None)
    assert pool.missing == {DIGEST: f"its file is corrupt: {10 << 30} bytes"}
    path.write_bytes(CONTENT)
    pool.register(DIGEST, path)
    assert settle(pool)[-1] == (DIGEST, "idle", "device")


def test_a_file_that_no_tier_could_take_is_not_read_whole_if_it_is_what_it_says(pool, tmp_path):
    path = tmp_path / "adapter"
    rows = 1 << 24
    header = write_header({"weight": ("F32", (rows, 64))}, {})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + rows * 64 * 4)
    assert asked(pool, path) == (DIGEST, "failed", None)
    with pytest.raises(AdapterFailed, match="host adapter memory could take"):
        pool.acquire(DIGEST)


def a_directory(path):
    path.mkdir()


def a_loop(path):
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (a_directory, "Is a directory"),
        (a_loop, "Too many levels of symbolic links"),
        (os.mkfifo, "Not a regular file"),
    ],
)
def test_what_cannot_be_read_is_reported_in_the_systems_words_and_without_the_path(pool, clock, tmp_path, make, reason):
    path = tmp_path / "adapter"
    make(path)
    assert asked(pool, path) == (DIGEST, "missing", None)
    assert pool.missing == {DIGEST: f"its file cannot be read: {reason}"}
    pool.register(DIGEST, path)  # nothing better has been brought
    assert settle(pool)[-1] == (DIGEST, "failed", None)
    with pytest.raises(AdapterFailed, match=f"{DIGEST} failed to load: its file cannot be read: {reason}$"):
        pool.acquire(DIGEST)
    path.rmdir() if path.is_dir() else path.unlink()
    path.write_bytes(CONTENT)
    pool.register(DIGEST, path)
    pool.prefetch(DIGEST)
    assert settle(pool)[-1] == (DIGEST, "idle", "device")


@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_file_that_the_system_does_not_give_is_reported_without_the_path(pool, monkeypatch, tmp_path, error):
    def refuse(path, flags):
        raise OSError(error, os.strerror(error), path)

    monkeypatch.setattr("runtime.adapters.loader.os.open", refuse)
    assert asked(pool, tmp_path / "adapter") == (DIGEST, "missing", None)
    assert pool.missing == {DIGEST: f"its file cannot be read: {os.strerror(error)}"}


def test_a_failing_load_gives_its_room_back_and_leaves_the_others_alone(pool, tmp_path):
    broken, content = adapter(1)
    good = adapter(2)
    pool.register(broken, content.replace(b"layers.0", b"layers.7"))
    pool.register(*good)
    for digest in (broken, good[0]):
        pool.prefetch(digest)
    assert {(broken, "failed", None), (good[0], "idle", "device")} <= set(settle(pool))
    assert pool.device.bytes_used == pool.host.bytes_used == SIZE


def test_a_known_adapter_whose_file_has_gone_gives_back_what_it_reserved(pool, tmp_path):
    path = tmp_path / "adapter"
    path.write_bytes(CONTENT)
    pool.register(DIGEST, path)
    pool.load(DIGEST, "device")
    settle(pool)
    pool.unload("u", DIGEST, "host")
    settle(pool)
    path.unlink()
    assert not pool.acquire(DIGEST)
    assert settle(pool)[-1] == (DIGEST, "missing", None)
    assert pool.device.bytes_used == pool.host.bytes_used == 0
