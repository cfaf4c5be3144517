"""The collector: what it deletes, and what it must not, whoever uploads meanwhile."""

import errno
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from blake3 import blake3

from service.catalog.files import blob_key
from service.catalog.garbage import collect
from service.catalog.names import AdapterNames
from service.catalog.record import AdapterRecord
from service.collect import main
from storage.local import LocalStore
from storage.store import Entry, StoreError

OLD = 1000.0  # seconds
AGE = 60.0


def digest(number: int) -> str:
    return blake3(str(number).encode()).hexdigest()


def put_file(store: LocalStore, number: int, age: float = OLD) -> str:
    key = blob_key(digest(number))
    store.put(key, str(number).encode())
    then = time.time() - age
    os.utime(store.path(key), (then, then))
    return key


def put_name(store: LocalStore, number: int) -> None:
    record = AdapterRecord(
        name=f"name-{number}",
        digest=digest(number),
        generation=1,
        kind="lora",
        rank=1,
        targets=[],
        bytes=1,
        source="upload",
        created_at=0.0,
        pinned=False,
        warnings=[],
        base="",
    )
    AdapterNames(store).write(record)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    opened = LocalStore(tmp_path)
    yield opened
    opened.close()


def test_only_what_is_old_and_without_a_name_is_deleted(store: LocalStore) -> None:
    for number in range(4):
        put_file(store, number, AGE / 2 if number == 3 else OLD)
    put_name(store, 0)

    assert collect(store, AGE, keep={digest(1)}, dry_run=True) == (1, 1)
    assert len(store.list("blobs/")) == 4
    assert collect(store, AGE, keep={digest(1)}) == (1, 1)
    assert {entry.key for entry in store.list("blobs/")} == {blob_key(digest(number)) for number in (0, 1, 3)}


@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO, errno.EMFILE])
def test_names_that_cannot_be_listed_protect_every_file(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    put_file(store, 0)
    put_name(store, 0)
    scandir = os.scandir

    def broken(path: Any) -> Any:
        if path == str(tmp_path / "names"):
            raise OSError(error, os.strerror(error))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", broken)
        with pytest.raises(StoreError, match=os.strerror(error)):
            collect(store, AGE)
        with pytest.raises(SystemExit, match="nothing more was deleted"):
            main(["--data-directory", str(tmp_path)], {})
    assert len(store.list("blobs/")) == 1


class Uploads(LocalStore):
    """A store in which somebody uploads a file again while the collector reads the names."""

    def __init__(self, root: Path, how: str) -> None:
        super().__init__(root)
        self._how = how

    def list(self, prefix: str = "") -> list[Entry]:
        found = super().list(prefix)
        if prefix == "names/":
            key = blob_key(digest(0))
            self.touch(key) if self._how == "touch" else self.put(key, b"0")
        return found


@pytest.mark.parametrize("how", ["touch", "put"])
def test_a_file_stored_again_between_the_list_and_its_deletion_stays(tmp_path: Path, how: str) -> None:
    store = Uploads(tmp_path, how)
    put_file(store, 0)
    put_file(store, 1)

    assert collect(store, AGE) == (1, 1)
    assert [entry.key for entry in store.list("blobs/")] == [blob_key(digest(0))]
    store.close()


class Skewed(LocalStore):
    """A store on another machine, whose clock is ahead of ours."""

    def __init__(self, root: Path, ahead: float) -> None:
        super().__init__(root)
        self._ahead = ahead

    def now(self) -> float:
        return super().now() + self._ahead

    def list(self, prefix: str = "") -> list[Entry]:
        return [entry._replace(modified_at=entry.modified_at + self._ahead) for entry in super().list(prefix)]

    def delete(self, key: str, *, unless_changed: Entry | None = None) -> bool:
        return unless_changed in self.list(key) and super().delete(key)


@pytest.mark.parametrize("ahead", [-3600.0, 3600.0])
def test_age_is_by_the_clock_of_the_store(tmp_path: Path, ahead: float) -> None:
    store = Skewed(tmp_path, ahead)
    put_file(store, 0, age=0)
    put_file(store, 1, age=OLD)

    assert collect(store, AGE) == (1, 1)
    assert [entry.key for entry in store.list("blobs/")] == [blob_key(digest(0))]
    store.close()


def test_uploads_beside_a_collector_that_never_rests_lose_no_file(store: LocalStore, tmp_path: Path) -> None:
    over = Event()

    def collect_all_the_time() -> int:
        deleted = 0
        with closing(LocalStore(tmp_path)) as another:
            while not over.is_set():
                deleted += collect(another, AGE).files
        return deleted

    def upload(number: int) -> list[Entry]:
        key = put_file(store, number)
        if not store.touch(key):
            store.put(key, str(number).encode())
        put_name(store, number)
        found = store.list(key)
        store.delete(f"names/name-{number}.json")  # so that the collector has little to read
        store.delete(key)
        return found

    with ThreadPoolExecutor(1) as collector, ThreadPoolExecutor(3) as threads:
        collecting = collector.submit(collect_all_the_time)
        try:
            kept = list(threads.map(upload, range(400)))
        finally:
            over.set()
        assert collecting.result(60) > 0
    assert [number for number, found in enumerate(kept) if not found] == []


@pytest.mark.parametrize("age", ["0", "59.9", "-1", "soon"])
def test_an_age_that_protects_no_upload_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], age: str
) -> None:
    with pytest.raises(SystemExit):
        main(["--data-directory", str(tmp_path), f"--older-than={age}"], {})
    assert "--older-than" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_it_did(store: LocalStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_file(store, 0)
    main(["--data-directory", str(tmp_path), "--older-than", "60", "--dry-run"], {})
    main(["--data-directory", str(tmp_path), "--older-than", "60"], {})
    assert capsys.readouterr().out == "would delete 1 files of 1 bytes\ndeleted 1 files of 1 bytes\n"


def test_a_store_that_cannot_be_read_ends_the_command_with_a_sentence(store: LocalStore, tmp_path: Path) -> None:
    put_file(store, 0)
    (tmp_path / "blobs" / "link.safetensors").symlink_to("link.safetensors")
    with pytest.raises(SystemExit, match="nothing more was deleted"):
        main(["--data-directory", str(tmp_path)], {})
    with pytest.raises(SystemExit, match="Not a directory"):
        main(["--data-directory", str(store.path(blob_key(digest(0))))], {})
