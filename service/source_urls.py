"""The URLs of adapter sources, and the list of sources that this server allows."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import quote, unquote

_SCHEME = re.compile(r"(file|s3|hf)://(.*)", re.DOTALL)
# Part of a key in S3, or of a path on the hub: anything but what a URL begins a query or a fragment with, and controls
_SEGMENT = re.compile(r"[^?#\\\x00-\x1f\x7f]+")
_MAX_KEY_BYTES = 900  # S3 takes 1024, with the names of files
# Amazon's rules for buckets, minus the names that its client takes for access points and the like.
_BUCKET = re.compile(r"(?!xn--|sthree-)[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](?<!-s3alias)(?<!--ol-s3)(?<!--x-s3)(?<!\.mrap)")
_ADDRESS = re.compile(r"[0-9.]+")
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
# Encoded dots, slashes, controls and escapes: a program that decodes the path later would see another path.
_TRICKS = re.compile(r"%(?:2e|2f|5c|25|7f|[01][0-9a-f])|%(?![0-9a-f]{2})", re.IGNORECASE)


class Source(NamedTuple):
    """A directory in a store."""

    scheme: Literal["file", "s3", "hf"]
    path: tuple[str, ...]  # s3: begins with the bucket; hf: begins with organisation and repository
    revision: str | None = None  # hf only

    @property
    def url(self) -> str:
        """The canonical URL."""
        root = "file:///" if self.scheme == "file" else f"{self.scheme}://"
        revision = "" if self.revision is None else f"@{self.revision}"
        return root + "/".join(quote(segment, safe="=+") for segment in self.path) + revision


class AllowedSources:
    """The places that this server allows, each with everything below it."""

    def __init__(self, urls: Sequence[str]) -> None:
        """Raises ValueError with a sentence for an invalid URL or a missing directory."""
        self._places = [_place(url) for url in urls]

    def place_of(self, source: Source) -> Source | None:
        """The allowed place that contains a source, None if there is none."""
        for place in self._places:
            if place.scheme == source.scheme and place.path == source.path[: len(place.path)]:
                return place
        return None


def source_of(text: str) -> Source:
    """A source by its URL, or by an absolute path on the server. Raises ValueError with a sentence."""
    source = _parsed("file://" + quote(text) if text.startswith("/") else text)
    if source.scheme == "hf" and len(source.path) < 2:
        raise ValueError("an hf:// source is hf://organisation/repository, with an optional /folder and @revision")
    return source


def store_of(text: str) -> Source:
    """The bucket and the prefix of an adapter store. Raises ValueError with a sentence."""
    source = _parsed(text)
    if source.scheme != "s3":
        raise ValueError("a store is s3://bucket or s3://bucket/prefix")
    return source


def _place(url: str) -> Source:
    try:
        place = _parsed(url)
    except ValueError as error:
        raise ValueError(f"the allowed source {url!r} is not accepted: {error}") from None
    if place.revision is not None:
        raise ValueError(f"the allowed source {url!r} must name no revision")
    if place.scheme == "file" and not Path("/", *place.path).is_dir():
        raise ValueError(f"the allowed source {url!r} is not a directory")
    return place


def _parsed(text: str) -> Source:
    found = _SCHEME.fullmatch(text)
    if found is None:
        raise ValueError("expected s3://bucket/prefix, hf://organisation/repository or file:///path")
    scheme, rest = found[1], found[2]
    if scheme == "file":
        return Source("file", _file_path(rest))
    if scheme == "hf":
        return _repository(rest)
    bucket, *prefix = rest.removesuffix("/").split("/")
    if not _BUCKET.fullmatch(bucket) or ".." in bucket or _ADDRESS.fullmatch(bucket):
        raise ValueError(f"{bucket!r} is not the name of a bucket")
    return Source("s3", (bucket, *_segments(prefix)))


def _repository(rest: str) -> Source:
    path, at, revision = rest.partition("@")
    segments = path.removesuffix("/").split("/")
    for name in segments[:2]:
        if not _REPOSITORY.fullmatch(name) or ".." in name:
            raise ValueError(f"{name!r} is not the name of an organisation or a repository")
    if at:
        check_revision(revision)
    return Source("hf", (*segments[:2], *_segments(segments[2:])), revision if at else None)


def check_revision(revision: str) -> None:
    """Raise ValueError unless it is a branch, a tag or a commit."""
    if not _REVISION.fullmatch(revision) or ".." in revision or len(revision) > 255:
        raise ValueError(f"{revision!r} is not a revision")


def _file_path(rest: str) -> tuple[str, ...]:
    if not rest.startswith("/") or "?" in rest or "#" in rest or _TRICKS.search(rest):
        raise ValueError("a file source is file:///path, with no host, no query and no encoded dots or slashes")
    try:
        path = unquote(rest, errors="strict").removesuffix("/").removeprefix("/")
    except UnicodeDecodeError:
        raise ValueError("a file source's path is UTF-8") from None
    segments = tuple(path.split("/")) if path else ()
    if any(segment in ("", ".", "..") or not segment.isprintable() for segment in segments):
        raise ValueError("a file source's path has no empty parts, no . or .. and nothing unprintable")
    return segments


def _segments(segments: Sequence[str]) -> Sequence[str]:
    """Parts of a key as they are stored, from parts that may be percent-encoded."""
    decoded = [_decoded(segment) for segment in segments]
    if len("/".join(decoded).encode()) > _MAX_KEY_BYTES:
        raise ValueError(f"the key has more than {_MAX_KEY_BYTES} bytes")
    return decoded


def _decoded(segment: str) -> str:
    try:
        # A % that encodes nothing stands for itself
        decoded = unquote(re.sub("%(?![0-9A-Fa-f]{2})", "%25", segment), errors="strict")
        decoded.encode()
    except UnicodeError:
        raise ValueError(f"{segment!r} is not accepted: what it encodes is not UTF-8") from None
    if not _SEGMENT.fullmatch(segment) or decoded in (".", "..") or not decoded:
        raise ValueError(f"{segment!r} is not accepted: it is empty or a dot, or has ? or # (write %3F, %23)")
    if re.search(r"[/\\\x00-\x1f\x7f]", decoded):
        raise ValueError(f"{segment!r} is not accepted: it encodes a slash or a control character")
    return decoded
