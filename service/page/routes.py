"""The operators' page: its files, which hold no secrets. What it shows comes by the other routes, with the key."""

import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.errors import RequestError
from service.http import json_response, own_path

FILES = Path(__file__).with_name("files")
MEDIA_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
FOR_GOOD = "public, max-age=31536000, immutable"
GUARDS = MappingProxyType(
    {
        # Nothing from elsewhere, nothing inline, and no text becomes HTML: an adapter's name may say what it likes
        "content-security-policy": (
            "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
            "require-trusted-types-for 'script'; trusted-types 'none'"
        ),
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }
)


class Links(msgspec.Struct, frozen=True, kw_only=True):
    """Where a program that asks for `/` may go on."""

    page: str = "/ui"
    contract: str = "/openapi.json"
    ready: str = "/health/ready"
    models: str = "/v1/models"
    adapters: str = "/adapters"
    metrics: str = "/metrics"


class PageFile(NamedTuple):
    content: bytes
    media_type: str
    caching: str

    @property
    def etag(self) -> str:
        return f'"{_digest(self.content)}"'


def _read(folder: Path) -> Mapping[str, PageFile]:
    """The files of the page, by path.

    Scripts and styles have the version of the whole in their paths, and so may be cached for good; `index.html`,
    which names them, is asked for each time.
    """
    contents = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in MEDIA_TYPES}
    version = _digest(b"".join(name.encode() + _digest(each).encode() for name, each in contents.items()))
    files = {
        f"/ui/{version}/{name}": PageFile(each, MEDIA_TYPES[Path(name).suffix], FOR_GOOD)
        for name, each in contents.items()
        if name != "index.html"
    }
    html = PageFile(contents["index.html"].replace(b"{version}", version.encode()), "text/html", "no-cache")
    return {"/": html, "/ui": html, **files}


def _digest(content: bytes) -> str:
    return sha256(content).hexdigest()[:16]


_files = _read(FILES)
PATHS = frozenset(_files)  # exactly these: the key is asked for whatever else a path may say


async def root(request: Request) -> Response:
    """The page; links for a program that asks for JSON and not for a page."""
    accepted = request.headers.get("accept", "")
    if "application/json" in accepted and "text/html" not in accepted:
        return json_response(Links(), headers={"vary": "accept"})
    return _answer(request, {"vary": "accept"})


async def page(request: Request) -> Response:
    """The page, or a script, the style or the icon of it."""
    return _answer(request)


routes = [
    Route("/", root),
    Route("/ui", page),
    Route("/ui/{version}/{file}", page),
]


def _answer(request: Request, headers: Mapping[str, str] = MappingProxyType({})) -> Response:
    file = _files.get(own_path(request.scope))
    if file is None:
        raise RequestError("not_found", f"{request.scope['path']} is no file of this version's page: load /ui again")
    headers = {**GUARDS, **headers, "etag": file.etag, "cache-control": file.caching}
    known = re.findall(r'"[^"]*"|\*', request.headers.get("if-none-match", ""))
    if file.etag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=file.media_type)
