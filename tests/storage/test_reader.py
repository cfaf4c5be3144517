"""What everything that is read from must do, the hub too: the same programs over each."""

from collections.abc import Callable
from pathlib import Path

import pytest

from storage import local, s3
from storage.store import InvalidKey, NotFound, ObjectTooLarge, Reader

Of = Callable[[dict[str, bytes]], Reader]
BIG = bytes(range(256)) * 40_000


def test_an_object_is_read_into_memory_or_a_file_with_one_etag(reader_of: Of, tmp_path: Path) -> None:
    reader = reader_of({"names/a": b"one", "big": BIG})

    content, etag = reader.get("names/a")
    assert content == b"one"
    assert reader.fetch("names/a", tmp_path / "small") == etag
    assert (tmp_path / "small").read_bytes() == b"one"
    assert reader.fetch("big", tmp_path / "big") == reader.get("big").etag != etag
    assert (tmp_path / "big").read_bytes() == BIG


def test_an_empty_object_is_read_like_any_other(reader_of: Of, tmp_path: Path) -> None:
    reader = reader_of({"empty": b""})
    seen = []

    reader.fetch("empty", tmp_path / "file", max_bytes=0, on_progress=lambda *now: seen.append(now))
    assert reader.get("empty").content == (tmp_path / "file").read_bytes() == b""
    assert set(seen) <= {(0, 0)}


def test_a_fetch_replaces_the_file_that_was_there(reader_of: Of, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"something longer than that")

    reader_of({"a": b"one"}).fetch("a", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"one"


def test_progress_is_told_in_order_and_to_the_end(reader_of: Of, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    reader_of({"big": BIG}).fetch("big", tmp_path / "file", on_progress=lambda *now: seen.append(now))
    assert len(seen) > 2
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {len(BIG)}
    assert seen[-1][0] == len(BIG)


def test_an_object_with_more_bytes_than_asked_for_is_refused(reader_of: Of, tmp_path: Path) -> None:
    reader = reader_of({"big": BIG, "a": b"one"})
    before = sorted(tmp_path.iterdir())

    for key, size in (("big", len(BIG)), ("a", 3)):
        with pytest.raises(ObjectTooLarge, match=f"{key}.*{size} bytes; at most {size - 1}"):
            reader.fetch(key, tmp_path / "file", max_bytes=size - 1)
        assert sorted(tmp_path.iterdir()) == before
        reader.fetch(key, tmp_path / "file", max_bytes=size)
        (tmp_path / "file").unlink()


def test_an_object_too_large_for_memory_is_for_fetch(
    reader_of: Of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = reader_of({"big": BIG})
    for module in (local, s3, "storage.huggingface"):
        monkeypatch.setattr(f"{getattr(module, '__name__', module)}.MAX_GET_BYTES", 1000)

    with pytest.raises(ObjectTooLarge):
        reader.get("big")
    reader.fetch("big", tmp_path / "file")


def test_what_is_not_there_is_not_found_and_leaves_no_file(reader_of: Of, tmp_path: Path) -> None:
    reader = reader_of({"a": b"one"})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(NotFound, match="names/a"):
        reader.get("names/a")
    with pytest.raises(NotFound, match="names/a"):
        reader.fetch("names/a", tmp_path / "destination")
    assert sorted(tmp_path.iterdir()) == before


def test_a_list_is_sorted_and_takes_its_prefix_literally(reader_of: Of) -> None:
    reader = reader_of(dict.fromkeys(("names/b", "names/a", "names/ab/c", "blobs/a", "namesake"), b"xyz"))

    def keys(prefix: str) -> list[str]:
        return [entry.key for entry in reader.list(prefix)]

    assert keys("names/") == ["names/a", "names/ab/c", "names/b"]
    assert keys("names/a") == ["names/a", "names/ab/c"]
    assert keys("names") == ["names/a", "names/ab/c", "names/b", "namesake"]
    assert keys("") == ["blobs/a", "names/a", "names/ab/c", "names/b", "namesake"]
    assert keys("nothing/here/") == []
    assert [entry[:2] for entry in reader.list("blobs/")] == [("blobs/a", 3)]


def test_a_revision_stays_while_the_object_does(reader_of: Of) -> None:
    reader = reader_of({"a": b"one", "b": b"two"})

    (first, other), (again, _) = reader.list(), reader.list()
    assert first.revision == again.revision != other.revision


@pytest.mark.parametrize("key", ["", "../a", "/etc/passwd", "a//b", "a?b", "a%2e"])
def test_what_is_no_key_is_refused(reader_of: Of, tmp_path: Path, key: str) -> None:
    reader = reader_of({"a": b"one"})
    with pytest.raises(InvalidKey):
        reader.get(key)
    with pytest.raises(InvalidKey):
        reader.fetch(key, tmp_path / "destination")
    with pytest.raises(InvalidKey):
        reader.list(f"{key}/../")
