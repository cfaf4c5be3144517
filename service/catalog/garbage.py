"""Garbage collection: delete stored adapter files that no name refers to."""

import logging
from collections.abc import Collection
from typing import NamedTuple

from service.catalog.files import PREFIX, SUFFIX
from service.catalog.names import AdapterNames
from storage.store import Entry, Store

_log = logging.getLogger(__name__)


class Collected(NamedTuple):
    """The files that were deleted, or would be in a dry run."""

    files: int
    bytes: int


def collect(store: Store, older_than_seconds: float, *, keep: Collection[str] = (), dry_run: bool = False) -> Collected:
    """Delete the files that no name refers to, that are not in `keep`, and that are old enough. Blocks.

    A process stores or touches a file just before it writes a name, so the file's age protects it: its age by the
    store's own clock, as this machine's may be fast. Files are listed before the names are read. Raises StoreError,
    also for an unreadable name, because it may refer to any file.
    """
    newest = store.now() - older_than_seconds
    old = [entry for entry in store.list(PREFIX) if entry.modified_at <= newest and entry.key.endswith(SUFFIX)]
    if not old:
        return Collected(0, 0)
    names = AdapterNames(store)
    records = [record for name in names.changed() if (record := names.read(name)) is not None]
    referenced = {record.digest for record in records}.union(keep)
    unreferenced = [entry for entry in old if entry.key.removeprefix(PREFIX).removesuffix(SUFFIX) not in referenced]
    deleted = [entry for entry in unreferenced if dry_run or _delete(store, entry)]
    return Collected(len(deleted), sum(entry.bytes for entry in deleted))


def _delete(store: Store, entry: Entry) -> bool:
    """Delete a file, unless it was stored again since it was listed."""
    deleted = store.delete(entry.key, unless_changed=entry)
    if deleted:
        _log.info("deleted %s: no name referred to it", entry.key)
    return deleted
