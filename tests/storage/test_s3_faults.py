"""S3 when it is slow, broken, refusing, lying or changing: a named error in bounded time, and no file left."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from storage.s3 import S3Store
from storage.store import (
    AccessDenied,
    NotFound,
    ObjectChanged,
    ObjectTooLarge,
    PreconditionFailed,
    StoreError,
    StoreFull,
    StoreUnavailable,
)
from tests.storage.buckets import new_bucket
from tests.storage.conftest import S3_ENDPOINT
from tests.storage.faulty_s3 import Answer, FaultyS3, Request, cut, lost, preceded_by, stated, status, write

PART = 64 << 10
BIG = bytes(range(256)) * 1000  # four parts, the last one short
ATTEMPTS = 2
AT_MOST_SECONDS = 20.0

# Every call that there is, on an object that exists.
CALLS: dict[str, Callable[[S3Store, Path], object]] = {
    "get": lambda store, path: store.get("names/a"),
    "fetch": lambda store, path: store.fetch("names/a", path),
    "put": lambda store, path: store.put("names/a", b"two"),
    "list": lambda store, path: store.list(),
    "touch": lambda store, path: store.touch("names/a"),
    "delete": lambda store, path: store.delete("names/a"),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


def opened(proxy: FaultyS3, bucket: str, patience_seconds: float) -> S3Store:
    """A store behind the proxy that reads in small parts."""
    return S3Store(
        bucket,
        endpoint=proxy.endpoint,
        connect_timeout_seconds=patience_seconds,
        read_timeout_seconds=patience_seconds,
        attempts=ATTEMPTS,
        part_bytes=PART,
        split_after_seconds=0.0,
    )


@pytest.fixture(scope="module")
def proxied(s3_server: str, s3_client: Any, aws_environment: None) -> Iterator[tuple[FaultyS3, S3Store, str]]:
    """A proxy, a store behind it, and its bucket. The store waits for a machine that is busy."""
    with FaultyS3(s3_server).running() as proxy, new_bucket(s3_client) as bucket:
        patient = opened(proxy, bucket, 5.0)
        yield proxy, patient, bucket
        patient.close()


@pytest.fixture
def bucket(proxied: tuple[FaultyS3, S3Store, str], s3_client: Any) -> str:
    """The store's bucket, with two objects and no other."""
    name = proxied[2]
    s3_client.put_object(Bucket=name, Key="names/a", Body=b"one")
    s3_client.put_object(Bucket=name, Key="blobs/big", Body=BIG)
    s3_client.delete_object(Bucket=name, Key="names/b")
    return name


@pytest.fixture
def s3(proxied: tuple[FaultyS3, S3Store, str]) -> Iterator[FaultyS3]:
    proxy = proxied[0]
    proxy.requests.clear()
    yield proxy
    proxy.faults, proxy.always = [], None
    proxy.methods = {"GET", "PUT", "POST", "DELETE", "HEAD"}


@pytest.fixture
def store(proxied: tuple[FaultyS3, S3Store, str], bucket: str) -> S3Store:
    return proxied[1]


@pytest.fixture
def impatient(proxied: tuple[FaultyS3, S3Store, str], bucket: str) -> Iterator[S3Store]:
    """A store for servers that stall."""
    store = opened(proxied[0], bucket, 0.5)
    yield store
    store.close()


@pytest.fixture(autouse=True)
def in_bounded_time() -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < AT_MOST_SECONDS


def fails(call: Callable[[S3Store, Path], object], store: S3Store, path: Path, kind: type[StoreError]) -> str:
    """Run a call that must fail, leave no file, and give nothing away; return what it says."""
    with pytest.raises(kind) as caught:
        call(store, path / "destination")
    assert type(caught.value) is kind
    assert list(path.iterdir()) == []
    assert "secret" not in str(caught.value)
    return str(caught.value)


@every_call
def test_a_server_that_recovers_is_asked_again(
    s3: FaultyS3, store: S3Store, tmp_path: Path, call: Callable[[S3Store, Path], object]
) -> None:
    s3.faults = [status(503, "SlowDown")]
    call(store, tmp_path / "destination")
    assert len(s3.requests) == 2


