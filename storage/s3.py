"""A store that is a bucket of S3, or of whatever speaks its protocol."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

from storage.files import disk_errors, temporary_file
from storage.s3_connections import ended_with
from storage.s3_download import Download, Split
from storage.s3_errors import is_absent, is_not_offered, s3_errors, url
from storage.s3_upload import PART_BYTES, upload_parts
from storage.sockets import OpenSockets
from storage.store import (
    MAX_GET_BYTES,
    Entry,
    NotFound,
    ObjectChanged,
    OnProgress,
    PreconditionFailed,
    Stored,
    StoreError,
    checked_key,
    checked_prefix,
    is_key,
)

_VERSIONS_TRIED = 3  # how often an object may be replaced under a reader
_THREADS = 8  # parts in flight, of all transfers of one store
# A connection that brings 8 MiB in this time (140 MB/s) brings the rest as well: 39 MB came in 52 ms over one from a
# server on this machine, in 148 ms over several. A real endpoint was not measured.
SPLIT_AFTER_SECONDS = 0.06

_Read = TypeVar("_Read")


class S3Store:
    """Objects below `prefix` in a bucket.

    Credentials, region and endpoint come from boto3's chain (environment, profile, role); `endpoint` overrides the
    last. Requests are tried `attempts` times, with a random and growing pause; the timeouts hold for connecting
    and for each silence of the server. What is larger than `part_bytes` is fetched in parts, several at a
    time, unless the first part is here within `split_after_seconds`.
    `close` ends what is under way: it fails with `StoreUnavailable`.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        endpoint: str | None = None,
        connect_timeout_seconds: float = 3.0,
        read_timeout_seconds: float = 10.0,
        attempts: int = 3,
        part_bytes: int = 8 << 20,
        split_after_seconds: float = SPLIT_AFTER_SECONDS,
    ) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._attempts = attempts
        self._split = Split(part_bytes, split_after_seconds)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="s3")
        config = Config(
            connect_timeout=connect_timeout_seconds,
            read_timeout=read_timeout_seconds,
            retries={"mode": "standard", "total_max_attempts": attempts},
            max_pool_connections=4 * _THREADS,
            # The newer checksums are refused by other servers, and by older MinIOs.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        try:
            with s3_errors({"Bucket": bucket, "Key": ""}):
                # With any endpoint but AWS's own, botocore addresses buckets by path unless told otherwise.
                self._client = boto3.session.Session().client("s3", endpoint_url=endpoint, config=config)
        except ValueError as error:  # an endpoint that is no URL
            raise StoreError(f"s3://{bucket}: {error}") from error
        self._sockets = OpenSockets()
        ended_with(self._sockets, self._client, bucket)
        self._deletes_on_condition = True  # until the server says that it does not

    def close(self) -> None:
        self._sockets.close()
        self._threads.shutdown()
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
                if not conditions and content.stat().st_size > PART_BYTES:
                    return upload_parts(self._client, where, content, self._threads)
                with content.open("rb") as file:
                    return self._client.put_object(**where, Body=file, **conditions)["ETag"]
        except NotFound as error:
            if if_match is None or not is_absent(error.__cause__):
                raise
            raise PreconditionFailed(f"{url(where)} does not exist") from error

    def _put_bytes(self, where: dict[str, str], content: bytes, conditions: dict[str, str]) -> str:
        try:
            return self._client.put_object(**where, Body=content, **conditions)["ETag"]
        except ClientError as error:
            answer = error.response["ResponseMetadata"]
            if answer["HTTPStatusCode"] not in (409, 412) or not answer.get("RetryAttempts"):
                raise
            # Was it refused because an earlier attempt, whose answer was lost, had done it?
            with suppress(StoreError), s3_errors(where):
                found = Download(self._client, where, self._attempts).content(MAX_GET_BYTES)
                if found.content == content:
                    return found.etag
            raise

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

        def read() -> Stored:
            with s3_errors(where):
                return Download(self._client, where, self._attempts).content(MAX_GET_BYTES)

        return _of_one_version(read)

    def fetch(
        self, key: str, destination: Path, *, max_bytes: int | None = None, on_progress: OnProgress | None = None
    ) -> str:
        where = self._object(key)

        def read() -> str:
            with disk_errors(key), temporary_file(destination.parent) as (name, file), s3_errors(where):
                download = Download(self._client, where, self._attempts, on_progress)
                etag = download.into(file.fileno(), self._threads, self._split, max_bytes)
                os.rename(name, destination)
            return etag

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
        # S3 deletes on condition of the ETag, which a touch leaves as it is, and of nothing else, and other servers
        # may ignore even that. So a touch in the milliseconds between the look and the deletion goes unseen: who
        # touches an object and then counts on it has to look afterwards whether it is still there.
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

    def _delete(self, where: dict[str, str], **condition: str) -> bool:
        with s3_errors(where):
            try:
                self._client.delete_object(**where, **condition)
            except ClientError as error:
                if not is_absent(error):  # S3 answers that it is gone; others, that it was not there
                    raise
                return False
        return True

    def _object(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + checked_key(key)}


def _of_one_version(read: Callable[[], _Read]) -> _Read:
    """Read from the start again when an object was replaced meanwhile, a few times."""
    for _ in range(_VERSIONS_TRIED - 1):
        with suppress(ObjectChanged):
            return read()
    return read()
