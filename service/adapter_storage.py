"""Where adapters are kept for good, and where their files lie on this machine."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from blake3 import blake3

from service.settings import Settings
from service.source_urls import store_of
from storage.cache import DiskCache
from storage.local import LocalStore
from storage.s3 import S3Store
from storage.store import Corrupt, NotFound, OnProgress, Store

PREFIX, SUFFIX = "blobs/", ".safetensors"


class AdapterFiles(Protocol):
    """The canonical files of stored adapters, by digest; all but `path`, `has`, `hold` and `release` block."""

    scratch: Path  # where uploads are staged, on the same file system

    def path(self, digest: str) -> Path:
        """Where the file is, or would be."""
        ...

    def has(self, digest: str) -> bool:
        """Whether there is a file at the path."""
        ...

    def add(self, digest: str, file: Path, *, replace: bool) -> None:
        """Store a file durably, unless the store has it and `replace` is false; StoreError, OSError."""
        ...

    def bring(self, digest: str, size: int, on_progress: OnProgress | None = None) -> None:
        """See to it that the file is there and whole. Raises StoreError with the reason why it cannot be."""
        ...

    def hold(self, digest: str) -> None:
        """Keep the file here until it is released as often as it was held."""
        ...

    def release(self, digest: str) -> None: ...


class AdapterStorage(NamedTuple):
    """A store for names and files, and this machine's way to the files; `disk` is the cache of a remote store."""

    store: Store
    files: AdapterFiles
    disk: DiskCache | None
    close: Callable[[], None]


def open_storage(settings: Settings) -> AdapterStorage:
    """The storage that the settings name; blocks. Raises StoreError with a sentence."""
    if settings.store is None:
        return local_storage(settings.data_directory)
    disk = DiskCache(settings.cache_directory, settings.disk_cache_bytes)
    return cached_storage(open_remote(settings.store), disk)


def open_remote(url: str) -> S3Store:
    """The store at an s3:// URL. Raises ValueError with a sentence for another one."""
    bucket, *prefix = store_of(url).path
    return S3Store(bucket, "/".join(prefix))


def local_storage(directory: Path) -> AdapterStorage:
    """A directory on this machine."""
    store = LocalStore(directory)
    return AdapterStorage(store, StoredFiles(store), None, store.close)


def cached_storage(store: Store, disk: DiskCache) -> AdapterStorage:
    """A remote store behind a cache on this machine."""

    def close() -> None:
        disk.close()
        store.close()

    return AdapterStorage(store, CachedFiles(store, disk), disk, close)


class StoredFiles:
    """The files of a store that is a directory: they lie where they are stored."""

    def __init__(self, store: LocalStore) -> None:
        self._store = store
        self.scratch = store.scratch.path

    def path(self, digest: str) -> Path:
        return self._store.path(blob_key(digest))

    def has(self, digest: str) -> bool:
        return self.path(digest).exists()

    def add(self, digest: str, file: Path, *, replace: bool) -> None:
        if replace or not self._store.touch(blob_key(digest)):
            self._store.put(blob_key(digest), file)

    def bring(self, digest: str, size: int, on_progress: OnProgress | None = None) -> None:
        path = self.path(digest)
        if not path.exists():
            raise NotFound(f"its file {blob_key(digest)} is missing from the store")
        found = blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()
        if found != digest:
            raise Corrupt(f"its file {blob_key(digest)} is corrupt: its digest is {found}")

    def hold(self, digest: str) -> None:
        pass  # nothing is evicted from a store

    def release(self, digest: str) -> None:
        pass


class CachedFiles:
    """The files of a remote store: fetched into a cache when they are wanted."""

    def __init__(self, store: Store, disk: DiskCache) -> None:
        self._store, self._disk = store, disk
        self.scratch = disk.scratch.path
        self.path, self.has = disk.path, disk.has
        self.hold, self.release = disk.hold, disk.release

    def add(self, digest: str, file: Path, *, replace: bool) -> None:
        if replace or not self._store.touch(blob_key(digest)):
            self._store.put(blob_key(digest), file)
        self._disk.add(digest, file)

    def bring(self, digest: str, size: int, on_progress: OnProgress | None = None) -> None:
        def download(destination: Path) -> None:
            self._store.fetch(blob_key(digest), destination, max_bytes=size, on_progress=on_progress)

        self._disk.fetch(digest, size, download)


def blob_key(digest: str) -> str:
    return f"{PREFIX}{digest}{SUFFIX}"
