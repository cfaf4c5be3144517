"""What every reader must do, the hub too: the same programs over each."""

from collections.abc import Callable
from pathlib import Path

import pytest

from storage.store import InvalidKey, NotFound, ObjectTooLarge, Reader

Of = Callable[[dict[str, bytes]], Reader]
BIG = bytes(range(256)) * 40_000


def test_an_object_is_read_into_a_file_with_one_etag(reader_of: Of, tmp_path: Path) -> None:
    reader = reader_of({"names/a": b"one", "big": BIG})

    etag = reader.fetch("names/a", tmp_path / "small")
    assert (tmp_path / "small").read_bytes() == b"one"
    assert reader.fetch("names/a", tmp_path / "small") == etag
    assert reader.fetch("big", tmp_path / "big") != etag
    assert (tmp_path / "big").read_bytes() == BIG


def test_an_empty_object_is_read_like_any_other(reader_of: Of, tmp_path: Path) -> None:
    reader = reader_of({"empty": b""})
    seen = []

    reader.fetch("empty", tmp_path / "file", max_bytes=0, on_progress=lambda *now: seen.append(now))
    assert (tmp_path / "file").read_bytes() == b""
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


def test_what_is_not_there_is_not_found_and_leaves_no_file(reader_of: Of, tmp_path: Path) -> None:
    reader = reader_of({"a": b"one"})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(NotFound, match="names/a"):
        reader.fetch("names/a", tmp_path / "destination")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("key", ["", "../a", "/etc/passwd", "a//b", "a?b", "a%2e"])
def test_what_is_no_key_is_refused(reader_of: Of, tmp_path: Path, key: str) -> None:
    reader = reader_of({"a": b"one"})
    with pytest.raises(InvalidKey):
        reader.fetch(key, tmp_path / "destination")
