"""The options that a Struct declares, on the command line, in the environment and in a file."""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, NoReturn, Union, get_args, get_origin

import msgspec
from msgspec.structs import FieldInfo

from runtime.config import MIB, Option, options_of

BAD_VALUE = 2  # the exit status
UNITS = {"": 1, "K": 1024, "M": MIB, "G": 1024 * MIB}
GROUPS = ("server", "model", "adapters", "K/V cache", "scheduling", "device")  # the order of --help
TYPES = {  # of TOML; all others are times
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "a table",
}

# Of a value, the first one that has it; else it is a default. A program that embeds the service is the only source
Source = Literal["command line", "environment", "file", "program"]


class Given(NamedTuple):
    """The values that are set, by field, and where each comes from."""

    values: dict[str, Any]
    sources: dict[str, Source]


class Declared:
    """An option with the names, the parser and the help text that follow from its declaration."""

    def __init__(self, field: FieldInfo, option: Option) -> None:
        self.field, self.default, self.option = field.name, field.default, option
        kind = field.type.__origin__
        # Without "| None"; a Literal with it is a Union, other types with it are a UnionType
        self.kind = get_args(kind)[0] if get_origin(kind) in (Union, UnionType) else kind
        self.name = option.name or field.name.replace("_", "-")
        self.names = (self.name, *option.aliases)
        self.variables = (f"ROOTSTOCK_{self.name.replace('-', '_').upper()}", *option.variables)

    def parse(self, text: str) -> Any:
        """The field's value. Raises ValueError with a sentence."""
        value = (self.option.parse or parser_of(self.field, self.kind))(text)
        self.option.check(value)
        return value

    def convert(self, given: Any) -> Any:
        """The field's value, from one of a TOML file. Raises ValueError with a sentence."""
        many, is_size = get_origin(self.kind) is tuple, self.field.endswith("_bytes")
        if many and isinstance(given, list) and all(isinstance(item, str) for item in given):
            return tuple(given)
        kinds: dict[Any, tuple[type, ...]] = {bool: (bool,), int: (int,), float: (int, float)}
        types = (list,) if many else (int, str) if is_size else kinds.get(self.kind, (str,))
        if many or type(given) not in types:
            size = 'bytes, such as 1048576 or "512M"'
            expected = "a list of texts" if many else size if is_size else TYPES[types[-1]]
            found = "one with other items" if many and isinstance(given, list) else TYPES.get(type(given), "a time")
            raise ValueError(f"expected {expected}, not {found}")
        if isinstance(given, float):
            return self.parse(f"{given:.9f}")
        return self.parse(str(given).lower() if isinstance(given, bool) else str(given))

    def add_to(self, group: argparse._ArgumentGroup) -> None:
        """Add the option to the command line; its aliases have no line of their own in --help."""
        how: dict[str, Any] = {"dest": self.field, "default": argparse.SUPPRESS}
        if self.kind is bool:
            how["action"] = argparse.BooleanOptionalAction
        elif get_origin(self.kind) is tuple:
            how |= {"action": "append", "metavar": self._metavar()}
        else:
            how |= {"type": argument(self.parse), "metavar": self._metavar()}
        group.add_argument(f"--{self.name}", help=self._help().replace("%", "%%"), **how)
        for alias in self.option.aliases:
            group.add_argument(f"--{alias}", help=argparse.SUPPRESS, **how)

    @property
    def unit(self) -> str:
        """What the value is: a unit, a list of choices, or a kind."""
        if get_origin(self.kind) is Literal:
            return ", ".join(get_args(self.kind))
        if self.field.endswith("_bytes"):
            return "bytes"
        many = get_origin(self.kind) is tuple
        return self.option.unit or {bool: "yes or no", float: "seconds", Path: "path"}.get(self.kind, "list" * many)

    def _metavar(self) -> str:
        if get_origin(self.kind) is Literal:
            return "|".join(get_args(self.kind))
        if self.field.endswith("_bytes"):
            return "SIZE"
        return {int: "N", float: self.option.unit.upper() or "SECONDS", Path: "PATH"}.get(
            self.kind, self.name.split("-")[-1].upper()
        )

    def _help(self) -> str:
        aliases = "".join(f"; also --{alias}" for alias in self.option.aliases)
        return f"{self.option.help} [{self.default_text}; {' or '.join(self.variables)}{aliases}]"

    @property
    def default_text(self) -> str:
        """The default as one would write it, or in words."""
        if self.option.unset is not None:
            return self.option.unset
        if self.kind is bool:
            return "yes" if self.default else "no"
        if self.field.endswith("_bytes"):
            return size_text(self.default)
        return f"{self.default:g}" if self.kind is float else str(self.default)


