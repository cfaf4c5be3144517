"""What only a directory must do: several processes, kills, full disks."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from storage import identity
from storage.local import LocalStore
from storage.scratch import held
from storage.store import Entry, PreconditionFailed, StoreError, StoreLost

ROOT = Path(__file__).parents[2]


def files(root: Path) -> list[str]:
    """Every file below a directory but a store's identity."""
    found = [path for path in root.rglob("*") if path.is_file() and path.name != identity.FILE]
    return sorted(path.relative_to(root).as_posix() for path in found)


def child(program: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_objects_outlive_the_process(tmp_path: Path) -> None:
    first = LocalStore(tmp_path)
    etag = first.put("names/a", b"one")
    first.close()

    second = LocalStore(tmp_path)
    assert second.get("names/a") == (b"one", etag)
    assert second.path("names/a").read_bytes() == b"one"
    second.close()


def test_closing_leaves_only_the_objects(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("names/a", b"one")
    (store.scratch.path / "half an upload").write_bytes(b"half")
    store.close()
    store.close()

    assert files(tmp_path) == ["names/a"]


WRITES_UNTIL_KILLED = """
import sys
from pathlib import Path
from storage.local import LocalStore
store = LocalStore(Path(sys.argv[1]))
(store.scratch.path / "half an upload").write_bytes(b"half")
print("ready", flush=True)
number = 0
while True:
    store.put("names/a", b"%08d" % number * 100_000)
    number += 1
"""


def test_a_killed_process_leaves_whole_objects_and_its_scraps_go_at_the_next_start(tmp_path: Path) -> None:
    with child(WRITES_UNTIL_KILLED, tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert any(name.endswith("half an upload") for name in files(tmp_path))

    store = LocalStore(tmp_path)
    assert [name for name in files(tmp_path) if name != "names/a"] == []
    for entry in store.list():
        content = store.get(entry.key).content
        assert content == content[:8] * 100_000
    store.close()


OPENS_AND_WAITS = """
import sys
from pathlib import Path
from storage.local import LocalStore
store = LocalStore(Path(sys.argv[1]))
(store.scratch.path / "an upload").write_bytes(b"going on")
print(store.scratch.path, flush=True)
sys.stdin.read()
"""


def test_a_second_process_leaves_the_first_ones_scratch_alone(tmp_path: Path) -> None:
    with child(OPENS_AND_WAITS, tmp_path) as process:
        assert process.stdout is not None
        scratch = Path(process.stdout.readline().strip())
        store = LocalStore(tmp_path)
        assert (scratch / "an upload").read_bytes() == b"going on"
        process.kill()
        process.wait()
        LocalStore(tmp_path).close()
        assert not scratch.exists()
        store.close()


COUNTS_UP = """
import sys
from pathlib import Path
from storage.local import LocalStore
from storage.store import PreconditionFailed
store = LocalStore(Path(sys.argv[1]))
added = 0
while added < 50:
    content, etag = store.get("counter")
    try:
        store.put("counter", b"%d" % (int(content) + 1), if_match=etag)
        added += 1
    except PreconditionFailed:
        pass
"""


def test_two_processes_lose_no_update_to_each_other(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("counter", b"0")
    with child(COUNTS_UP, tmp_path) as first, child(COUNTS_UP, tmp_path) as second:
        assert (first.wait(), second.wait()) == (0, 0)

    assert store.get("counter").content == b"100"
    store.close()


FILLS_THE_DISK = """
import resource, sys
from pathlib import Path
from storage.local import LocalStore
from storage.store import StoreFull
store = LocalStore(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    store.put("blobs/big", b"x" * 1_000_000)
except StoreFull as error:
    print(error, flush=True)
store.put("blobs/small", b"y")
assert not any(store.scratch.path.iterdir())
store.close()
"""


def test_no_room_is_said_so_and_leaves_nothing(tmp_path: Path) -> None:
    with child(FILLS_THE_DISK, tmp_path) as process:
        output, _ = process.communicate()
    assert process.returncode == 0
    assert "'blobs/big'" in output
    assert files(tmp_path) == ["blobs/small"]


def test_files_that_no_key_can_name_are_not_listed(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("names/a", b"one")
    for name in ("names/.hidden", "names/with space", "lost+found"):
        (tmp_path / name).write_bytes(b"not ours")

    assert [entry.key for entry in store.list()] == ["names/a"]
    store.close()


def test_an_object_in_the_way_of_a_directory_is_a_clear_error(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("names", b"one")

    with pytest.raises(StoreError, match="'names/a'"):
        store.put("names/a", b"two")
    with pytest.raises(PreconditionFailed):
        store.put("names", b"two", if_none_match=True)
    assert files(tmp_path) == ["names"]
    store.close()


@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO, errno.EMFILE, errno.ELOOP])
@pytest.mark.parametrize("unreadable", ["names", "names/deeper"])
def test_a_directory_that_cannot_be_read_is_not_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, unreadable: str
) -> None:
    store = LocalStore(tmp_path)
    store.put("names/deeper/a", b"one")
    scandir = os.scandir

    def broken(path: Any) -> Iterator[os.DirEntry[str]]:
        if path == str(tmp_path / unreadable):
            raise OSError(error, os.strerror(error))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", broken)
    for prefix in ("names/", "names/de", ""):
        with pytest.raises(StoreError, match=os.strerror(error)):
            store.list(prefix)
    monkeypatch.undo()
    store.close()


def test_a_file_that_cannot_be_looked_at_is_not_left_out(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("blobs/a", b"one")
    (tmp_path / "blobs" / "link").symlink_to("link")
    with pytest.raises(StoreError, match="symbolic links"):
        store.list("blobs/")

    (tmp_path / "blobs" / "link").unlink()
    (tmp_path / "blobs" / "link").symlink_to("nothing")
    assert [entry.key for entry in store.list()] == ["blobs/a"]
    assert store.list("nothing/") == store.list("blobs/a/") == []
    store.close()


def test_a_directory_that_cannot_be_a_store_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="Not a directory"):
        LocalStore(tmp_path / "file")


def test_a_delete_on_condition_sees_every_touch_and_put(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for _ in range(200):
        store.put("blobs/a", b"one")
        (first,) = store.list()
        store.touch("blobs/a")
        (second,) = store.list()
        store.put("blobs/a", b"one")
        for entry in (first, second):
            assert not store.delete("blobs/a", unless_changed=entry)
    store.close()


def test_a_delete_on_condition_compares_under_the_lock_that_touches_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    store.put("blobs/a", b"one")
    (listed,) = store.list()
    looked = []

    def entry(key: str, stat: os.stat_result) -> Entry:
        with pytest.raises(BlockingIOError):
            held(tmp_path, wait=False)
        looked.append(key)
        return listed

    monkeypatch.setattr("storage.local._entry", entry)
    assert store.delete("blobs/a", unless_changed=listed)
    assert looked == ["blobs/a"]
    store.close()


def test_a_store_whose_scratch_a_cleaner_removed_works_on(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for removed in (store.scratch.path, tmp_path / ".scratch"):
        shutil.rmtree(removed)
        store.put("names/a", b"one")
    store.close()
    assert files(tmp_path) == ["names/a"]


def emptied(root: Path) -> None:
    for path in root.glob("[!.]*"):  # as a shell's * has it
        path.unlink() if path.is_file() else shutil.rmtree(path)


def removed(root: Path) -> None:
    shutil.rmtree(root)
    root.mkdir()


def replaced(root: Path) -> None:
    root.rename(root.with_name("elsewhere"))
    another = LocalStore(root)
    another.put("names/b", b"theirs")
    another.close()


@pytest.mark.parametrize("how", [emptied, removed, replaced])
def test_a_directory_emptied_or_replaced_under_a_store_is_no_empty_store(
    tmp_path: Path, how: Callable[[Path], None]
) -> None:
    root = tmp_path / "data"
    store = LocalStore(root)
    store.put("names/a", b"one")
    how(root)
    before = files(root)
    for call in (
        lambda: store.list("names/"),
        lambda: store.put("names/c", b"three"),
        lambda: store.put("names/a", b"two", if_none_match=True),
        lambda: store.touch("names/b"),
        lambda: store.delete("names/b"),
    ):
        with pytest.raises(StoreLost, match="was emptied or replaced while it was in use"):
            call()
    assert files(root) == before
    another = LocalStore(root)
    another.put("names/d", b"new")
    with pytest.raises(StoreLost):
        store.list()
    assert "names/d" in [entry.key for entry in another.list()]
    another.close()
    store.close()


def test_a_directory_whose_files_are_brought_back_is_the_same_store(tmp_path: Path) -> None:
    root, backup = tmp_path / "data", tmp_path / "backup"
    store = LocalStore(root)
    store.put("names/a", b"one")
    shutil.copytree(root, backup)
    removed(root)
    with pytest.raises(StoreLost):
        store.list()
    shutil.copytree(backup, root, dirs_exist_ok=True)
    assert [entry.key for entry in store.list()] == ["names/a"]
    store.put("names/b", b"two")
    store.close()
