"""What every store must do: the same programs over each."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage import local, s3
from storage.store import InvalidKey, NotFound, ObjectTooLarge, PreconditionFailed, Store


def test_what_was_put_is_got_back_with_its_etag(store: Store) -> None:
    etag = store.put("names/a.json", b"one")

    assert store.get("names/a.json") == (b"one", etag)


def test_an_empty_object_is_an_object(store: Store) -> None:
    store.put("names/empty", b"")

    assert store.get("names/empty").content == b""
    assert [entry[:2] for entry in store.list("names/")] == [("names/empty", 0)]


def test_an_object_is_read_into_memory_or_a_file_with_one_etag(store: Store, tmp_path: Path) -> None:
    etag = store.put("names/a", b"one")

    assert store.get("names/a") == (b"one", etag)
    assert store.fetch("names/a", tmp_path / "file") == etag


def test_an_object_too_large_for_memory_is_for_fetch(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("big", bytes(1001))
    for module in (local, s3):
        monkeypatch.setattr(module, "MAX_GET_BYTES", 1000)

    with pytest.raises(ObjectTooLarge):
        store.get("big")
    store.fetch("big", tmp_path / "file")


def test_what_is_not_there_is_not_found(store: Store) -> None:
    with pytest.raises(NotFound, match="names/a"):
        store.get("names/a")


def test_a_list_is_sorted_and_takes_its_prefix_literally(store: Store) -> None:
    for key in ("names/b", "names/a", "names/ab/c", "blobs/a", "namesake"):
        store.put(key, b"xyz")

    def keys(prefix: str) -> list[str]:
        return [entry.key for entry in store.list(prefix)]

    assert keys("names/") == ["names/a", "names/ab/c", "names/b"]
    assert keys("names/a") == ["names/a", "names/ab/c"]
    assert keys("names") == ["names/a", "names/ab/c", "names/b", "namesake"]
    assert keys("") == ["blobs/a", "names/a", "names/ab/c", "names/b", "namesake"]
    assert keys("nothing/here/") == []
    assert [entry[:2] for entry in store.list("blobs/")] == [("blobs/a", 3)]


def test_a_revision_stays_while_the_object_does(store: Store) -> None:
    store.put("a", b"one")
    store.put("b", b"two")

    (first, other), (again, _) = store.list(), store.list()
    assert first.revision == again.revision != other.revision


def test_a_later_put_replaces_the_object_and_changes_its_etag(store: Store) -> None:
    first = store.put("names/a.json", b"one")
    second = store.put("names/a.json", b"two")

    assert first != second
    assert store.get("names/a.json") == (b"two", second)


def test_a_put_changes_the_revision_and_the_time_in_the_list(store: Store) -> None:
    before = int(time.time())  # S3 counts whole seconds
    store.put("names/a.json", b"one")
    (first,) = store.list()
    store.put("names/a.json", b"two")
    (second,) = store.list()

    assert first.revision != second.revision
    assert before <= first.modified_at <= second.modified_at <= time.time() + 1


def test_a_touch_makes_an_object_young_and_leaves_its_content(store: Store) -> None:
    store.put("blobs/a", b"one")
    before = int(time.time())

    assert store.touch("blobs/a")
    assert store.list()[0].modified_at >= before
    assert store.get("blobs/a").content == b"one"


def test_there_is_nothing_to_touch_where_nothing_is(store: Store) -> None:
    store.put("blobs/a", b"one")

    assert not store.touch("blobs/b")
    assert not store.touch("blobs")
    assert [entry.key for entry in store.list()] == ["blobs/a"]


def test_a_folder_is_no_object(store: Store) -> None:
    store.put("blobs/a", b"one")

    with pytest.raises(NotFound):
        store.get("blobs")
    store.delete("blobs")
    with pytest.raises(NotFound):
        store.get("blobs/a/b")
    assert not store.touch("blobs/a/b")
    assert store.get("blobs/a").content == b"one"


def test_a_file_goes_in_and_comes_out(store: Store, tmp_path: Path) -> None:
    content = bytes(range(256)) * 20_000  # more than one chunk
    source, destination = tmp_path / "source", tmp_path / "destination"
    source.write_bytes(content)

    etag = store.put("blobs/big", source)

    assert store.fetch("blobs/big", destination) == etag
    assert destination.read_bytes() == content
    assert source.read_bytes() == content


def test_a_deleted_object_is_gone_and_deleting_again_is_fine(store: Store) -> None:
    store.put("names/a", b"one")

    store.delete("names/a")
    store.delete("names/a")

    assert store.list() == []
    with pytest.raises(NotFound):
        store.get("names/a")


def test_a_delete_on_condition_spares_what_changed_since_it_was_listed(store: Store) -> None:
    store.put("blobs/a", b"one")
    store.put("blobs/ab", b"another")
    (listed, other) = store.list()
    older = listed._replace(modified_at=listed.modified_at - 100)  # S3 counts whole seconds

    assert not store.delete("blobs/a", unless_changed=older)
    assert not store.delete("blobs/a", unless_changed=listed._replace(revision='"another"'))
    assert not store.delete("blobs/a", unless_changed=other)
    assert not store.delete("blobs", unless_changed=listed)
    assert store.list() == [listed, other]
    assert store.delete("blobs/a", unless_changed=listed)
    assert not store.delete("blobs/a", unless_changed=listed)
    assert store.list() == [other]


def test_if_none_match_puts_only_what_is_new(store: Store) -> None:
    store.put("names/a", b"one", if_none_match=True)

    with pytest.raises(PreconditionFailed, match="names/a"):
        store.put("names/a", b"two", if_none_match=True)
    assert store.get("names/a").content == b"one"


def test_if_match_puts_only_over_what_was_seen(store: Store) -> None:
    with pytest.raises(PreconditionFailed):
        store.put("names/a", b"zero", if_match="anything")
    seen = store.put("names/a", b"one")
    changed = store.put("names/a", b"two")

    with pytest.raises(PreconditionFailed, match="names/a"):
        store.put("names/a", b"three", if_match=seen)
    assert store.get("names/a").content == b"two"

    store.put("names/a", b"three", if_match=changed)
    assert store.get("names/a").content == b"three"


def test_of_many_writers_with_one_etag_exactly_one_wins(store: Store) -> None:
    def put(content: bytes, seen: str) -> bytes | None:
        start.wait()
        try:
            store.put("names/a", content, if_match=seen)
        except PreconditionFailed:
            return None
        return content

    start = threading.Barrier(8)
    seen = store.put("names/a", b"start")
    with ThreadPoolExecutor(8) as threads:
        for turn in range(25):
            contents = [f"writer {number} of turn {turn}".encode() for number in range(8)]
            won = [content for content in threads.map(put, contents, [seen] * 8) if content is not None]
            assert len(won) == 1
            content, seen = store.get("names/a")
            assert content == won[0]


@pytest.mark.parametrize(
    "key",
    [
        *("", "/", "/etc/passwd", "../a", "a/../b", "a/..", "a//b", "a/", ".hidden", "a/.b"),
        *("a\\b", "a\0b", "a\nb", "é", "a?b", "a%2e"),
    ],
)
def test_a_key_that_could_mean_something_else_is_refused(store: Store, tmp_path: Path, key: str) -> None:
    with pytest.raises(InvalidKey):
        store.put(key, b"x")
    with pytest.raises(InvalidKey):
        store.get(key)
    with pytest.raises(InvalidKey):
        store.fetch(key, tmp_path / "destination")
    with pytest.raises(InvalidKey):
        store.delete(key)
    with pytest.raises(InvalidKey):
        store.touch(key)
    assert store.list() == []


@pytest.mark.parametrize("prefix", ["../", "/etc/", "a/../../", "/../", "..//../", "a//b/../", "a?b/../", "a%2e/../"])
def test_a_prefix_cannot_leave_the_store(store: Store, prefix: str) -> None:
    with pytest.raises(InvalidKey):
        store.list(prefix)
