"""Selects the modules of the base that a PEFT configuration targets."""

import re
from collections.abc import Mapping
from typing import Any

from runtime.adapter_format.errors import InvalidAdapter, shown

ALL_LINEAR = "all-linear"  # PEFT's shorthand for every linear layer except the output layer
NOT_LINEAR = ("embed_tokens", "lm_head")
MAX_PATTERN_CHARACTERS = 1000
MAX_QUANTIFIERS = 3
MAX_GROUPS = 4

# An untrusted regular expression may take exponential time. One of name characters, classes, anchors, alternatives and
# unquantified groups of different literal words takes little on a module's short name.
ATOM = r"(?:[A-Za-z0-9_\-.]|\\[.d]|\[[A-Za-z0-9_\-]+\])"
_LITERAL = r"(?:[A-Za-z0-9_\-]|\\[.d])"
_GROUP = rf"\((?:\?:)?({_LITERAL}+(?:\|{_LITERAL}+)*)\)(?![*+?{{])"
_SAFE_PATTERN = re.compile(rf"(?:{ATOM}[*+]?|[\^$|]|{_GROUP})+")


class TargetModules:
    """The modules that `target_modules` selects and `exclude_modules` does not, by PEFT's rules.

    A list holds names, or last parts of dotted names; a string is `all-linear` or a regular expression for whole
    names. Raises InvalidAdapter, naming the field.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._targets = _selector("target_modules", config.get("target_modules"))
        self._excluded = _selector("exclude_modules", config.get("exclude_modules"))
        if self._targets is None:
            expected = "expected the names of the modules that the adapter adapts"
            raise InvalidAdapter("target_modules", f"is {shown(config.get('target_modules'))}, {expected}")
        if isinstance(self._targets, re.Pattern) and config.get("layers_to_transform") not in (None, []):
            raise InvalidAdapter("layers_to_transform", "is set beside a pattern in target_modules: PEFT takes either")
        if config.get("layers_pattern") not in (None, [], "", "layers", ["layers"]):
            raise InvalidAdapter("layers_pattern", f"is {shown(config['layers_pattern'])}, expected null or layers")

    def names(self, module: str) -> bool:
        """Return whether PEFT puts an adapter on a module of this name."""
        assert self._targets is not None
        return _selects(self._targets, module) and not (self._excluded is not None and _selects(self._excluded, module))


Selector = re.Pattern[str] | tuple[str, ...] | str


def _selector(field: str, value: object) -> Selector | None:
    if value is None or value == "" or (field == "exclude_modules" and value == []):
        return None
    if isinstance(value, str):
        return ALL_LINEAR if value.lower() == ALL_LINEAR and field == "target_modules" else _pattern(field, value)
    if not isinstance(value, list | tuple | set | frozenset) or not all(isinstance(name, str) for name in value):
        raise InvalidAdapter(field, f"is {shown(value)}, expected a string or a list of module names")
    return tuple(value)


def _pattern(field: str, value: str) -> re.Pattern[str]:
    if not _is_safe(value):
        limits = f"at most {MAX_QUANTIFIERS} * or + and {MAX_GROUPS} groups of different words such as (q|v)"
        raise InvalidAdapter(field, f"is {shown(value)}, expected a list of names, or a pattern with {limits}")
    try:
        return re.compile(value)
    except re.error as error:
        raise InvalidAdapter(field, f"is {shown(value)}, which is not a pattern: {error}") from None


def _is_safe(pattern: str) -> bool:
    if len(pattern) > MAX_PATTERN_CHARACTERS or not _SAFE_PATTERN.fullmatch(pattern):
        return False
    groups = [group.split("|") for group in re.findall(_GROUP, pattern)]
    different = all(len(set(words)) == len(words) for words in groups)
    return different and len(groups) <= MAX_GROUPS and pattern.count("*") + pattern.count("+") <= MAX_QUANTIFIERS


def _selects(selector: Selector, module: str) -> bool:
    if isinstance(selector, re.Pattern):
        return selector.fullmatch(module) is not None
    if isinstance(selector, str):
        return not module.endswith(NOT_LINEAR)
    return any(module == name or module.endswith(f".{name}") for name in selector)
