"""Options in a TOML file, by their names."""

import tomllib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from service.options.parser import Declared


def read_file(path: Path, options: Sequence[Declared], absent: Mapping[str, str]) -> dict[str, Any]:
    """The values that a file sets, as `read_values` has them. Raises ValueError with a sentence that names the file."""
    table = _table(path)
    try:
        return read_values(table, options, absent)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_values(table: Mapping[str, Any], options: Sequence[Declared], absent: Mapping[str, str]) -> dict[str, Any]:
    """The values that a table sets, by field. `-` and `_` are the same in a name.

    `absent` has a sentence for options of other servers. Raises ValueError with a sentence that names the key, and
    shows no value: it may be a secret.
    """
    by_name = {plain(name): option for option in options for name in option.names}
    values: dict[str, Any] = {}
    keys: dict[str, str] = {}  # by field
    for key, given in table.items():
        option = by_name.get(plain(key))
        if option is None:
            raise ValueError(_unknown(key, by_name, absent))
        if option.field in keys:
            raise ValueError(f"{keys[option.field]} and {key} are the same option: set one")
        if option.field == "config":
            raise ValueError(f"{key} cannot be set here: name the file with --config or ROOTSTOCK_CONFIG")
        keys[option.field] = key
        try:
            values[option.field] = option.convert(given)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    return values


def plain(name: str) -> str:
    return name.replace("_", "-")


def _table(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML: {error}") from None


def _unknown(key: str, by_name: Mapping[str, Declared], absent: Mapping[str, str]) -> str:
    """The sentence for a name that is no option."""
    if (reason := absent.get(f"--{plain(key)}")) is not None:
        return f"{key}: {reason}"
    near = get_close_matches(plain(key), by_name, n=1, cutoff=0.0)
    return f"{key} is no option: do you mean {near[0]}? (`python -m service --help` lists all)"
