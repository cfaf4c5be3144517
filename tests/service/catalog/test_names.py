"""The keys of names in a store: every name has one, no two share one, and old ones stay."""

import logging
import re
from itertools import product
from pathlib import Path

import pytest

from service.catalog.names import AdapterNames, _key, _name
from service.catalog.record import NAME_PATTERN
from storage.local import LocalStore
from storage.store import StoreLost, is_key

NAMES = ["org/name", "model@7", "team:poet", "a_b/c_s.json", "a/b@c:d", "escaped/x", "escaped:x", "a/load"]


def test_a_name_of_one_word_keeps_its_key() -> None:
    assert _key("poet-2.1_x") == "names/poet-2.1_x.json"
    assert _key("escaped") == "names/escaped.json"


def test_no_two_names_share_a_key_and_each_is_read_back() -> None:
    parts = ("a", "_", "s", ".json", "/", "@", ":")
    every = {"".join(found) for length in (1, 2, 3, 4, 5) for found in product(parts, repeat=length)}
    names = [name for name in every if re.search(NAME_PATTERN, name)]
    assert len(names) > 1000
    keys = {_key(name): name for name in names}
    assert len(keys) == len(names)
    assert all(is_key(key) and _name(key) == name for key, name in keys.items())


@pytest.mark.parametrize("name", ["a" * 128, f"a{'_' * 125}/b", ":".join("a" * 64) + "b", f"a/{'b_' * 63}"])
def test_the_longest_names_have_keys_too(name: str) -> None:
    assert len(name) == 128
    assert re.search(NAME_PATTERN, name)
    assert is_key(_key(name))


@pytest.mark.parametrize(
    "name",
    ["", "a" * 129, "/a", "a/", "a//b", "a/../b", "a/.b", "@a", "a@", "a:@b", "a b", "a\n", "a/b\n", "a,b", "ä/b"],
)
def test_what_is_no_name_matches_nothing(name: str) -> None:
    assert re.search(NAME_PATTERN, name) is None


def test_objects_that_are_no_names_are_passed_over() -> None:
    assert _name("names/readme.txt") is None


def test_changed_tells_names_as_they_are(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for name in ("poet", *NAMES):
        store.put(_key(name), b"")
    assert AdapterNames(store).changed() == sorted(("poet", *NAMES))
    store.close()


def test_a_name_whose_object_was_removed_by_hand_is_gone_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = LocalStore(tmp_path)
    names = AdapterNames(store)
    for name in ("poet", "vault"):
        store.put(_key(name), b"")
    names.changed()
    store.delete(_key("poet"))
    assert names.changed() == ["poet"]
    assert [(each.levelno, each.args) for each in caplog.records] == [(logging.ERROR, ("poet",))]
    store.close()


def test_names_that_are_all_gone_at_once_are_lost_until_they_are_back(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    names = AdapterNames(store)
    for name in ("poet", "vault"):
        store.put(_key(name), b"")
    names.changed()
    for name in ("poet", "vault"):
        store.delete(_key(name))
    store.put(_key("stranger"), b"")
    for call in (names.changed, names.changed, lambda: names.bury("new")):
        with pytest.raises(StoreLost, match="all 2 names are gone"):
            call()
    for name in ("poet", "vault"):
        store.put(_key(name), b"")
    assert names.changed() == ["poet", "stranger", "vault"]
    names.bury("new")
    store.close()
