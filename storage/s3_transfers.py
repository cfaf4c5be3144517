"""One download of one version of an object, and one upload in parts, as clients of s3transfer."""

import re
import time
from threading import Event, Lock
from typing import Any

from botocore.exceptions import ClientError
from s3transfer.utils import S3_RETRYABLE_DOWNLOAD_ERRORS

from storage.s3_errors import s3_errors, status_of, url
from storage.store import ObjectChanged, ObjectTooLarge, OnProgress, PreconditionFailed, StoreError, StoreUnavailable

_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)", re.ASCII)


class Version:
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
        self._first: FirstBody | None = None  # the answer to `open`, until s3transfer asks for the first part
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
        self._first = FirstBody(response["Body"])
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


class FirstBody:
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


class Upload:
    """The client of one multipart upload by s3transfer, which does not return the ETag."""

    def __init__(self, client: Any, size: int) -> None:
        self.etag = ""
        self._client = client
        self._size = size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def complete_multipart_upload(self, **request: Any) -> None:
        where = {"Bucket": request["Bucket"], "Key": request["Key"]}
        try:
            etag = str(self._client.complete_multipart_upload(**request).get("ETag", ""))
            # Ceph's gateway leaves the quotes out, or the whole of it.
            self.etag = etag if etag.startswith('"') else str(self._client.head_object(**where)["ETag"])
        except ClientError as error:
            # An earlier attempt may have completed the upload, so that it no longer exists, and its answer was lost.
            answer = error.response
            if answer["Error"]["Code"] != "NoSuchUpload" or not answer["ResponseMetadata"].get("RetryAttempts"):
                raise
            found = self._client.head_object(**where)
            parts = len(request["MultipartUpload"]["Parts"])
            if found["ContentLength"] != self._size or not found["ETag"].endswith(f'-{parts}"'):
                raise
            self.etag = str(found["ETag"])
