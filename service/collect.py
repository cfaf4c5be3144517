"""Garbage collection: delete stored adapter files that no name refers to.

As a command: python -m service.collect [--store URL | --data-directory PATH] [--older-than SECONDS] [--dry-run]
"""

import logging
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from typing import NamedTuple

from service.catalog.files import PREFIX, SUFFIX, open_remote
from service.catalog.names import AdapterNames
from service.options import Parser, argument, declared
from service.settings import Settings, read_with
from storage.local import LocalStore
from storage.store import Entry, Store, StoreError

_log = logging.getLogger(__name__)


class Collected(NamedTuple):
    """The files that were deleted, or would be in a dry run."""

    files: int
    bytes: int


def collect(store: Store, older_than_seconds: float, *, keep: Collection[str] = (), dry_run: bool = False) -> Collected:
    """Delete the files that no name refers to, that are not in `keep`, and that are old enough; blocks.

    A process stores or touches a file just before it writes a name, so the file's age protects it. Files are listed
    before the names are read. Raises StoreError, also for an unreadable name, because it may refer to any file.
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
    """Delete a file, unless it was stored again since it was listed."""
    deleted = store.delete(entry.key, unless_changed=entry)
    if deleted:
        _log.info("deleted %s: no name referred to it", entry.key)
    return deleted


def main(argv: Sequence[str] | None = None, environment: Mapping[str, str] | None = None) -> None:
    """Collect in the store of a service, which may run meanwhile."""
    program, purpose = "python -m service.collect", "Delete stored adapter files that no name refers to."
    parser = Parser(program, purpose, declared(Settings, "store", "data_directory"))
    [age] = declared(Settings, "collect_after_seconds")
    parser.add_argument(
        "--older-than",
        type=argument(age.parse),
        default=age.default,
        metavar="SECONDS",
        help=f"least age of the files that are deleted [{age.default:g}]",
    )
    parser.add_argument("--dry-run", action="store_true", help="only report how many files would be deleted")
    options = read_with(parser, argv, environment)
    try:
        store = LocalStore(options["data_directory"]) if "store" not in options else open_remote(options["store"])
        with closing(store):
            files, size = collect(store, options["older_than"], dry_run=options["dry_run"])
    except StoreError as error:
        sys.exit(f"rootstock: nothing more was deleted: {error}")
    verb = "would delete" if options["dry_run"] else "deleted"
    print(f"{verb} {files} files of {size} bytes")


if __name__ == "__main__":
    main()
