"""Files of a model repository on the Hugging Face hub, read at one commit."""

import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO, TypeVar

from huggingface_hub import HfApi, constants, get_hf_file_metadata, get_session, hf_hub_url
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

from storage.files import CHUNK_BYTES, atomic_file, disk_errors
from storage.hub_cache import cached_commit, cached_file
from storage.store import (
    AccessDenied,
    InvalidKey,
    NotFound,
    ObjectTooLarge,
    OnProgress,
    StoreError,
    StoreUnavailable,
    checked_key,
)

_COMMIT = re.compile(r"[0-9a-f]{40,64}", re.ASCII)
_TRANSIENT = {408, 429, 500, 502, 503, 504}
_MISSING = {"RepoNotFound": "repository", "RevisionNotFound": "revision", "EntryNotFound": "file"}
_PAUSE_SECONDS = 0.2  # before the first retry; it doubles with each one

_Result = TypeVar("_Result")

# The library reads this at every request; otherwise it asks the hub for a registry of agents once a day.
constants.HF_HUB_DISABLE_TELEMETRY = True


class HubRepository:
    """The files below `folder`, at the commit that `revision` named when the repository was opened.

    huggingface_hub finds the endpoint (HF_ENDPOINT) and the token (HF_TOKEN, a login) unless they are given, and does
    not send the token to the other hosts that the hub redirects to. Its own downloads are not used: they report no
    progress, cannot be cancelled and write into the user's cache; what they have written there (`cache`, by default
    HF_HUB_CACHE) is read, and with HF_HUB_OFFLINE nothing else is. Each step is tried `attempts` times;
    `timeout_seconds` counts the seconds without an answer, not the length of a transfer.
    """

    def __init__(
        self,
        repo: str,
        revision: str | None = None,
        folder: str = "",
        endpoint: str | None = None,
        token: str | None = None,
        *,
        timeout_seconds: float = constants.HF_HUB_DOWNLOAD_TIMEOUT,
        attempts: int = 3,
        cache: Path | None = None,
    ) -> None:
        self._repo = repo
        self._cache = cache or Path(constants.HF_HUB_CACHE)
        self._folder = _checked_folder(folder)
        self._endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self._timeout_seconds = timeout_seconds
        self._attempts = attempts
        self._closed = Event()
        self._headers = {**build_hf_headers(token=token, library_name="rootstock"), "Accept-Encoding": "identity"}
        revision = revision or constants.DEFAULT_REVISION
        name = f"hf://{repo}@{revision}"
        if constants.HF_HUB_OFFLINE:
            commit = cached_commit(repo, revision, self._cache)
            if commit is None:
                raise _not_cached(name)
            self.commit = commit
            return
        api = HfApi(endpoint=self._endpoint, token=token, library_name="rootstock")
        try:
            model = self._tried(name, lambda: api.model_info(repo, revision=revision, timeout=timeout_seconds))
        except HFValidationError as error:
            raise InvalidKey(f"{repo!r} is not the name of a repository: expected 'owner/name'") from error
        except (ValueError, TypeError, KeyError) as error:
            raise StoreError(f"{name}: {self._endpoint} does not answer as the hub does") from error
        self.commit = str(model.sha)
        if not _COMMIT.fullmatch(self.commit):
            raise StoreError(f"{name}: the hub named no commit")

    def close(self) -> None:
        """Make fetches under way fail with StoreUnavailable at their next bytes or timeout; closing twice is fine."""
        self._closed.set()

    def fetch(
        self, key: str, destination: Path, *, max_bytes: int | None = None, on_progress: OnProgress | None = None
    ) -> str:
        path = self._folder + checked_key(key)
        url = hf_hub_url(self._repo, path, revision=self.commit, endpoint=self._endpoint)
        name = f"hf://{self._repo}@{self.commit[:12]}/{path}"
        with disk_errors(key), atomic_file(destination) as file:
            if (cached := cached_file(self._repo, self.commit, path, self._cache)) is not None:
                return self._copy_cached(cached, name, file, max_bytes, on_progress)
            if constants.HF_HUB_OFFLINE:
                raise _not_cached(name)
            return self._tried(name, lambda: self._copy(url, name, file, max_bytes, on_progress))

    def _copy_cached(
        self, cached: Path, name: str, file: BinaryIO, max_bytes: int | None, on_progress: OnProgress | None
    ) -> str:
        """Copy a file of the cache and return its commit as its etag: it never changes."""
        with cached.open("rb") as source:
            size, done = os.fstat(source.fileno()).st_size, 0
            if max_bytes is not None and size > max_bytes:
                raise ObjectTooLarge(f"{name} has {size} bytes; at most {max_bytes} are taken")
            while chunk := source.read(CHUNK_BYTES):
                self._refuse_if_closed(name)
                done += file.write(chunk)
                if on_progress is not None:
                    on_progress(done, size)
        return self.commit

    def _copy(self, url: str, name: str, file: BinaryIO, max_bytes: int | None, on_progress: OnProgress | None) -> str:
        """Write a file's bytes and return its etag; what an earlier attempt has written already is not sent again."""
        found = get_hf_file_metadata(
            url, token=False, timeout=self._timeout_seconds, headers=self._headers, endpoint=self._endpoint
        )
        size, done = found.size, file.tell()
        if size is None:
            raise StoreError(f"{name}: the hub does not state how many bytes it has")
        if max_bytes is not None and size > max_bytes:
            raise ObjectTooLarge(f"{name} has {size} bytes; at most {max_bytes} are taken")
        if done < size:
            headers = {**self._headers, "Range": f"bytes={done}-"} if done else self._headers
            with get_session().stream(
                "GET", url, headers=headers, timeout=self._timeout_seconds, follow_redirects=True
            ) as response:
                hf_raise_for_status(response)
                if response.status_code != 206:
                    done = file.seek(0)
                    file.truncate()
                _check_length(response, name, done, size)
                for chunk in response.iter_raw(CHUNK_BYTES):
                    self._refuse_if_closed(name)
                    done += file.write(chunk)
                    if on_progress is not None:
                        on_progress(done, size)
        return found.etag or ""

    def _tried(self, name: str, call: Callable[[], _Result]) -> _Result:
        """Return the result of a call, which is repeated after transient failures."""
        problem, said = Exception(), ""
        for attempt in range(self._attempts):
            if attempt:
                self._closed.wait(random.uniform(0, _PAUSE_SECONDS * 2**attempt))
            self._refuse_if_closed(name)
            try:
                return call()
            except OfflineModeIsEnabled as error:
                raise _not_cached(name) from error
            except HfHubHTTPError as error:
                if error.response.status_code not in _TRANSIENT:
                    raise self._refusal(error.response, name) from error
                problem, said = error, f"the hub answered {error.response.status_code}"
            except HTTPError as error:
                # the error's own message can hold a redirect's signed address
                problem, said = error, f"no answer of the hub ({type(error).__name__})"
        message = f"{name}: {said}, {self._attempts} times, from {self._endpoint}"
        raise StoreUnavailable(message, public=said) from problem

    def _refuse_if_closed(self, name: str) -> None:
        if self._closed.is_set():
            raise StoreUnavailable(f"{name}: the connection to the hub was closed")

    def _refusal(self, response: Any, name: str) -> StoreError:
        status, code = response.status_code, response.headers.get("X-Error-Code", "")
        if status in (401, 403):
            token = "with the token given" if "authorization" in self._headers else "without a token (HF_TOKEN)"
            said = f"the hub answered {status} {code}"
            needs = "it is private, gated or does not exist: the server needs HF_TOKEN of an account that may read it"
            return AccessDenied(
                f"{name}: it is private, gated or does not exist {token}; {said}",
                public=f"the hub answered {status}; {needs}",
            )
        if status == 404:
            missing = f"there is no such {_MISSING.get(code, 'repository, revision or file')}"
            return NotFound(f"{name}: {missing}", public=missing)
        return StoreError(f"{name}: the hub answered {status} {code}", public=f"the hub answered {status}")


def _not_cached(name: str) -> NotFound:
    what = "it is not in the server's hub cache, and HF_HUB_OFFLINE forbids to fetch it"
    return NotFound(f"{name}: {what}", public=f"{what}: fetch it there with hf download")


def _check_length(response: Any, name: str, start: int, size: int) -> None:
    """Refuse an answer that is not exactly the bytes from `start` to the size that the hub stated."""
    headers = response.headers
    expected = ("Content-Range", f"bytes {start}-{size - 1}/{size}") if start else ("Content-Length", str(size))
    if headers.get(expected[0]) != expected[1] or headers.get("Content-Encoding", "identity") != "identity":
        said = f"it stated {size} and then {headers.get(expected[0])}"
        raise StoreError(f"{name}: the hub does not state clearly how many bytes it has: {said}")


def _checked_folder(folder: str) -> str:
    """The folder with a slash behind it, or "" for the root. Raises InvalidKey if it could lead elsewhere."""
    folder = folder.strip("/")
    if not folder:
        return ""
    if any(part in ("", ".", "..") for part in folder.split("/")):
        raise InvalidKey(f"{folder!r} is not a folder of a repository")
    return f"{folder}/"
