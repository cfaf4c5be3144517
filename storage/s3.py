"""A store in a bucket of S3, or of any server that speaks its protocol."""

import sys
from collections.abc import Callable
from contextlib import suppress
from email.utils import parsedate_to_datetime
from io import BytesIO
from pathlib import Path
from threading import Event
from typing import BinaryIO, TypeVar

import boto3
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import ClientError
from s3transfer.exceptions import RetriesExceededError
from s3transfer.futures import NonThreadedExecutor
from s3transfer.manager import TransferConfig, TransferManager

from storage.files import CHUNK_BYTES, atomic_file, disk_errors
from storage.s3_errors import is_absent, is_not_offered, s3_errors, status_of, url
from storage.s3_transfers import Upload, Version
from storage.store import (
    MAX_GET_BYTES,
    Entry,
    NotFound,
    ObjectChanged,
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
        self._quotes_etags = True  # in a condition of a PUT, until the server compares the quotes too, as Ceph's does
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
        try:
            if if_match is not None:
                return self._put_matching(where, content, if_match)
            return self._put(where, content, {"IfNoneMatch": "*"} if if_none_match else {})
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
                version = Version(self._client, self._closed, where, max_bytes, on_progress)
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
        if unless_changed.key != key or unless_changed not in self.list(key):
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

    def now(self) -> float:
        """As the server dates its answers; it stamps objects by the same clock."""
        where = {"Bucket": self._bucket, "Key": self._prefix}
        with s3_errors(where):
            answer = self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)
        date = answer["ResponseMetadata"]["HTTPHeaders"].get("date", "")
        try:
            return parsedate_to_datetime(date).timestamp()
        except ValueError as error:
            raise StoreError(f"{url(where)}: the server's answers have no date, so objects have no age") from error

    def _object(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + checked_key(key)}

    def _refuse_if_closed(self, **_: object) -> None:
        if self._closed.is_set():
            raise StoreUnavailable(f"s3://{self._bucket}: the store was closed")

    def _put_matching(self, where: dict[str, str], content: bytes | Path, etag: str) -> str:
        if self._quotes_etags:
            try:
                return self._put(where, content, {"IfMatch": etag})
            except PreconditionFailed:
                if self._etag(where) != etag:
                    raise  # it is true
        put = self._put(where, content, {"IfMatch": etag.strip('"')})
        self._quotes_etags = False
        return put

    def _put(self, where: dict[str, str], content: bytes | Path, conditions: dict[str, str]) -> str:
        with disk_errors(where["Key"]), s3_errors(where):
            if isinstance(content, bytes):
                return self._put_bytes(where, content, conditions)
            if not conditions and (size := content.stat().st_size) > self._part_bytes:
                return self._upload(where, content, size)
            with content.open("rb") as file:
                return str(self._client.put_object(**where, Body=file, **conditions)["ETag"])

    def _etag(self, where: dict[str, str]) -> str:
        with s3_errors(where):
            return str(self._client.head_object(**where)["ETag"])

    def _put_bytes(self, where: dict[str, str], content: bytes, conditions: dict[str, str]) -> str:
        try:
            return str(self._client.put_object(**where, Body=content, **conditions)["ETag"])
        except ClientError as error:
            # If the answer to an earlier attempt was lost, the retry meets the object that we have stored ourselves.
            refused = status_of(error) in (409, 412) and error.response["ResponseMetadata"].get("RetryAttempts")
            lost = bool(conditions) and status_of(error) == 500  # so Ceph's gateway tells those who lose a race
            found = self._found(where) if refused or lost else None
            if found is not None and found.content == content:
                return found.etag
            if lost and found is not None and found.etag.strip('"') != conditions.get("IfMatch", "").strip('"'):
                raise PreconditionFailed(f"{url(where)} was written by another writer") from error
            raise

    def _found(self, where: dict[str, str]) -> Stored | None:
        with suppress(StoreError):
            return self._get(where)
        return None

    def _upload(self, where: dict[str, str], content: Path, size: int) -> str:
        """Store a large file by multipart upload; s3transfer aborts the upload if a part fails.

        The parts of a process that dies stay in the bucket, invisible, until its lifecycle rule removes them
        (AbortIncompleteMultipartUpload).
        """
        upload = Upload(self._client, size)
        with TransferManager(upload, self._transfer_config(self._part_bytes)) as manager:
            manager.upload(str(content), where["Bucket"], where["Key"]).result()
        return upload.etag

    def _get(self, where: dict[str, str]) -> Stored:
        file = BytesIO()
        etag = self._download(Version(self._client, self._closed, where, MAX_GET_BYTES), file)
        return Stored(file.getvalue(), etag)

    def _download(self, version: Version, file: BinaryIO, part_bytes: int = sys.maxsize) -> str:
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


def _of_one_version(read: Callable[[], _Read]) -> _Read:
    """Start a read again when its object was replaced meanwhile. Raises ObjectChanged after the last one."""
    for _ in range(_VERSIONS_TRIED - 1):
        with suppress(ObjectChanged):
            return read()
    return read()
