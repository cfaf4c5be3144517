"""Fetching the files of an adapter from the source that a client names."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

from service.errors import RequestError
from service.ingest.bundle import LIMITS, OPTIONAL, WEIGHTS, Bundle, BundleFiles, bundle_in, hint, too_large
from service.ingest.source_files import copy_files
from service.source_urls import AllowedSources, Source, check_revision, source_of
from storage.huggingface import HubRepository
from storage.s3 import S3Store
from storage.store import (
    AccessDenied,
    InvalidKey,
    NotFound,
    ObjectChanged,
    ObjectTooLarge,
    OnProgress,
    Reader,
    StoreError,
    StoreFull,
    StoreUnavailable,
)

_log = logging.getLogger(__name__)
_Remote = TypeVar("_Remote", S3Store, HubRepository)


class Fetched(NamedTuple):
    """A bundle and where it came from."""

    bundle: Bundle
    url: str  # with the commit of a hub repository


class Sources:
    """Knows the allowed sources, and fetches from them: at most `max_bytes` of weights, and no redirects.

    Buckets below `unsigned` are read without credentials. `open_bucket` and `open_repository` have the signatures of
    `S3Store` and `HubRepository`.
    """

    def __init__(
        self,
        allowed: Sequence[str],
        max_bytes: int,
        open_bucket: Callable[..., S3Store] = S3Store,
        open_repository: Callable[[str, str | None, str], HubRepository] = HubRepository,
        unsigned: Sequence[str] = (),
    ) -> None:
        self._unsigned = AllowedSources(unsigned)
        self._allowed, self._max_bytes = AllowedSources(allowed), max_bytes
        self._open_bucket, self._open_repository = open_bucket, open_repository
        self._open: set[S3Store | HubRepository] = set()

    def checked(self, src: str, revision: str | None = None) -> Source:
        """The source that a URL names. Raises RequestError if the URL is invalid or the source is not allowed."""
        try:
            source = source_of(src)
        except ValueError as error:
            raise RequestError("unsupported_source", f"the source is not accepted: {error}", "src") from None
        if revision is not None:
            source = _with_revision(source, revision)
        if self._allowed.place_of(source) is None:
            message = f"{source.url} is not a source that this server allows (--allow-source)"
            raise RequestError("source_not_allowed", message, "src")
        return source

    def fetch(self, source: Source, directory: Path, on_progress: OnProgress) -> Fetched:
        """Fetch the files of a checked source into a directory, which the caller removes in any case. Blocks.

        `on_progress` gets the bytes of the weights so far; its exceptions end the fetch. Raises RequestError if the
        source is missing, unreadable, too large, changes during the fetch, or its store fails; StoreFull, OSError.
        """
        if source.scheme == "file":
            return self._fetch_files(source, directory, on_progress)
        with _translated(source):
            if source.scheme == "s3":
                bucket, *prefix = source.path
                unsigned = self._unsigned.place_of(source) is not None
                with self._opened(self._open_bucket(bucket, "/".join(prefix), unsigned=unsigned)) as store:
                    return Fetched(self._copy(store, directory, on_progress), source.url)
            organisation, name, *folder = source.path
            opened = self._open_repository(f"{organisation}/{name}", source.revision, "/".join(folder))
            with self._opened(opened) as repository:
                pinned = source._replace(revision=repository.commit)
                return Fetched(self._copy(repository, directory, on_progress), pinned.url)

    def close(self) -> None:
        """End the fetches under way."""
        for reader in list(self._open):
            reader.close()

    @contextmanager
    def _opened(self, reader: _Remote) -> Iterator[_Remote]:
        self._open.add(reader)
        try:
            yield reader
        finally:
            self._open.discard(reader)
            reader.close()

    def _fetch_files(self, source: Source, directory: Path, on_progress: OnProgress) -> Fetched:
        place = self._allowed.place_of(source)
        assert place is not None, "a source is checked before it is fetched"
        root, below = Path("/", *place.path), source.path[len(place.path) :]
        files = BundleFiles(directory, self._max_bytes)
        try:
            copy_files(root, below, files, on_progress)
            return Fetched(files.bundle(), source.url)
        except RequestError as error:
            _log.warning("%s: %s", source.url, error)
            raise
        finally:
            files.close()

    def _copy(self, reader: Reader, directory: Path, on_progress: OnProgress) -> Bundle:
        """Fetch the configuration first: it is small, and the file that is most often missing."""
        limits = {**LIMITS, WEIGHTS: self._max_bytes}
        for name, limit in limits.items():
            listener = on_progress if name == WEIGHTS else None
            try:
                reader.fetch(name, directory / name, max_bytes=limit, on_progress=listener)
            except (NotFound, AccessDenied) as error:
                if name in OPTIONAL:  # S3 denies access to what is missing, unless the reader may list the bucket
                    continue
                if isinstance(error, AccessDenied):
                    raise
                raise _failed("source_not_found", f"the source has no {name}{hint(name, ())}", error) from None
            except ObjectTooLarge:
                raise too_large(limit, name) from None
        return bundle_in(directory)


def _with_revision(source: Source, revision: str) -> Source:
    if source.scheme != "hf":
        raise RequestError("unsupported_revision", "revision is for hf:// sources only", "revision")
    try:
        check_revision(revision)
    except ValueError as error:
        raise RequestError("unsupported_revision", str(error), "revision") from None
    if source.revision not in (None, revision):
        message = f"src names the revision {source.revision!r} and revision is {revision!r}: give one"
        raise RequestError("conflicting_revisions", message, "revision")
    return source._replace(revision=revision)


@contextmanager
def _translated(source: Source) -> Iterator[None]:
    """Translate a store's errors for a client. The message names the client's source and nothing of the server."""
    try:
        yield
    except StoreFull:
        raise  # it is about the server's disk
    except NotFound as error:
        raise _failed("source_not_found", f"{source.url} does not exist", error) from None
    except AccessDenied as error:
        raise _failed("source_access_denied", f"the server may not read {source.url}", error) from None
    except ObjectChanged as error:
        raise _failed("source_changed", f"{source.url} changed while it was read", error) from None
    except InvalidKey as error:
        raise _failed("unsupported_source", f"{source.url} cannot be read from its store", error) from None
    except StoreUnavailable as error:
        raise _failed("source_unavailable", f"the store of {source.url} does not answer", error) from None
    except StoreError as error:
        raise _failed("source_broken", f"the store of {source.url} does not work", error) from None


def _failed(code: str, message: str, error: StoreError) -> RequestError:
    """An error for the client, with the reason as far as it is public; all of it is for the operator."""
    _log.warning("%s: %s", message, error)
    return RequestError(code, f"{message}: {error.public}" if error.public else message, "src")
