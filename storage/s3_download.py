"""One S3 object on its way into a file, in parts that several threads read if one is slow."""

import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, as_completed, wait
from dataclasses import dataclass
from threading import Event, Lock
from typing import Any, NamedTuple

from botocore.exceptions import ClientError

from storage.backoff import backoff_seconds
from storage.files import CHUNK_BYTES
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

_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)", re.ASCII)


class Split(NamedTuple):
    """When an object is read by several threads: its first `part_bytes` have not come within `after_seconds`."""

    part_bytes: int
    after_seconds: float


@dataclass
class _Stretch:
    """What is left of the bytes that one thread reads."""

    start: int
    end: int


class Download:
    """One version of one object.

    The first answer tells size and ETag; all others are asked for with that ETag (If-Match), so that bytes of
    two versions never meet. A body that ends early is taken up where it ended, `attempts` times in all.
    """

    def __init__(
        self, client: Any, where: dict[str, str], attempts: int, on_progress: OnProgress | None = None
    ) -> None:
        self._client = client
        self._where = where
        self._attempts = attempts
        self._on_progress = on_progress
        self._etag = ""
        self._done = self._total = 0
        self._counting = Lock()
        self._stop = Event()  # a part has failed: the others need not go on

    def into(self, file: int, threads: Executor, split: Split, max_bytes: int | None) -> str:
        """Write the whole object to an open, empty file and return its ETag.

        `ObjectTooLarge` before anything is read; `ObjectChanged` when it was replaced meanwhile.
        """
        first = self._open_first(max_bytes)
        ours = _Stretch(0, self._total)
        parts: list[Future[None]] = []
        started = time.monotonic()

        def write(chunk: bytes, start: int) -> None:
            view = memoryview(chunk)
            while view:
                written = os.pwrite(file, view, start)
                view, start = view[written:], start + written

        def write_first(chunk: bytes, start: int) -> None:
            write(chunk, start)
            late = time.monotonic() - started >= split.after_seconds
            if late and not parts and start + len(chunk) <= split.part_bytes:
                ours.end = min(split.part_bytes, self._total)
                for at in range(ours.end, self._total, split.part_bytes):
                    stretch = _Stretch(at, min(at + split.part_bytes, self._total))
                    parts.append(submit(threads, self._where, self._part, write, stretch))

        try:
            if self._total and sys.platform == "linux":
                os.posix_fallocate(file, 0, self._total)  # a full disk shows before the transfer, not in its middle
            self._report(0)
            self._read(write_first, ours, first, min(CHUNK_BYTES, split.part_bytes))
            for part in as_completed(parts):
                part.result()
        finally:
            self._stop.set()
            for part in parts:
                part.cancel()
            wait(parts)  # the file must not be closed under a thread that writes to it
            first["Body"].close()
        return self._etag

    def content(self, max_bytes: int) -> Stored:
        """The whole object; errors as of `into`."""
        first = self._open_first(max_bytes)
        found = bytearray(self._total)

        def write(chunk: bytes, start: int) -> None:
            found[start : start + len(chunk)] = chunk

        self._read(write, _Stretch(0, self._total), first)
        return Stored(bytes(found), self._etag)

    def _open_first(self, max_bytes: int | None) -> dict[str, Any]:
        """The answer with all of the object."""
        try:
            response = self._get(Range="bytes=0-")  # so that the server states the size twice
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] != 416:
                raise
            response = self._get()  # an empty object has no first byte
        self._etag = response.get("ETag", "")
        if not self._etag:
            response["Body"].close()
            raise StoreError(f"{url(self._where)}: the server named no ETag, so that versions could not be told apart")
        stated = _RANGE.fullmatch(response.get("ContentRange", ""))
        self._total = int(stated[3]) if stated else response.get("ContentLength") or 0
        self._check(response, 0, self._total)
        if max_bytes is not None and self._total > max_bytes:
            response["Body"].close()
            raise ObjectTooLarge(f"{url(self._where)} has {self._total} bytes; at most {max_bytes} are taken")
        return response

    def _part(self, write: Write, stretch: _Stretch) -> None:
        if not self._stop.is_set():
            try:
                self._read(write, stretch, None)
            except BaseException:
                self._stop.set()
                raise

    def _read(
        self, write: Write, left: _Stretch, response: dict[str, Any] | None, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        """Read a stretch, from an answer that is there already or from new ones; `write` may shorten it."""
        for attempt in range(self._attempts):
            if attempt:
                self._stop.wait(backoff_seconds(attempt))
            if response is None:
                response = self._open(left.start, left.end)
            self._copy(write, left, response, chunk_bytes)
            if left.start == left.end or self._stop.is_set():
                return
            response = None
        raise StoreUnavailable(
            f"{url(self._where)}: the answer broke off {self._attempts} times, at byte {left.start} of {left.end}"
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

    def _copy(self, write: Write, left: _Stretch, response: Mapping[str, Any], chunk_bytes: int) -> None:
        """Write one answer's body to its place, as far as it comes."""
        body = response["Body"]
        try:
            while left.start < left.end and not self._stop.is_set():
                chunk = body.read(min(chunk_bytes, left.end - left.start))
                if not chunk:
                    break
                write(chunk, left.start)
                left.start += len(chunk)
                self._report(len(chunk))
        except BODY_ERRORS:
            pass  # what has come is good: the caller goes on from there
        finally:
            body.close()

    def _report(self, more: int) -> None:
        if self._on_progress is not None:
            with self._counting:
                self._done += more
                self._on_progress(self._done, self._total)
