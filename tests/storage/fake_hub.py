"""A stand-in for the Hugging Face hub: one repository, its HTTP API, and the other host that holds its large files."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote, urlsplit

from tests.storage.loopback import send, serving

REPOSITORY = "someone/adapter"
LARGE_BYTES = 1000  # a larger file is kept elsewhere and redirected to


class FakeHub:
    """What it holds, what it has seen, and how it is to misbehave."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}  # of each commit
        self.revisions: dict[str, str] = {}
        self.token: str | None = None  # what a private repository asks for
        self.gated = False
        self.broken_answers = 0  # this many requests get a 503
        self.silent = False  # it takes requests and never answers
        self.cut_bodies = 0  # this many bodies end half-way
        self.stated_bytes: int | None = None  # what it says of every large file instead of the truth
        self.page: bytes | None = None  # what it answers to every question about a revision
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.endpoint = self.elsewhere = ""
        self._over = threading.Event()

    def commit(self, files: dict[str, bytes], revision: str = "main") -> str:
        name = hashlib.sha1(repr((revision, sorted(files.items()))).encode()).hexdigest()
        self.files[name], self.revisions[revision] = files, name
        return name

    @contextmanager
    def running(self) -> Iterator["FakeHub"]:
        with serving(self._answer) as self.endpoint, serving(self._answer_elsewhere) as self.elsewhere:
            yield self
            self._over.set()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        self.requests.append((request.path, {name.lower(): value for name, value in request.headers.items()}))
        path = urlsplit(request.path).path
        api, files = f"/api/models/{REPOSITORY}/", f"/{REPOSITORY}/resolve/"
        if self.silent:
            self._over.wait(20)
            request.close_connection = True
        elif self.broken_answers:
            self.broken_answers -= 1
            send(request, 503)
        elif self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            send(request, 401, X_Error_Message="Invalid username or password.")
        elif self.gated:
            send(request, 403, X_Error_Code="GatedRepo")
        elif path.startswith(f"{api}revision/"):
            self._send_revision(request, unquote(path.removeprefix(f"{api}revision/")))
        elif path.startswith(f"{api}tree/"):
            self._send_tree(request, unquote(path.removeprefix(f"{api}tree/")))
        elif path.startswith(files):
            commit, _, name = unquote(path.removeprefix(files)).partition("/")
            self._send_file(request, commit, name)
        else:
            send(request, 404, X_Error_Code="RepoNotFound")

    def _send_revision(self, request: BaseHTTPRequestHandler, revision: str) -> None:
        commit = revision if revision in self.files else self.revisions.get(revision)
        if self.page is not None:
            send(request, 200, self.page)
        elif commit is None:
            send(request, 404, X_Error_Code="RevisionNotFound")
        else:
            send(request, 200, json.dumps({"id": REPOSITORY, "sha": commit}).encode())

    def _send_tree(self, request: BaseHTTPRequestHandler, commit: str) -> None:
        files = [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in self.files[commit].items()
        ]
        send(request, 200, json.dumps(files).encode())

    def _send_file(self, request: BaseHTTPRequestHandler, commit: str, name: str) -> None:
        content = self.files.get(commit, {}).get(name)
        if content is None:
            send(request, 404, X_Error_Code="EntryNotFound")
            return
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        if len(content) <= LARGE_BYTES:
            send(request, 200, content, ETag=etag, X_Repo_Commit=commit)
            return
        size = len(content) if self.stated_bytes is None else self.stated_bytes
        where = f"{self.elsewhere}/{commit}/{name}?signature=secret"
        send(request, 302, Location=where, X_Linked_Etag=etag, X_Linked_Size=str(size), X_Repo_Commit=commit)

    def _answer_elsewhere(self, request: BaseHTTPRequestHandler) -> None:
        self.requests.append((f"elsewhere {request.path}", {name.lower(): v for name, v in request.headers.items()}))
        commit, _, name = urlsplit(request.path).path.lstrip("/").partition("/")
        content = self.files[commit][name]
        start = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        headers = {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        rest = content[start:]
        if self.cut_bodies:
            self.cut_bodies -= 1
            send(request, 206 if start else 200, rest[: len(rest) // 2], Content_Length=str(len(rest)), **headers)
            request.close_connection = True
        else:
            send(request, 206 if start else 200, rest, ETag='"another"', **headers)
