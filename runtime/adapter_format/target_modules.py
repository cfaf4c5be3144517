"""Selects the modules of the base that a PEFT configuration targets."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from runtime.adapter_format.errors import InvalidAdapter, shown
from runtime.adapter_format.pattern_process import Match
from runtime.adapter_format.patterns import Question, answers

ALL_LINEAR = "all-linear"  # PEFT's shorthand for every linear layer except the output layer
NOT_LINEAR = ("embed_tokens", "lm_head")
_FIRST_NUMBER = re.compile(r".*?\.[^.]*\.(\d+)\.")  # PEFT's layer of a module, if there is no layers_pattern


class _Pattern(NamedTuple):
    """A regular expression for whole names."""

    text: str


class TargetModules:
    """The modules that a configuration adapts, by PEFT's rules (`check_target_module_exists`).

    That is what `target_modules` selects and `exclude_modules` does not. A list holds names, or last parts of dotted
    names, which `layers_to_transform` restricts to layers; a string is `all-linear` or a regular expression for whole
    names. Raises InvalidAdapter, naming the field.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        targets = config.get("target_modules")
        # PEFT takes none where there are parameters instead
        self._targets = _selector(
            "target_modules", () if targets is None and config.get("target_parameters") else targets
        )
        self._excluded = _selector("exclude_modules", config.get("exclude_modules"))
        self._layers = _layers(config.get("layers_to_transform"))
        self._layers_patterns = _layers_patterns(config.get("layers_pattern"))
        if self._targets is None:
            expected = "expected the names of the modules that the adapter adapts"
            raise InvalidAdapter("target_modules", f"is {shown(config.get('target_modules'))}, {expected}")
        _refuse_layers_in_vain(config)

    def among(self, modules: Sequence[str]) -> frozenset[str]:
        """Return those of the base's modules that PEFT puts an adapter on. Raises InvalidAdapter for a pattern."""
        questions = tuple(self._questions())
        found = dict(zip((q.field for q in questions), answers(questions, tuple(modules)), strict=True))
        assert self._targets is not None
        selected = _selected(self._targets, modules, found.get("target_modules"))
        if self._excluded is not None:
            selected -= _selected(self._excluded, modules, found.get("exclude_modules"))
        if self._layers is not None and isinstance(self._targets, tuple):
            # PEFT asks nothing more of a module that target_modules has by its whole name
            exact, layers = set(self._targets), _layer_of(modules, found.get("layers_pattern"))
            selected = {name for name in selected if name in exact or layers.get(name) in self._layers}
        return frozenset(selected)

    def _questions(self) -> list[Question]:
        whole = {"target_modules": self._targets, "exclude_modules": self._excluded}
        asked = [Question(field, (s.text,), whole=True) for field, s in whole.items() if isinstance(s, _Pattern)]
        if self._layers is not None and self._layers_patterns:
            layer = r"\.(?P<idx>\d+)\."
            asked.append(Question("layers_pattern", self._layers_patterns, before=r"(?:^|.*?\.)", after=layer))
        return asked


Selector = _Pattern | tuple[str, ...] | str


def _selector(field: str, value: object) -> Selector | None:
    if value is None or value == "" or (field == "exclude_modules" and value == []):
        return None
    if isinstance(value, str):
        return ALL_LINEAR if value.lower() == ALL_LINEAR and field == "target_modules" else _Pattern(value)
    if not isinstance(value, list | tuple | set | frozenset) or not all(isinstance(name, str) for name in value):
        raise InvalidAdapter(field, f"is {shown(value)}, expected a string or a list of module names")
    return tuple(value)


def _selected(selector: Selector, modules: Sequence[str], matches: Sequence[Match | None] | None) -> set[str]:
    if isinstance(selector, _Pattern):
        assert matches is not None
        return {name for name, match in zip(modules, matches, strict=True) if match is not None}
    if isinstance(selector, str):
        return {name for name in modules if not name.endswith(NOT_LINEAR)}
    return {name for name in modules if any(name == each or name.endswith(f".{each}") for each in selector)}


def _layers(value: object) -> frozenset[int] | None:
    layers = [value] if isinstance(value, int) and not isinstance(value, bool) else value
    if layers is None or layers == []:
        return None
    if not isinstance(layers, list | tuple) or not all(isinstance(n, int) and not isinstance(n, bool) for n in layers):
        raise InvalidAdapter("layers_to_transform", f"is {shown(value)}, expected layer indices")
    return frozenset(layers)


def _refuse_layers_in_vain(config: Mapping[str, Any]) -> None:
    """Refuse layers where PEFT does: beside a string of modules, and a pattern of layers without any."""
    by_name = isinstance(config["target_modules"], str)
    for field in ("layers_to_transform", "layers_pattern"):
        if by_name and config.get(field) is not None:
            what = "is set beside a string in target_modules"
            raise InvalidAdapter(field, what, "list the names of modules beside it")
    if config.get("layers_pattern") and config.get("layers_to_transform") is None:
        raise InvalidAdapter(
            "layers_pattern", "is set without layers_to_transform", "set layers_to_transform too, or leave it out"
        )


def _layers_patterns(value: object) -> tuple[str, ...]:
    if not value:
        return ()
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, list | tuple) or not all(isinstance(each, str) for each in patterns):
        raise InvalidAdapter("layers_pattern", f"is {shown(value)}, expected a name of lists of layers, or several")
    return tuple(patterns)


def _layer_of(modules: Sequence[str], matches: Sequence[Match | None] | None) -> dict[str, int]:
    """The layer that PEFT finds in the name of each module, if it finds one."""
    if matches is None:
        numbers = {name: match[1] for name in modules if (match := _FIRST_NUMBER.match(name)) is not None}
    else:
        numbers = {name: match[1] for name, match in zip(modules, matches, strict=True) if match and match[1]}
    return {name: int(number) for name, number in numbers.items()}
