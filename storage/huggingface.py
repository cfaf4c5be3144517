"""A repository of the Hugging Face hub, to be read at one commit."""

import io
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import constants, hf_hub_url
from huggingface_hub.errors import HFValidationError

from storage.files import disk_errors, temporary_file
from storage.hub_session import HubSession
from storage.store import (
    MAX_GET_BYTES,
    Entry,
    InvalidKey,
    NotFound,
    OnProgress,
    Stored,
    StoreError,
    checked_key,
    checked_prefix,
    is_key,
)

_COMMIT = re.compile(r"[0-9a-f]{40,64}", re.ASCII)
_MAX_PAGES = 100  # of a list; the hub gives a thousand files or so on each


class HubRepository:
    """The files of a model repository, below `folder`, at the commit that `revision` named when it was opened.

    A `Reader`. Plain HTTP: the library's own download functions would write into the user's cache, cannot be
    bounded, and may fetch from hosts that the hub names (Xet). The library finds the endpoint (HF_ENDPOINT) and
    the token (HF_TOKEN, a login) unless they are given. `timeout_seconds` is for each silence of the server.
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
    ) -> None:
        self._repo = repo
        self._folder = _checked_folder(folder)
        self._session = HubSession(endpoint, token, timeout_seconds, attempts)
        try:
            hf_hub_url(repo, "any")
        except HFValidationError as error:
            raise InvalidKey(f"{repo!r} is not the name of a repository: expected 'owner/name'") from error
        self._api = f"{self._session.endpoint}/api/models/{repo}"
        revision = revision or constants.DEFAULT_REVISION
        answer, _ = self._session.json(f"{self._api}/revision/{quote(revision, safe='')}", f"hf://{repo}@{revision}")
        self.commit = str(answer.get("sha")) if isinstance(answer, dict) else ""
        if not _COMMIT.fullmatch(self.commit):
            raise StoreError(f"hf://{repo}@{revision}: the hub named no commit")
        self._name = f"hf://{repo}@{self.commit[:12]}"

    def close(self) -> None:
        """End transfers under way: they fail with `StoreUnavailable`; closing twice is fine."""
        self._session.close()

    def get(self, key: str) -> Stored:
        file = io.BytesIO()
        etag = self._session.download(*self._address(key), file, MAX_GET_BYTES, None)
        return Stored(file.getvalue(), etag)

    def fetch(
        self, key: str, destination: Path, *, max_bytes: int | None = None, on_progress: OnProgress | None = None
    ) -> str:
        address = self._address(key)
        with disk_errors(key), temporary_file(destination.parent) as (name, file):
            etag = self._session.download(*address, file, max_bytes, on_progress)
            os.rename(name, destination)
        return etag

    def list(self, prefix: str = "") -> list[Entry]:
        checked_prefix(prefix)
        folder = f"/{quote(self._folder)}".rstrip("/")
        url: str | None = f"{self._api}/tree/{self.commit}{folder}?recursive=true"
        entries: list[Entry] = []
        for _ in range(_MAX_PAGES):
            try:
                page, url = self._session.json(str(url), f"{self._name}{folder}")
                entries += _entries(page, self._folder, prefix)
            except NotFound:
                return []  # no such folder
            except (TypeError, KeyError, AttributeError) as error:
                raise StoreError(f"{self._name}{folder}: what the hub answered is no list of files") from error
            if url is None:
                return sorted(entries)
        raise StoreError(f"{self._name}{folder} has too many files to be listed")

    def _address(self, key: str) -> tuple[str, str]:
        """Where a file is, and how to call it in a message."""
        path = self._folder + checked_key(key)
        url = hf_hub_url(self._repo, path, revision=self.commit, endpoint=self._session.endpoint)
        return url, f"{self._name}/{path}"


def _entries(page: Any, folder: str, prefix: str) -> list[Entry]:
    files = [found for found in page if found["type"] == "file" and found["path"].startswith(folder)]
    keyed = ((found["path"].removeprefix(folder), found) for found in files)
    return [
        Entry(key, found["size"], found["oid"], 0.0) for key, found in keyed if is_key(key) and key.startswith(prefix)
    ]


def _checked_folder(folder: str) -> str:
    """The folder with a slash behind it, or "" for the root; `InvalidKey` if it could lead elsewhere."""
    folder = folder.strip("/")
    if not folder:
        return ""
    if any(part in ("", ".", "..") for part in folder.split("/")):
        raise InvalidKey(f"{folder!r} is not a folder of a repository")
    return f"{folder}/"
