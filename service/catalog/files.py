"""The store of adapters, and where their files are on this machine."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from blake3 import blake3

from runtime.background import yield_to_others
from service.settings import Settings
from service.source_urls import store_of
from storage.cache import DiskCache
from storage.conditions import require_conditions
from storage.local import LocalStore
from storage.s3 import S3Store
from storage.store import AccessDenied, Corrupt, NotFound, OnProgress, Store

PREFIX, SUFFIX = "blobs/", ".safetensors"
_log = logging.getLogger(__name__)
_THREADS = 16  # of the storage's own: a store that does not answer blocks some of them for seconds
ROOM_SECONDS = 60.0  # that a file waits for room in the disk cache while other downloads occupy it
_T = TypeVar("_T")


class AdapterFiles(Protocol):
    """The canonical files of stored adapters, by digest; all methods but path, has, hold and release block."""

    @property
    def scratch(self) -> Path:
        """Where uploads are staged, on the same file system."""
        ...

    def path(self, digest: str) -> Path:
        """Where the file is, or would be."""
        ...

    def has(self, digest: str) -> bool:
        """Whether there is a file at the path."""
        ...

    def add(self, digest: str, file: Path, *, replace: bool) -> None:
        """Store a file durably, unless the store has it and `replace` is false. Raises StoreError, OSError."""
        ...

    def confirm(self, digest: str, file: Path) -> None:
        """Store an added file again if the store has lost it since. Raises StoreError, OSError."""
        ...

    def fetch(self, digest: str, size: int, on_progress: OnProgress | None = None) -> None:
        """Make sure that the file is at its path, with the right bytes. Raises StoreError with the reason."""
        ...

    def hold(self, digest: str, *, pinned: bool = False) -> None:
        """Do not evict the file until it is released as often as it was held.

        `pinned` says that this may last for ever, so that no other file waits for its room.
        """
        ...

    def release(self, digest: str, *, pinned: bool = False) -> None: ...


class AdapterStorage:
    """A store for names and files, and this machine's access to the files."""

    def __init__(self, store: Store, files: AdapterFiles, disk: DiskCache | None = None) -> None:
        self.store, self.files = store, files
        self.disk = disk  # the cache of a remote store
        self._threads = ThreadPoolExecutor(_THREADS, "storage", yield_to_others)

    async def run(self, call: Callable[..., _T], *arguments: Any, **options: Any) -> _T:
        """Run a blocking call on one of the storage's threads."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, partial(call, *arguments, **options))

    def close(self) -> None:
        """Close the store and the cache, without waiting for a call that the store does not answer."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.store.close()  # before the disk: this ends the downloads to it
        if self.disk is not None:
            self.disk.close()


def open_storage(settings: Settings) -> AdapterStorage:
    """The storage that the settings name; blocks. Raises StoreError with a sentence."""
    if settings.store is None:
        return local_storage(settings.data_directory)
    disk = DiskCache(settings.cache_directory, settings.disk_cache_bytes)
    store = open_remote(settings.store)
    try:
        require_conditions(store)
    except AccessDenied as error:
        _log.warning("%s: the server may read its store and change nothing in it", error)
    return cached_storage(store, disk)


def open_remote(url: str) -> S3Store:
    """The store at an s3:// URL. Raises ValueError with a sentence for another one."""
    bucket, *prefix = store_of(url).path
    return S3Store(bucket, "/".join(prefix))


def local_storage(directory: Path) -> AdapterStorage:
    """A directory on this machine."""
    store = LocalStore(directory)
    return AdapterStorage(store, StoredFiles(store))


def cached_storage(store: Store, disk: DiskCache, room_seconds: float = ROOM_SECONDS) -> AdapterStorage:
    """A remote store behind a cache on this machine; a file waits `room_seconds` for room in the cache."""
    return AdapterStorage(store, CachedFiles(store, disk, room_seconds), disk)


class StoredFiles:
    """The files of a store that is a directory: each is used where it is stored."""

    def __init__(self, store: LocalStore) -> None:
        self._store = store

    @property
    def scratch(self) -> Path:
        return self._store.scratch.path

    def path(self, digest: str) -> Path:
        return self._store.path(blob_key(digest))

    def has(self, digest: str) -> bool:
        return self.path(digest).exists()

    def add(self, digest: str, file: Path, *, replace: bool) -> None:
        _store_file(self._store, digest, file, replace)

    def confirm(self, digest: str, file: Path) -> None:
        if not self.has(digest):
            self._store.put(blob_key(digest), file)

    def fetch(self, digest: str, size: int, on_progress: OnProgress | None = None) -> None:
        path = self.path(digest)
        if not path.exists():
            raise NotFound(f"its file {blob_key(digest)} is missing from the store")
        found = blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()
        if found != digest:
            raise Corrupt(f"its file {blob_key(digest)} is corrupt: its digest is {found}")

    def hold(self, digest: str, *, pinned: bool = False) -> None:
        pass  # nothing is evicted from a store

    def release(self, digest: str, *, pinned: bool = False) -> None:
        pass


class CachedFiles:
    """The files of a remote store: fetched into a cache when the engine asks for them."""

    def __init__(self, store: Store, disk: DiskCache, room_seconds: float) -> None:
        self._store, self._disk, self._room_seconds = store, disk, room_seconds
        self.path, self.has = disk.path, disk.has
        self.hold, self.release = disk.hold, disk.release

    @property
    def scratch(self) -> Path:
        return self._disk.scratch.path

    def add(self, digest: str, file: Path, *, replace: bool) -> None:
        _store_file(self._store, digest, file, replace)
        self._disk.add(digest, file)

    def confirm(self, digest: str, file: Path) -> None:
        if not self._store.list(blob_key(digest)):
            self._store.put(blob_key(digest), file if file.exists() else self._disk.path(digest))

    def fetch(self, digest: str, size: int, on_progress: OnProgress | None = None) -> None:
        def download(destination: Path) -> None:
            self._store.fetch(blob_key(digest), destination, max_bytes=size, on_progress=on_progress)

        self._disk.fetch(digest, size, download, wait_seconds=self._room_seconds)


def _store_file(store: Store, digest: str, file: Path, replace: bool) -> None:
    """Put a file, or renew the age of the stored one, so that no collector deletes it before a name points at it."""
    key, size = blob_key(digest), file.stat().st_size
    same = not replace and any(entry.bytes == size for entry in store.list(key) if entry.key == key)
    if not (same and store.touch(key)):
        store.put(key, file)


def blob_key(digest: str) -> str:
    return f"{PREFIX}{digest}{SUFFIX}"
