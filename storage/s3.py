"""A store in a bucket of S3, or of any server that speaks its protocol."""

import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from threading import Event, Lock
from typing import Any, BinaryIO, TypeVar

import boto3
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import ClientError
from s3transfer.exceptions import RetriesExceededError
from s3transfer.futures import NonThreadedExecutor
from s3transfer.manager import TransferConfig, TransferManager
from s3transfer.utils import S3_RETRYABLE_DOWNLOAD_ERRORS

from storage.files import CHUNK_BYTES, atomic_file, disk_errors
from storage.s3_errors import is_absent, is_not_offered, s3_errors, status_of, url
from storage.store import (
    MAX_GET_BYTES,
    Entry,
    NotFound,
    ObjectChanged,
    ObjectTooLarge,
    OnProgress,
    PreconditionFailed,
    Stored,
    StoreError,
    StoreUnavailable,
    checked_key,
    checked_prefix,
    is_key,
)

PART_BYTES = 8 << 20
# Half a part in this time (140 MB/s) shows a connection that more requests would only slow down. 4 MiB came from two
# servers on the loopback in 9 and 20 ms, and at 80 MB/s a connection in 47 ms (medians). 40 MiB came from moto on the
# loopback in 185 ms in one request and in 430 ms in parts, and at 80 MB/s a connection in 560 ms and in 170 ms (the
# least of twelve, on a busy machine). No real endpoint was measured.
SPLIT_AFTER_SECONDS = 0.03
_THREADS = 8  # parts in flight, for each transfer
_CONNECTIONS = 16 * _THREADS  # kept open; more transfers than 16 at once open and close connections
_VERSIONS_TRIED = 3  # a read starts again when its object is replaced under it, up to so many reads in all
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)", re.ASCII)

_Read = TypeVar("_Read")


