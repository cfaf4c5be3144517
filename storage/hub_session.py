"""Requests to the Hugging Face hub, tried again within bounds, and what its answers mean."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urljoin, urlsplit

from huggingface_hub import constants, get_session, get_token
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

from storage.backoff import backoff_seconds
from storage.files import CHUNK_BYTES, write_all
from storage.sockets import OpenSockets
from storage.store import AccessDenied, NotFound, ObjectTooLarge, OnProgress, StoreError, StoreUnavailable

_TRIED_AGAIN = {408, 429, 500, 502, 503, 504}
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")
_MISSING = {"RepoNotFound": "repository", "RevisionNotFound": "revision", "EntryNotFound": "file"}

_Result = TypeVar("_Result")


class HubSession:
    """GET requests over huggingface_hub's own session, each tried `attempts` times with a random, growing pause.

    The session minds proxies and HF_HUB_OFFLINE, and drops the token when it is redirected to another host.
    It is the whole process', so that `close` ends the requests of this object and leaves the session alone.
    """

    def __init__(self, endpoint: str | None, token: str | None, timeout_seconds: float, attempts: int) -> None:
        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        # Not the library's headers: to make them it asks the hub what tools there are, and caches the answer.
        # A connection serves one request: of one that was open before, nobody could tell whose it is now to end it.
        self._headers = {"User-Agent": "rootstock", "Accept-Encoding": "identity", "Connection": "close"}
        if token is None and not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
            token = get_token()
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._timeout_seconds = timeout_seconds
        self._attempts = attempts
        self._sockets = OpenSockets()

    def close(self) -> None:
        """Have every request, under way or to come, fail with `StoreUnavailable` soon; closing twice is fine."""
        self._sockets.close()

    def json(self, url: str, what: str) -> tuple[Any, str | None]:
        """A decoded answer, and the address of the list's next page if there is one."""

        def once() -> tuple[Any, str | None]:
            with self._answer(url, what) as response:
                response.read()
                try:
                    content = response.json()
                except ValueError as error:
                    raise StoreError(f"{what}: what the hub at {self.endpoint} answered is no JSON") from error
                return content, response.links.get("next", {}).get("url")

        content, link = self._tried(what, once)
        following = urljoin(url, link) if link else None
        if following and urlsplit(following)[:2] != urlsplit(self.endpoint)[:2]:
            raise StoreError(f"{what}: the hub's list goes on at another host, which must not see the token")
        return content, following

    def download(
        self, url: str, what: str, file: BinaryIO, max_bytes: int | None, on_progress: OnProgress | None
    ) -> str:
        """Write a file's bytes to an empty, seekable file and return its etag; an answer cut off is taken up again."""

        def once() -> str:
            offset = file.seek(0, os.SEEK_END)
            with self._answer(url, what, **({"Range": f"bytes={offset}-"} if offset else {})) as response:
                total = _length(response, offset, what)
                if response.status_code != 206:
                    offset = file.seek(0)
                    file.truncate()
                if max_bytes is not None and total > max_bytes:
                    raise ObjectTooLarge(f"{what} has {total} bytes; at most {max_bytes} are taken")
                for chunk in response.iter_raw(CHUNK_BYTES):
                    offset += len(chunk)
                    if offset > total:
                        break
                    write_all(file, chunk)
                    if on_progress is not None:
                        on_progress(offset, total)
                if offset != total:
                    raise StoreError(f"{what}: the hub stated {total} bytes and sent others")
                return _etag(response)

        return self._tried(what, once)

    def _tried(self, what: str, once: Callable[[], _Result]) -> _Result:
        problem: Exception | None = None
        for attempt in range(self._attempts):
            if attempt:
                self._sockets.closed.wait(backoff_seconds(attempt))
            if self._sockets.closed.is_set():
                raise StoreUnavailable(f"{what}: the connection to the hub was closed") from problem
            try:
                return once()
            except OfflineModeIsEnabled as error:
                raise StoreUnavailable(f"{what}: HF_HUB_OFFLINE forbids to ask the hub") from error
            except (HTTPError, StoreUnavailable) as error:
                problem = error
        # Not the error's own text: it can hold the address of a redirect, which is signed.
        said = problem if isinstance(problem, StoreUnavailable) else f"{what}: {type(problem).__name__}"
        raise StoreUnavailable(f"{said}, {self._attempts} times, from {self.endpoint}") from problem

    @contextmanager
    def _answer(self, url: str, what: str, **headers: str) -> Iterator[Any]:
        opened: list[Any] = []

        def trace(event: str, info: dict[str, Any]) -> None:
            if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
                opened.append(info["return_value"].get_extra_info("socket"))
                self._sockets.add(opened[-1])

        request = get_session().stream(
            "GET",
            url,
            headers={**self._headers, **headers},
            timeout=self._timeout_seconds,
            follow_redirects=True,
            extensions={"trace": trace},
        )
        try:
            with request as response:
                if response.status_code not in (200, 206):
                    raise _refusal(response, what, "Authorization" in self._headers)
                yield response
        finally:
            for one in opened:
                self._sockets.discard(one)


def _length(response: Any, offset: int, what: str) -> int:
    """Bytes of the whole file, as all who say something about it agree."""
    headers = response.headers
    stated = set()
    if response.status_code == 206:
        found = _RANGE.fullmatch(headers.get("Content-Range", ""))
        if found is None or int(found[1]) != offset:
            raise StoreError(f"{what}: the hub answered another range than was asked for")
        stated.add(int(found[2]))
    elif headers.get("Content-Length", "").isdecimal():
        stated.add(int(headers["Content-Length"]))
    linked = [step.headers["X-Linked-Size"] for step in response.history if "X-Linked-Size" in step.headers]
    stated |= {int(size) for size in linked if size.isdecimal()}
    if len(stated) != 1 or headers.get("Content-Encoding", "identity") != "identity":
        raise StoreError(f"{what}: the hub does not say, or not clearly, how many bytes it has: {sorted(stated)}")
    return stated.pop()


def _etag(response: Any) -> str:
    """The hub's own etag, where the file itself comes from a host that knows another one."""
    first = (response.history or [response])[0].headers
    return (first.get("X-Linked-Etag") or first.get("ETag", "")).removeprefix("W/").strip('"')


def _refusal(response: Any, what: str, with_token: bool) -> StoreError:
    status, code = response.status_code, response.headers.get("X-Error-Code", "")
    if status in _TRIED_AGAIN:
        return StoreUnavailable(f"{what}: the hub answered {status}")
    if status in (401, 403):
        token = "with the token given" if with_token else "without a token (HF_TOKEN)"
        return AccessDenied(
            f"{what}: it is private, gated or not there at all {token}; the hub answered {status} {code}"
        )
    if status == 404:
        missing = _MISSING.get(code)
        return NotFound(
            f"{what}: there is no such {missing}" if missing else f"{what}: the hub has nothing of the kind"
        )
    return StoreError(f"{what}: the hub answered {status} {code}")
