"""A proxy on the loopback in front of an S3 server, that misbehaves as it is told."""

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import NamedTuple
from urllib.parse import urlsplit

from tests.storage.loopback import send, serving


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


Request = BaseHTTPRequestHandler
Fault = Callable[[Request, Callable[[], Answer]], None]  # answers a request, or not; the function passes it on


class FaultyS3:
    """Each request with a `method` that is to fail meets the next of `faults`, and when they are used up, `always`."""

    def __init__(self, upstream: str) -> None:
        self.faults: list[Fault] = []
        self.always: Fault | None = None
        self.methods = {"GET", "PUT", "POST", "DELETE", "HEAD"}
        self.requests: list[tuple[str, str]] = []  # method, and the Range that was asked for
        self.endpoint = ""
        self._upstream = urlsplit(upstream).netloc
        self._over = threading.Event()
        self._one_at_a_time = threading.Lock()

    @contextmanager
    def running(self) -> Iterator["FaultyS3"]:
        with serving(self._answer) as self.endpoint:
            yield self
            self._over.set()

    def stall(self) -> None:
        """Say nothing until the test is over, or so long that the client must have given up."""
        self._over.wait(20)

    def _answer(self, request: Request) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))

        def forward() -> Answer:
            connection = http.client.HTTPConnection(self._upstream)
            headers = {name: value for name, value in request.headers.items() if name.lower() != "expect"}
            connection.request(request.command, request.path, body, headers)
            response = connection.getresponse()
            answer = Answer(response.status, dict(response.getheaders()), response.read())
            connection.close()
            return answer

        with self._one_at_a_time:
            self.requests.append((request.command, request.headers.get("Range", "")))
            fault = None
            if request.command in self.methods:
                fault = self.faults.pop(0) if self.faults else self.always
        (fault or passed_on)(request, forward)


def passed_on(request: Request, forward: Callable[[], Answer]) -> None:
    answer = forward()
    write(request, answer, answer.body)


def write(request: Request, answer: Answer, body: bytes, **changed: str) -> None:
    """Send an answer with the headers that it has, or others, and a body that may be another one."""
    headers = {name: value for name, value in answer.headers.items() if name not in ("Connection", "Transfer-Encoding")}
    stated = headers.get("Content-Length", str(len(answer.body)))
    send(request, answer.status, body, **{**headers, "Content-Length": stated, **changed})


def status(code: int, name: str = "") -> Fault:
    """The server answers an error, named as S3 names it."""

    def answer(request: Request, forward: Callable[[], Answer]) -> None:
        send(request, code, f"<Error><Code>{name}</Code><Message>secret</Message></Error>".encode() if name else b"")

    return answer


def cut(share: float) -> Fault:
    """The body ends after a share of its bytes, and the connection with it."""

    def answer(request: Request, forward: Callable[[], Answer]) -> None:
        whole = forward()
        write(request, whole, whole.body[: int(len(whole.body) * share)])
        request.close_connection = True

    return answer


def stated(**headers: str) -> Fault:
    """The headers say something else than the body."""

    def answer(request: Request, forward: Callable[[], Answer]) -> None:
        whole = forward()
        write(request, whole, whole.body, **{name.replace("_", "-"): value for name, value in headers.items()})
        request.close_connection = True

    return answer


def lost(request: Request, forward: Callable[[], Answer]) -> None:
    """The server does it, and its answer never arrives."""
    forward()
    request.close_connection = True


def preceded_by(happens: Callable[[], object]) -> Fault:
    """Something happens to the objects just before the server answers."""

    def answer(request: Request, forward: Callable[[], Answer]) -> None:
        happens()
        passed_on(request, forward)

    return answer


def compares_quotes(request: Request, forward: Callable[[], Answer]) -> None:
    """The server takes the quotes of If-Match for a part of the ETag, as Ceph's gateway does for a PUT."""
    if (etag := request.headers.get("If-Match")) is not None:
        if etag.startswith('"'):
            send(request, 412, b"<Error><Code>PreconditionFailed</Code></Error>")
            return
        request.headers.replace_header("If-Match", f'"{etag}"')
    passed_on(request, forward)


def ignores(*headers: str) -> Fault:
    """The server does not know these headers."""

    def answer(request: Request, forward: Callable[[], Answer]) -> None:
        for header in headers:
            del request.headers[header]
        passed_on(request, forward)

    return answer