class S3Store:
    """Objects below `prefix` in a bucket.

    Credentials, region and endpoint come from boto3's chain (environment, profile, role); `endpoint` overrides the
    last of them, and `unsigned` requests, for public buckets, carry no credentials. boto3 sends each request up to
    `attempts` times, with exponential backoff. Both timeouts count the seconds without an answer, not the length of a
    transfer. Files larger than `part_bytes` are transferred in parts of that size, several at a time; a download is not
    split if its first half part comes within `split_after_seconds`.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        endpoint: str | None = None,
        unsigned: bool = False,
        connect_timeout_seconds: float = 3.0,
        read_timeout_seconds: float = 10.0,
        attempts: int = 3,
        part_bytes: int = PART_BYTES,
        split_after_seconds: float = SPLIT_AFTER_SECONDS,
    ) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._attempts = attempts
        self._part_bytes = part_bytes
        self._split_after_seconds = split_after_seconds
        self._closed = Event()
        self._deletes_on_condition = True  # until the server answers that it does not implement that
        config = Config(
            connect_timeout=connect_timeout_seconds,
            read_timeout=read_timeout_seconds,
            retries={"mode": "standard", "total_max_attempts": attempts},
            signature_version=UNSIGNED if unsigned else None,
            max_pool_connections=_CONNECTIONS,
            request_checksum_calculation="when_required",  # other servers, and older MinIOs, refuse the newer checksums
            response_checksum_validation="when_supported",  # else s3transfer reads the first part alone
        )
        try:
            with s3_errors({"Bucket": bucket, "Key": ""}):
                # With any endpoint but AWS's own, botocore addresses buckets by path unless told otherwise.
                self._client = boto3.session.Session().client("s3", endpoint_url=endpoint, config=config)
        except ValueError as error:  # an endpoint that is no URL
            raise StoreError(f"s3://{bucket}: {error}") from error
        self._client.meta.events.register("before-send.s3", self._refuse_if_closed)  # also before each retry

    def close(self) -> None:
        self._closed.set()
        self._client.close()

    def put(self, key: str, content: bytes | Path, *, if_match: str | None = None, if_none_match: bool = False) -> str:
        where = self._object(key)
        conditions = {"IfMatch": if_match} if if_match is not None else {}
        if if_none_match:
            conditions["IfNoneMatch"] = "*"
        try:
            with disk_errors(key), s3_errors(where):
                if isinstance(content, bytes):
                    return self._put_bytes(where, content, conditions)
                if not conditions and (size := content.stat().st_size) > self._part_bytes:
                    return self._upload(where, content, size)
                with content.open("rb") as file:
                    return str(self._client.put_object(**where, Body=file, **conditions)["ETag"])
        except NotFound as error:
            if if_match is None or not is_absent(error.__cause__):
                raise
            raise PreconditionFailed(f"{url(where)} does not exist") from error

    def touch(self, key: str) -> bool:
        where = self._object(key)
        with s3_errors(where):
            try:
                self._client.copy_object(**where, CopySource=where, MetadataDirective="REPLACE")
            except ClientError as error:
                if is_absent(error):
                    return False
                raise
        return True

    def get(self, key: str) -> Stored:
        where = self._object(key)
        return _of_one_version(lambda: self._get(where))

    def fetch(
        self, key: str, destination: Path, *, max_bytes: int | None = None, on_progress: OnProgress | None = None
    ) -> str:
        where = self._object(key)

        def read() -> str:
            with disk_errors(key), atomic_file(destination) as file:
                version = _Version(self._client, self._closed, where, max_bytes, on_progress)
                return self._download(version, file, self._part_bytes)

        return _of_one_version(read)

    def list(self, prefix: str = "") -> list[Entry]:
        entries = []
        full = self._prefix + checked_prefix(prefix)
        with s3_errors({"Bucket": self._bucket, "Key": full}):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=full)
            for page in pages:
                if page.get("IsTruncated") and not page.get("NextContinuationToken"):
                    raise StoreError(f"s3://{self._bucket}/{full}: the server ended its list before the list's end")
                for found in page.get("Contents", ()):
                    key = found["Key"].removeprefix(self._prefix)
                    if is_key(key):
                        entries.append(Entry(key, found["Size"], found["ETag"], found["LastModified"].timestamp()))
        return sorted(entries)

    def delete(self, key: str, *, unless_changed: Entry | None = None) -> bool:
        # S3 can make a deletion conditional on the ETag only, and a touch does not change the ETag. Other servers may
        # ignore the condition. So the deletion does not notice a touch in the milliseconds after the list: a caller
        # that touches an object and then depends on it must check afterwards that the object still exists.
        where = self._object(key)
        if unless_changed is None:
            self._delete(where)
            return True
        if unless_changed not in self.list(key):
            return False
        if self._deletes_on_condition:
            try:
                return self._delete(where, IfMatch=unless_changed.revision)
            except PreconditionFailed:
                return False
            except StoreError as error:
                if not is_not_offered(error.__cause__):
                    raise
        done = self._delete(where)
        self._deletes_on_condition = False
        return done

    def _object(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + checked_key(key)}

    def _refuse_if_closed(self, **_: object) -> None:
        if self._closed.is_set():
            raise StoreUnavailable(f"s3://{self._bucket}: the store was closed")

    def _put_bytes(self, where: dict[str, str], content: bytes, conditions: dict[str, str]) -> str:
        try:
            return str(self._client.put_object(**where, Body=content, **conditions)["ETag"])
        except ClientError as error:
            if status_of(error) not in (409, 412) or not error.response["ResponseMetadata"].get("RetryAttempts"):
                raise
            # If the answer to an earlier attempt was lost, the retry meets the object that we have stored ourselves.
            with suppress(StoreError):
                found = self._get(where)
                if found.content == content:
                    return found.etag
            raise

    def _upload(self, where: dict[str, str], content: Path, size: int) -> str:
        """Store a large file by multipart upload; s3transfer aborts the upload if a part fails.

        The parts of a process that dies stay in the bucket, invisible, until its lifecycle rule removes them
        (AbortIncompleteMultipartUpload).
        """
        upload = _Upload(self._client, size)
        with TransferManager(upload, self._transfer_config(self._part_bytes)) as manager:
            manager.upload(str(content), where["Bucket"], where["Key"]).result()
        return upload.etag

    def _get(self, where: dict[str, str]) -> Stored:
        file = BytesIO()
        etag = self._download(_Version(self._client, self._closed, where, MAX_GET_BYTES), file)
        return Stored(file.getvalue(), etag)

    def _download(self, version: "_Version", file: BinaryIO, part_bytes: int = sys.maxsize) -> str:
        """Copy a version's bytes to an empty file and return its ETag; parts whose body breaks off are read again."""
        try:
            version.open()
            if version.size <= part_bytes or version.begins_within(self._split_after_seconds, part_bytes // 2):
                part_bytes, executor = version.size + 1, NonThreadedExecutor  # one request, on this thread
            else:
                executor = None
            config = self._transfer_config(part_bytes)
            with s3_errors(version.where), TransferManager(version, config, executor_cls=executor) as manager:
                manager.download(version.where["Bucket"], version.where["Key"], file, subscribers=[version]).result()
        except RetriesExceededError as error:
            raise StoreUnavailable(f"{url(version.where)}: the answer broke off {self._attempts} times") from error
        finally:
            version.close()
        return version.etag

    def _transfer_config(self, part_bytes: int) -> TransferConfig:
        return TransferConfig(
            multipart_threshold=part_bytes,
            multipart_chunksize=part_bytes,
            max_request_concurrency=_THREADS,
            io_chunksize=CHUNK_BYTES,
            num_download_attempts=self._attempts,
        )

    def _delete(self, where: dict[str, str], **condition: str) -> bool:
        with s3_errors(where):
            try:
                self._client.delete_object(**where, **condition)
            except ClientError as error:
                if not is_absent(error):  # S3 answers 204 for an absent object; other servers answer 404
                    raise
                return False
        return True


class _Version:
    """One version of one object, as the client and the subscriber of its download by s3transfer.

    `open` sends the first request, for the whole object; its answer states size and ETag. Every later answer must state
    the same ETag, so that the bytes of two versions never mix, and must be exactly the requested range. Failed requests
    raise StoreErrors here: s3transfer would repeat some that boto3 has repeated already.
    """

    def __init__(
        self,
        client: Any,
        closed: Event,
        where: dict[str, str],
        max_bytes: int | None,
        on_progress: OnProgress | None = None,
    ) -> None:
        self.meta = client.meta
        self.where = where
        self.etag = ""
        self.size = 0
        self._client = client
        self._closed = closed
        self._max_bytes = max_bytes
        self._on_progress = on_progress
        self._first: _FirstBody | None = None  # the answer to `open`, until s3transfer asks for the first part
        self._bodies: list[Any] = []  # of all answers: s3transfer closes none
        self._read = 0
        self._reported = -1  # the most that `on_progress` was told: a part that is read again takes bytes back
        self._counting = Lock()

    def open(self) -> None:
        """Send the first request. Raises ObjectTooLarge before any data is read."""
        response = self._get(**self.where, Range="bytes=0-")
        stated = _RANGE.fullmatch(response.get("ContentRange", ""))
        self.etag = response.get("ETag", "")
        self.size = int(stated[3]) if stated else response.get("ContentLength") or 0
        if not self.etag:
            raise StoreError(f"{url(self.where)}: the server sends no ETag, so versions cannot be told apart")
        self._check(response, 0, self.size)
        if self._max_bytes is not None and self.size > self._max_bytes:
            raise ObjectTooLarge(f"{url(self.where)} has {self.size} bytes; at most {self._max_bytes} are taken")
        self._first = _FirstBody(response["Body"])
        self.on_progress(0)

    def begins_within(self, seconds: float, size: int) -> bool:
        """Whether the first `size` bytes arrive in this time; they stay in memory until s3transfer reads them."""
        assert self._first is not None
        started = time.monotonic()
        self._first.read_ahead(size)
        return time.monotonic() - started < seconds

    def close(self) -> None:
        for body in self._bodies:
            body.close()

    def on_queued(self, future: Any, **_: object) -> None:
        future.meta.provide_transfer_size(self.size)
        future.meta.provide_object_etag(self.etag)

    def get_object(self, **request: Any) -> dict[str, Any]:
        first, _, last = request.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last) + 1, self.size) if last else self.size
        if start == 0 and self._first is not None:
            body, self._first = self._first, None
            body.end = end
            return {"Body": body}
        response = self._get(**self.where, Range=f"bytes={start}-{end - 1}", IfMatch=self.etag)
        self._check(response, start, end)
        return response

    def on_progress(self, bytes_transferred: int, **_: object) -> None:
        if self._closed.is_set():
            raise StoreUnavailable(f"{url(self.where)}: the store was closed")
        with self._counting:
            self._read += bytes_transferred
            if self._on_progress is not None and self._read > self._reported:
                self._reported = self._read
                self._on_progress(self._read, self.size)

    def _get(self, **request: str) -> dict[str, Any]:
        try:
            with s3_errors(self.where):
                try:
                    response = self._client.get_object(**request)
                except ClientError as error:
                    if status_of(error) != 416 or self.etag:
                        raise
                    response = self._client.get_object(**self.where)  # an empty object has no range
        except PreconditionFailed as error:
            raise ObjectChanged(f"{url(self.where)} was replaced while it was read") from error
        self._bodies.append(response["Body"])
        return dict(response)

    def _check(self, response: dict[str, Any], start: int, end: int) -> None:
        """Raise StoreError for an answer that is not the bytes from `start` to `end` of this version."""
        if response.get("ETag", "") != self.etag:
            raise ObjectChanged(f"{url(self.where)} was replaced while it was read")
        expected = f"bytes {start}-{end - 1}/{self.size}"
        stated, length = response.get("ContentRange", ""), response.get("ContentLength")
        whole = not stated and end - start == self.size  # the answer to a request without a range
        if not (stated == expected or whole) or length != end - start:
            said = f"the server stated {length} bytes and the range {stated!r} where {expected!r} was asked for"
            raise StoreError(f"{url(self.where)}: {said}")


