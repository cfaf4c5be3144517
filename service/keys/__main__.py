"""python -m service.keys: make, list and revoke the keys in a file; a service reads it again when it changes."""

import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

import msgspec

from service.keys.caller import Scope
from service.keys.keys_file import ID, KeyRecord, KeysFileError, hash_of, new_key, read_keys, write_keys
from service.options.parser import BAD_VALUE, Parser, argument, choice, count, declared, items, size, size_text
from service.settings import Settings, read_with
from storage.scratch import locked

# Of a new key, by field: how each is read, and what it means
LIMITS: dict[str, tuple[Callable[[str], Any], str]] = {
    "adapter_prefix": (str, "it sees and manages only adapters whose names begin so, such as team-a/ [all]"),
    "requests_per_minute": (count, "requests a minute, and as many at once after a minute without any [no limit]"),
    "tokens_per_minute": (count, "tokens of prompts and answers a minute [no limit]"),
    "concurrent_requests": (count, "requests at one time [no limit]"),
    "disk_bytes": (size, "bytes of the adapters that it uploads [no limit]"),
    "pinned_bytes": (size, "bytes of the adapters that it pins in memory [no limit]"),
}


def main(argv: Sequence[str] | None = None, environment: Mapping[str, str] | None = None) -> None:
    """Do what the command line says. A bad value ends the program with a sentence and status 2."""
    options = read_with(parser(), argv, environment).values
    path, id = options.get("keys_file"), options["id"]
    given = {field: options[field] for field in ("scopes", *LIMITS) if options[field] is not None}
    if path is None:
        refuse("name the file: --keys-file FILE, or ROOTSTOCK_KEYS_FILE")
    if (id is None) != (options["do"] == "list"):
        refuse("list takes no id, add and revoke take one: python -m service.keys add ID --keys-file FILE")
    if given and options["do"] != "add":
        refuse(f"{options['do']} takes no --{next(iter(given)).replace('_', '-')}: only add does")
    try:
        if options["do"] == "list":
            listed(path)
        elif options["do"] == "revoke":
            revoke(path, id)
        else:
            add(path, id, given)
    except KeysFileError as error:
        refuse(str(error))
    except OSError as error:
        refuse(f"the keys file {path} cannot be written: {error.strerror}")


def parser() -> Parser:
    found = Parser(
        "python -m service.keys",
        "Make, list and revoke the keys in a file, which a service reads again when it changes. "
        "add prints the new key, once: the file has its hash only.",
        declared(Settings, "keys_file"),
    )
    found.usage = "python -m service.keys {add,list,revoke} [ID] --keys-file FILE [OPTION ...]"
    found.add_argument("do", choices=("add", "list", "revoke"), help="what to do")
    found.add_argument("id", nargs="?", help="the key's name: lower-case letters, digits, '.' and '-'")
    names = ",".join(get_args(Scope))
    found.add_argument(
        "--scopes", type=argument(scopes), metavar=names, help="of add: what it allows, one or several [generate]"
    )
    for field, (parse, text) in LIMITS.items():
        option = f"--{field.replace('_', '-')}"
        metavar = "SIZE" if parse is size else "N" if parse is count else "PREFIX"
        found.add_argument(option, type=argument(parse), metavar=metavar, help=f"of add: {text}")
    return found


def scopes(text: str) -> list[str]:
    """The scopes in a list that is separated by commas. Raises ValueError with a sentence."""
    return [choice(get_args(Scope), each) for each in dict.fromkeys(items(text))]


def add(path: Path, id: str, given: Mapping[str, Any]) -> None:
    """Put a new key into the file, which is made if there is none, and print the key."""
    if not re.fullmatch(ID, id):
        refuse(f"an id is 1 to 64 lower-case letters, digits, '.' and '-', the first no sign, not {id!r}")
    key = new_key(id)
    fields = {"scopes": ["generate"], **given, "id": id, "hash": hash_of(key), "created_at": time.time()}
    try:
        record = msgspec.convert(fields, KeyRecord)
    except msgspec.ValidationError as error:
        refuse(f"the key is not accepted: {error}")
    with locked(path.parent):
        records = read_keys(path) if path.exists() else []
        if any(each.id == id for each in records):
            refuse(f"there is a key {id!r}: revoke it first, or take another id")
        write_keys(path, [*records, record])
    print(key)
    print(f"{path} has the key {id!r} now. It is shown this once: the file has its hash only.", file=sys.stderr)


def revoke(path: Path, id: str) -> None:
    """Take a key out of the file."""
    with locked(path.parent):
        records = read_keys(path)
        if not any(each.id == id for each in records):
            refuse(f"there is no key {id!r} in {path}")
        write_keys(path, [each for each in records if each.id != id])
    print(f"{path} has the key {id!r} no more.", file=sys.stderr)


def listed(path: Path) -> None:
    """Print the keys, one a line, with what is set of each."""
    for record in read_keys(path):
        said = [record.id, ",".join(record.scopes)]
        for field, (parse, _) in LIMITS.items():
            if (value := getattr(record, field)) not in (None, ""):
                said.append(f"{field}={size_text(value) if parse is size else value}")
        print("  ".join(said))


def refuse(reason: str) -> NoReturn:
    print(f"rootstock: {reason}", file=sys.stderr)
    raise SystemExit(BAD_VALUE)


if __name__ == "__main__":
    main()
