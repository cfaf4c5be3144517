"""Conditional writes: servers that compare them in their own way, and those that ignore them."""

import os
from collections.abc import Iterator

import pytest

from storage.conditions import require_conditions
from storage.s3 import S3Store
from storage.store import PreconditionFailed, Store, StoreError
from tests.storage.conftest import S3_ENDPOINT
from tests.storage.faulty_s3 import FaultyS3, compares_quotes, ignores, status

changes_requests = pytest.mark.skipif(
    S3_ENDPOINT in os.environ, reason="a server that checks signatures refuses requests that a proxy has changed"
)


@pytest.fixture
def proxy(s3_server: str) -> Iterator[FaultyS3]:
    with FaultyS3(s3_server).running() as proxy:
        proxy.methods = {"PUT"}
        yield proxy


@pytest.fixture
def behind(proxy: FaultyS3, bucket: str) -> Iterator[S3Store]:
    store = S3Store(bucket, endpoint=proxy.endpoint)
    yield store
    store.close()


def test_a_store_that_keeps_conditions_is_left_as_it_was(store: Store) -> None:
    require_conditions(store)
    assert store.list() == []


@changes_requests
@pytest.mark.parametrize("headers", [("If-Match",), ("If-None-Match",), ("If-Match", "If-None-Match")])
def test_a_store_that_ignores_conditions_is_refused(proxy: FaultyS3, behind: S3Store, headers: tuple[str, ...]) -> None:
    proxy.always = ignores(*headers)
    with pytest.raises(StoreError, match=f"ignores {' and '.join(sorted(headers, reverse=True))} of a PUT"):
        require_conditions(behind)
    assert behind.list() == []


@changes_requests
def test_an_etag_is_sent_without_quotes_to_a_server_that_compares_them(proxy: FaultyS3, behind: S3Store) -> None:
    proxy.always = compares_quotes
    first = behind.put("names/a", b"one")
    second = behind.put("names/a", b"two", if_match=first)
    with pytest.raises(PreconditionFailed):
        behind.put("names/a", b"three", if_match=first)
    proxy.requests.clear()
    behind.put("names/a", b"four", if_match=second)
    assert [method for method, _ in proxy.requests] == ["PUT"]  # it is remembered
    assert behind.get("names/a").content == b"four"


def test_who_loses_a_race_is_told_so_by_a_server_that_answers_500(proxy: FaultyS3, behind: S3Store) -> None:
    first = behind.put("names/a", b"one")
    behind.put("names/a", b"two")
    proxy.always = status(500)
    for conditions in ({"if_match": first}, {"if_none_match": True}):
        with pytest.raises(PreconditionFailed, match="another writer"):
            behind.put("names/a", b"three", **conditions)
    assert behind.put("names/a", b"two", if_match=first) == behind.get("names/a").etag  # this one has won