class _FirstBody:
    """The first `end` bytes of the answer to `open`, some of them read ahead."""

    def __init__(self, body: Any) -> None:
        self.end = 0  # until s3transfer asks for the first part
        self._body = body
        self._ahead = b""
        self._position = 0
        self._error: Exception | None = None  # raised by the reading ahead

    def read_ahead(self, size: int) -> None:
        try:
            self._ahead = self._body.read(size)
        except S3_RETRYABLE_DOWNLOAD_ERRORS as error:
            self._error = error  # `read` raises it, and s3transfer requests the part again

    def read(self, size: int) -> bytes:
        if self._error is not None:
            raise self._error
        chunk, self._ahead = self._ahead, b""
        if not chunk and self._position < self.end:
            chunk = self._body.read(min(size, self.end - self._position))
        self._position += len(chunk)
        return chunk


class _Upload:
    """The client of one multipart upload by s3transfer, which does not return the ETag."""

    def __init__(self, client: Any, size: int) -> None:
        self.etag = ""
        self._client = client
        self._size = size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def complete_multipart_upload(self, **request: Any) -> None:
        try:
            self.etag = str(self._client.complete_multipart_upload(**request)["ETag"])
        except ClientError as error:
            # An earlier attempt may have completed the upload, so that it no longer exists, and its answer was lost.
            answer = error.response
            if answer["Error"]["Code"] != "NoSuchUpload" or not answer["ResponseMetadata"].get("RetryAttempts"):
                raise
            found = self._client.head_object(Bucket=request["Bucket"], Key=request["Key"])
            parts = len(request["MultipartUpload"]["Parts"])
            if found["ContentLength"] != self._size or not found["ETag"].endswith(f'-{parts}"'):
                raise
            self.etag = str(found["ETag"])


def _of_one_version(read: Callable[[], _Read]) -> _Read:
    """Start a read again when its object was replaced meanwhile. Raises ObjectChanged after the last one."""
    for _ in range(_VERSIONS_TRIED - 1):
        with suppress(ObjectChanged):
            return read()
    return read()
