"""Deleting what nothing refers to: stored adapter files that no name points at.

As a command: python -m service.collect [--store URL | --data-directory PATH] [--older-than SECONDS] [--dry-run]
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from typing import NamedTuple

from service.catalog.files import PREFIX, SUFFIX, open_remote
from service.catalog.names import AdapterNames
from service.settings import add_store_location, seconds
from storage.local import LocalStore
from storage.store import Entry, Store, StoreError

_log = logging.getLogger(__name__)
_LEAST_AGE_SECONDS = 60


class Collected(NamedTuple):
    """What was deleted, or would be."""

    files: int
    bytes: int


def collect(store: Store, older_than_seconds: float, *, keep: Collection[str] = (), dry_run: bool = False) -> Collected:
    """Delete every file that no name points at, that is not in `keep`, and that nobody stored again lately; blocks.

    A process that is about to name a file has just stored it, or made it new, so that its age protects it. Files are
    listed before the names are read. Raises StoreError, also for an unreadable name, which may point at any file.
    """
    newest = time.time() - older_than_seconds
    old = [entry for entry in store.list(PREFIX) if entry.modified_at <= newest and entry.key.endswith(SUFFIX)]
    if not old:
        return Collected(0, 0)
    names = AdapterNames(store)
    records = [record for name in names.changed() if (record := names.read(name)) is not None]
    wanted = {record.digest for record in records}.union(keep)
    unreferenced = [entry for entry in old if entry.key.removeprefix(PREFIX).removesuffix(SUFFIX) not in wanted]
    deleted = [entry for entry in unreferenced if dry_run or _delete(store, entry)]
    return Collected(len(deleted), sum(entry.bytes for entry in deleted))


def _delete(store: Store, entry: Entry) -> bool:
    """Delete a file, unless somebody has stored it again since it was listed."""
    deleted = store.delete(entry.key, unless_changed=entry)
    if deleted:
        _log.info("deleted %s: no name pointed at it", entry.key)
    return deleted


def _age(text: str) -> float:
    age = seconds(text)
    if age < _LEAST_AGE_SECONDS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is less than {_LEAST_AGE_SECONDS} seconds: the name of a file just stored may be on its way"
        )
    return age


def main(argv: Sequence[str], environment: Mapping[str, str]) -> None:
    """Collect in the store of a service, which may run meanwhile."""
    arguments = argparse.ArgumentParser(
        prog="python -m service.collect", description="Delete stored adapter files that no name points at."
    )
    add_store_location(arguments, environment)
    arguments.add_argument("--older-than", type=_age, default="900", metavar="SECONDS", help="default: 900")
    arguments.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    options = arguments.parse_args(argv)
    try:
        store = LocalStore(options.data_directory) if options.store is None else open_remote(options.store)
        with closing(store):
            files, size = collect(store, options.older_than, dry_run=options.dry_run)
    except StoreError as error:
        sys.exit(f"rootstock: nothing more was deleted: {error}")
    print(f"{'would delete' if options.dry_run else 'deleted'} {files} files of {size} bytes")


if __name__ == "__main__":
    main(sys.argv[1:], os.environ)