def declared(struct: type[msgspec.Struct], *fields: str) -> list[Declared]:
    """The options that a Struct declares: all of them, or those of the named fields."""
    found = [Declared(field, option) for field, option in options_of(struct)]
    return [option for option in found if not fields or option.field in fields]


class Parser(argparse.ArgumentParser):
    """A command line of declared options, which refuses a bad value with one sentence and status 2."""

    def __init__(self, prog: str, description: str, options: Sequence[Declared]) -> None:
        super().__init__(
            prog=prog,
            usage=f"{prog} [OPTION ...]",
            description=f"{description} A SIZE is in bytes or has the unit K, M or G (powers of 1024). In brackets: "
            "the default; the environment variable, which is read if the option is not on the command line. A TOML "
            "file that --config names is read last.",
            formatter_class=partial(argparse.HelpFormatter, max_help_position=36),
        )
        self._options = options
        groups = {title: self.add_argument_group(title) for title in GROUPS}
        for option in options:
            option.add_to(groups[option.option.group])

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_VALUE, f"rootstock: {message}\n")

    def read(self, argv: Sequence[str] | None, environment: Mapping[str, str]) -> Given:
        """The values of the command line, else of the environment. A bad value ends the program."""
        given = vars(self.parse_args(argv))
        values = {field: tuple(value) if isinstance(value, list) else value for field, value in given.items()}
        sources: dict[str, Source] = dict.fromkeys(values, "command line")
        for option in self._options:
            for variable in option.variables:
                text = environment.get(variable, "")
                if variable == "ROOTSTOCK_PORT" and text.startswith("tcp://"):
                    continue  # not ours: Kubernetes sets it in the pods beside a Service that is named rootstock
                if text and option.field not in values:
                    values[option.field] = self._parse(option, variable, text)
                    sources[option.field] = "environment"
        return Given(values, sources)

    def _parse(self, option: Declared, variable: str, text: str) -> Any:
        try:
            return option.parse(text)
        except ValueError as error:
            self.error(f"{variable}: {error}")


class PrintTable(argparse.Action):
    """Prints the text in `const`, and ends the program."""

    def __init__(self, option_strings: Sequence[str], dest: str, const: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, const=const, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(self.const, end="")
        parser.exit()


class AbsentOption(argparse.Action):
    """An option of other servers, refused with the sentence in `const` and hidden in --help."""

    def __init__(self, option_strings: Sequence[str], dest: str, nargs: str, const: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=nargs, const=const, help=argparse.SUPPRESS)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        raise argparse.ArgumentError(self, self.const)


def argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser for argparse, which shows the sentence of an ArgumentTypeError but not that of a ValueError."""

    def parse_argument(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse_argument


def parser_of(field: str, kind: Any) -> Callable[[str], Any]:
    """The parser of a field, by its type and by the unit in its name."""
    if get_origin(kind) is Literal:
        return partial(choice, get_args(kind))
    if get_origin(kind) is tuple:
        return items
    if field.endswith("_bytes"):
        return size
    parsers: dict[Any, Callable[[str], Any]] = {bool: switch, int: count, float: seconds, Path: Path}
    return parsers.get(kind, str)


def choice(values: Sequence[str], text: str) -> str:
    if text not in values:
        raise ValueError(f"invalid choice: {text!r} is not one of {', '.join(values)}")
    return text


def switch(text: str) -> bool:
    values = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if text.lower() not in values:
        raise ValueError(f"{text!r} is not one of {', '.join(values)}")
    return values[text.lower()]


def items(text: str) -> tuple[str, ...]:
    """The parts of a list that is separated by commas or newlines."""
    return tuple(part for piece in re.split(r"[,\n]", text) if (part := piece.strip()))


def count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise ValueError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def seconds(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
        raise ValueError(f"{text!r} is not a number of seconds such as 2 or 0.5")
    return float(text)


def size(text: str) -> int:
    """Bytes, from a number with an optional K, M or G (powers of 1024)."""
    found = re.fullmatch(r"([0-9]{1,18})([KMG]?)", text.upper())
    if found is None:
        raise ValueError(f"{text!r} is not a number of bytes such as 1048576, 512M or 2G")
    return int(found[1]) * UNITS[found[2]]


def size_text(value: int) -> str:
    """The shortest text of a size that `size` reads as the same number."""
    unit = max((unit for unit in UNITS if value % UNITS[unit] == 0), key=lambda unit: UNITS[unit]) if value else ""
    return f"{value // UNITS[unit]}{unit}"