@every_call
def test_a_server_that_does_not_recover_is_given_up(
    s3: FaultyS3, store: S3Store, tmp_path: Path, call: Callable[[S3Store, Path], object]
) -> None:
    s3.always = status(500, "InternalError")
    assert "500 InternalError" in fails(call, store, tmp_path, StoreUnavailable)
    assert len(s3.requests) == ATTEMPTS


@every_call
def test_a_refusal_is_final(
    s3: FaultyS3, store: S3Store, tmp_path: Path, call: Callable[[S3Store, Path], object]
) -> None:
    s3.always = status(403, "AccessDenied")
    assert "s3://rootstock-" in fails(call, store, tmp_path, AccessDenied)
    assert len(s3.requests) == 1


@every_call
def test_a_server_that_says_nothing_is_given_up(
    s3: FaultyS3, impatient: S3Store, tmp_path: Path, call: Callable[[S3Store, Path], object]
) -> None:
    s3.always = lambda request, forward: s3.stall()
    fails(call, impatient, tmp_path, StoreUnavailable)
    assert len(s3.requests) == ATTEMPTS


@every_call
def test_a_bucket_that_is_not_there_is_named(
    s3: FaultyS3, store: S3Store, tmp_path: Path, call: Callable[[S3Store, Path], object]
) -> None:
    other = S3Store("no-such-bucket", endpoint=s3.endpoint)
    assert "no bucket 'no-such-bucket'" in fails(call, other, tmp_path, NotFound)
    other.close()


@every_call
def test_nobody_at_the_address_is_unavailable(
    aws_environment: None, tmp_path: Path, call: Callable[[S3Store, Path], object]
) -> None:
    nobody = S3Store("bucket", endpoint="http://127.0.0.1:9", attempts=ATTEMPTS)
    fails(call, nobody, tmp_path, StoreUnavailable)
    nobody.close()


