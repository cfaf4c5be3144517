"""python -m service.collect: delete stored adapter files that no name refers to; the service may run meanwhile."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import closing

from service.catalog.files import open_remote
from service.catalog.garbage import collect
from service.options.parser import Parser, argument, declared
from service.settings import Settings, read_with
from storage.local import LocalStore
from storage.store import StoreError


def main(argv: Sequence[str] | None = None, environment: Mapping[str, str] | None = None) -> None:
    """Collect in the store of a service, which may run meanwhile."""
    program, purpose = "python -m service.collect", "Delete stored adapter files that no name refers to."
    parser = Parser(program, purpose, declared(Settings, "config", "store", "data_directory"))
    [age] = declared(Settings, "collect_after_seconds")
    parser.add_argument(
        "--older-than",
        type=argument(age.parse),
        default=age.default,
        metavar="SECONDS",
        help=f"least age of the files that are deleted [{age.default:g}]",
    )
    parser.add_argument("--dry-run", action="store_true", help="only report how many files would be deleted")
    options = read_with(parser, argv, environment).values
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
