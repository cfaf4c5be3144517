"""One S3 object on its way into a file, in parts that several threads read."""

import os
import re
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, as_completed, wait
from threading import Event, Lock
from typing import Any

from botocore.exceptions import ClientError

from storage.backoff import backoff_seconds
from storage.s3_connections import submit
from storage.s3_errors import BODY_ERRORS, s3_errors, url
from storage.store import (
    ObjectChanged,
    ObjectTooLarge,
    OnProgress,
    PreconditionFailed,
    Stored,
    StoreError,
    StoreUnavailable,
)

Write = Callable[[bytes, int], None]  # bytes, and where they belong

_CHUNK_BYTES = 1 << 18
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)", re.ASCII)


class Download:
    """One version of one object.

    The first part's answer tells size and ETag; the other parts demand that ETag (If-Match), so that bytes of
    two versions never meet. A body that ends early is taken up where it ended, `attempts` times in all.
    """

    def __init__(
        self, client: Any, where: dict[str, str], part_bytes: int, attempts: int, on_progress: OnProgress | None
    ) -> None:
        self._client = client
        self._where = where
        self._part_bytes = part_bytes
        self._attempts = attempts
        self._on_progress = on_progress
        self._etag = ""
        self._done = self._total = 0
        self._counting = Lock()
        self._stop = Event()  # a part has failed: the others need not go on

    def into(self, file: int, threads: Executor, max_bytes: int | None) -> str:
        """Write the whole object to an open, empty file and return its ETag.

        `ObjectTooLarge` before anything is read; `ObjectChanged` when it was replaced meanwhile.
        """

        def write(chunk: bytes, start: int) -> None:
            view = memoryview(chunk)
            while view:
                written = os.pwrite(file, view, start)
                view, start = view[written:], start + written

        first, end = self._open_first(max_bytes)
        parts: list[Future[None]] = []
        try:
            if self._total and sys.platform == "linux":
                os.posix_fallocate(file, 0, self._total)  # a full disk shows before the transfer, not in its middle
            self._report(0)
            for start in range(end, self._total, self._part_bytes):
                parts.append(submit(threads, self._where, self._part, write, start))
            self._read(write, 0, end, first)
            for part in as_completed(parts):
                part.result()
        finally:
            self._stop.set()
            for part in parts:
                part.cancel()
            wait(parts)  # the file must not be closed under a thread that writes to it
            first["Body"].close()
        return self._etag

    def content(self) -> Stored:
        """The whole object, no larger than a part; errors as of `into`."""
        first, end = self._open_first(self._part_bytes)
        found = bytearray(end)

        def write(chunk: bytes, start: int) -> None:
            found[start : start + len(chunk)] = chunk

        self._read(write, 0, end, first)
        return Stored(bytes(found), self._etag)

    def _open_first(self, max_bytes: int | None) -> tuple[dict[str, Any], int]:
        """The answer for the first part, or for all of a small object, and where the part ends."""
        try:
            response = self._get(Range=f"bytes=0-{self._part_bytes - 1}")
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] != 416:
                raise
            response = self._get()  # an empty object has no first byte
        self._etag = response.get("ETag", "")
        if not self._etag:
            response["Body"].close()
            raise StoreError(f"{url(self._where)}: the server named no ETag, so that versions could not be told apart")
        stated = _RANGE.fullmatch(response.get("ContentRange", ""))
        length = response.get("ContentLength")
        self._total = int(stated[3]) if stated else length or 0
        end = min(self._part_bytes, self._total) if stated else self._total
        self._check(response, 0, end)
        if max_bytes is not None and self._total > max_bytes:
            response["Body"].close()
            raise ObjectTooLarge(f"{url(self._where)} has {self._total} bytes; at most {max_bytes} are taken")
        return response, end

    def _part(self, write: Write, start: int) -> None:
        if not self._stop.is_set():
            try:
                self._read(write, start, min(start + self._part_bytes, self._total), None)
            except BaseException:
                self._stop.set()
                raise

    def _read(self, write: Write, start: int, end: int, response: dict[str, Any] | None) -> None:
        """Read the bytes from `start` to `end`, from an answer that is there already or from new ones."""
        for attempt in range(self._attempts):
            if attempt:
                self._stop.wait(backoff_seconds(attempt))
            if response is None:
                response = self._open(start, end)
            start = self._copy(write, start, end, response)
            if start == end or self._stop.is_set():
                return
            response = None
        raise StoreUnavailable(
            f"{url(self._where)}: the answer broke off {self._attempts} times, at byte {start} of {end}"
        )

    def _open(self, start: int, end: int) -> dict[str, Any]:
        try:
            with s3_errors(self._where):
                response = self._get(Range=f"bytes={start}-{end - 1}", IfMatch=self._etag)
        except PreconditionFailed as error:
            raise ObjectChanged(f"{url(self._where)} was replaced while it was read") from error
        self._check(response, start, end)
        return response

    def _get(self, **conditions: str) -> dict[str, Any]:
        return self._client.get_object(**self._where, **conditions)

    def _check(self, response: Mapping[str, Any], start: int, end: int) -> None:
        """Refuse an answer that is not what was asked for."""
        asked = f"bytes {start}-{end - 1}/{self._total}"
        stated, length = response.get("ContentRange", asked if start == 0 else ""), response.get("ContentLength")
        if response.get("ETag", "") != self._etag:
            response["Body"].close()
            raise ObjectChanged(f"{url(self._where)} was replaced while it was read")
        if stated != asked or length != end - start:
            response["Body"].close()
            said = f"the server stated {length} bytes and the range {stated!r} where {asked!r} was asked for"
            raise StoreError(f"{url(self._where)}: {said}")

    def _copy(self, write: Write, start: int, end: int, response: Mapping[str, Any]) -> int:
        """Write one answer's body to its place and return where it ended."""
        body = response["Body"]
        try:
            while start < end and not self._stop.is_set():
                chunk = body.read(min(_CHUNK_BYTES, end - start))
                if not chunk:
                    break
                write(chunk, start)
                start += len(chunk)
                self._report(len(chunk))
        except BODY_ERRORS:
            pass  # what has come is good: the caller goes on from there
        finally:
            body.close()
        return start

    def _report(self, more: int) -> None:
        if self._on_progress is not None:
            with self._counting:
                self._done += more
                self._on_progress(self._done, self._total)