def test_missing_credentials_are_said_to_be_missing(
    s3_server: str, aws_environment: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    store = S3Store("bucket", endpoint=s3_server)
    for call in CALLS.values():
        assert "AWS_ACCESS_KEY_ID" in fails(call, store, tmp_path, AccessDenied)
    store.close()


@pytest.mark.parametrize("code", ["ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch"])
def test_bad_credentials_are_a_refusal_whatever_their_status(
    s3: FaultyS3, store: S3Store, tmp_path: Path, code: str
) -> None:
    s3.always = status(400, code)
    assert code in fails(CALLS["get"], store, tmp_path, AccessDenied)


def test_a_full_bucket_is_full(s3: FaultyS3, store: S3Store, tmp_path: Path) -> None:
    s3.always = status(507, "XMinioStorageFull")
    fails(CALLS["put"], store, tmp_path, StoreFull)


@pytest.mark.parametrize("code", [409, 412])
def test_a_conditional_put_that_meets_another_is_refused(s3: FaultyS3, store: S3Store, code: int) -> None:
    s3.always = status(code, "ConditionalRequestConflict" if code == 409 else "PreconditionFailed")
    with pytest.raises(PreconditionFailed, match="names/a"):
        store.put("names/a", b"two", if_none_match=True)


def test_a_conditional_put_whose_answer_was_lost_is_known_to_be_done(s3: FaultyS3, store: S3Store) -> None:
    seen = store.get("names/a").etag
    s3.faults = [lost]
    etag = store.put("names/a", b"two", if_match=seen)
    assert store.get("names/a") == (b"two", etag)
    s3.faults = [lost]
    assert store.put("names/b", b"new", if_none_match=True) == store.get("names/b").etag


def test_a_conditional_put_refused_after_a_retry_by_another_writer_stays_refused(
    s3: FaultyS3, store: S3Store, s3_client: Any, bucket: str
) -> None:
    theirs = {"Bucket": bucket, "Key": "names/b", "Body": b"theirs"}
    s3.faults = [status(503), preceded_by(lambda: s3_client.put_object(**theirs))]
    with pytest.raises(PreconditionFailed):
        store.put("names/b", b"ours", if_none_match=True)
    assert store.get("names/b").content == b"theirs"


@pytest.mark.parametrize("key", ["names/a", "blobs/big"])
def test_a_body_that_breaks_off_is_taken_up_again(s3: FaultyS3, store: S3Store, tmp_path: Path, key: str) -> None:
    content = store.get(key).content
    seen: list[tuple[int, int]] = []
    s3.faults = [cut(0.5)]

    store.fetch(key, tmp_path / "destination", on_progress=lambda *now: seen.append(now))
    assert (tmp_path / "destination").read_bytes() == content
    assert seen == sorted(seen)
    assert seen[-1] == (len(content), len(content))
    s3.faults = [cut(0.5)]
    assert store.get(key).content == content


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_bodies_that_always_break_off_are_given_up(s3: FaultyS3, store: S3Store, tmp_path: Path, share: float) -> None:
    s3.always = cut(share)
    assert "broke off 2 times" in fails(
        lambda store, path: store.fetch("blobs/big", path), store, tmp_path, StoreUnavailable
    )
    assert len(s3.requests) <= 4 * ATTEMPTS
    s3.requests.clear()
    fails(lambda store, path: store.get("blobs/big"), store, tmp_path, StoreUnavailable)
    assert len(s3.requests) == ATTEMPTS


def test_a_body_that_stalls_is_given_up(s3: FaultyS3, impatient: S3Store, tmp_path: Path) -> None:
    def stalls(request: Request, forward: Callable[[], Answer]) -> None:
        whole = forward()
        write(request, whole, whole.body[: len(whole.body) // 2])
        request.wfile.flush()
        s3.stall()

    s3.always = stalls
    fails(lambda store, path: store.fetch("blobs/big", path), impatient, tmp_path, StoreUnavailable)
    fails(lambda store, path: store.get("blobs/big"), impatient, tmp_path, StoreUnavailable)


@pytest.mark.parametrize("length", ["10", "65535", "65537", "10000000"])
@pytest.mark.parametrize("part", [0, 1])
def test_a_length_that_is_a_lie_is_not_believed(
    s3: FaultyS3, store: S3Store, tmp_path: Path, length: str, part: int
) -> None:
    s3.faults = [stated()] * part + [stated(Content_Length=length)] * 20
    said = fails(lambda store, path: store.fetch("blobs/big", path), store, tmp_path, StoreError)
    assert f"stated {length} bytes" in said
    s3.faults = [stated(Content_Length=length)]
    assert f"stated {length} bytes" in fails(lambda store, path: store.get("blobs/big"), store, tmp_path, StoreError)


@pytest.mark.parametrize("range_", ["bytes 0-65535/1000000", "bytes 1-65536/256000", "bytes 0-9/10", "nonsense"])
def test_a_range_that_was_not_asked_for_is_not_believed(
    s3: FaultyS3, store: S3Store, tmp_path: Path, range_: str
) -> None:
    s3.always = stated(Content_Range=range_)
    fails(lambda store, path: store.fetch("blobs/big", path), store, tmp_path, StoreError)


def test_a_server_without_etags_cannot_be_read_from(s3: FaultyS3, store: S3Store, tmp_path: Path) -> None:
    s3.always = stated(ETag="")
    for call in (CALLS["get"], CALLS["fetch"]):
        assert "no ETag" in fails(call, store, tmp_path, StoreError)


def test_a_large_object_is_refused_before_it_is_read(s3: FaultyS3, store: S3Store, tmp_path: Path) -> None:
    seen: list[int] = []
    said = fails(
        lambda store, path: store.fetch("blobs/big", path, max_bytes=1000, on_progress=lambda *_: seen.append(1)),
        store,
        tmp_path,
        ObjectTooLarge,
    )
    assert "256000 bytes; at most 1000" in said
    assert (len(s3.requests), seen) == (1, [])


def test_an_object_that_changes_while_it_is_read_is_read_again(
    s3: FaultyS3, store: S3Store, tmp_path: Path, s3_client: Any, bucket: str
) -> None:
    other = BIG[::-1]
    s3.faults = [stated(), preceded_by(lambda: s3_client.put_object(Bucket=bucket, Key="blobs/big", Body=other))]

    etag = store.fetch("blobs/big", tmp_path / "destination")
    assert (tmp_path / "destination").read_bytes() == other
    assert etag == store.get("blobs/big").etag


def test_an_object_that_never_stays_the_same_is_given_up(
    s3: FaultyS3, store: S3Store, tmp_path: Path, s3_client: Any, bucket: str
) -> None:
    numbers = iter(range(1000))

    def change() -> None:
        s3_client.put_object(Bucket=bucket, Key="blobs/big", Body=next(numbers).to_bytes(2, "big") + BIG)

    s3.always = preceded_by(change)
    fails(lambda store, path: store.fetch("blobs/big", path), store, tmp_path, ObjectChanged)


def test_what_a_list_said_can_be_told_from_what_came_after(store: S3Store, s3_client: Any, bucket: str) -> None:
    listed = {entry.key: entry.revision for entry in store.list()}
    assert store.get("names/a").etag == listed["names/a"]
    s3_client.put_object(Bucket=bucket, Key="names/a", Body=b"two")

    assert store.get("names/a").etag != listed["names/a"]
    with pytest.raises(PreconditionFailed):
        store.put("names/a", b"three", if_match=listed["names/a"])


def test_an_object_that_goes_while_it_is_read_is_not_found(
    s3: FaultyS3, store: S3Store, tmp_path: Path, s3_client: Any, bucket: str
) -> None:
    s3.faults = [stated(), preceded_by(lambda: s3_client.delete_object(Bucket=bucket, Key="blobs/big"))]
    fails(lambda store, path: store.fetch("blobs/big", path), store, tmp_path, NotFound)


def test_a_server_that_ignores_conditions_is_found_out_by_the_etag(
    s3: FaultyS3, store: S3Store, tmp_path: Path
) -> None:
    s3.faults = [stated(), *[stated(ETag='"another"')] * 3, *[stated(), *[stated(ETag='"another"')] * 3] * 2]
    s3.always = stated(ETag='"a third"')
    fails(lambda store, path: store.fetch("blobs/big", path), store, tmp_path, ObjectChanged)


@pytest.mark.skipif(S3_ENDPOINT in os.environ, reason="a server may ignore conditions of a DELETE: Ceph's gateway does")
def test_a_delete_on_condition_spares_what_is_replaced_in_the_last_moment(
    s3: FaultyS3, store: S3Store, s3_client: Any, bucket: str
) -> None:
    listed = store.list("names/a")[0]
    s3.methods = {"DELETE"}
    s3.faults = [preceded_by(lambda: s3_client.put_object(Bucket=bucket, Key="names/a", Body=b"two"))]
    assert not store.delete("names/a", unless_changed=listed)
    assert store.get("names/a").content == b"two"


@pytest.mark.parametrize(("code", "name"), [(501, "NotImplemented"), (400, "InvalidArgument")])
def test_a_server_without_conditional_deletes_is_asked_once(
    s3: FaultyS3, bucket: str, aws_environment: None, code: int, name: str
) -> None:
    store = S3Store(bucket, endpoint=s3.endpoint)
    s3.methods, s3.faults = {"DELETE"}, [status(code, name)]
    for expected in (2, 1):
        store.put("names/a", b"one")
        listed = store.list("names/a")[0]
        s3.requests.clear()
        assert store.delete("names/a", unless_changed=listed)
        assert [method for method, _ in s3.requests].count("DELETE") == expected
        assert store.list("names/") == []
    store.close()


def test_a_conditional_delete_that_is_refused_otherwise_is_an_error(s3: FaultyS3, store: S3Store) -> None:
    listed = store.list("names/a")[0]
    s3.methods = {"DELETE"}
    for code, name, kind in ((403, "AccessDenied", AccessDenied), (400, "ExpiredToken", AccessDenied)):
        s3.always = status(code, name)
        with pytest.raises(kind):
            store.delete("names/a", unless_changed=listed)


def test_a_list_that_breaks_off_is_not_taken_for_the_whole(s3: FaultyS3, store: S3Store) -> None:
    page = b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>"
    s3.always = lambda request, forward: write(request, Answer(200, {"Content-Type": "application/xml"}, page), page)
    with pytest.raises(StoreError, match="ended its list"):
        store.list()


def test_an_answer_that_is_no_s3_is_a_clear_error(s3: FaultyS3, store: S3Store, tmp_path: Path) -> None:
    def page(request: Request, forward: Callable[[], Answer]) -> None:
        write(request, Answer(200, {"Content-Type": "text/html"}, b"<html>hello"), b"<html>hello")

    s3.always = page
    fails(CALLS["list"], store, tmp_path, StoreUnavailable)
