"""The grammar of structural tags.

Free text and what has no end of its own go up to the first place where an end or a trigger is complete: lazy lexemes of
llguidance. What is regular (constants, regexes and what is made of them) becomes one terminal, so that a regex that
could run over the end of its tag ends with it all the same. Where a text could be read in two ways the lexer takes the
longer lexeme: some texts are not generated then, and none that has not the form.

To llguidance a special token, or any added one of the form <...>, is no text. The same characters written by other
tokens are. A tag takes both: a constant in which such a token occurs may be written in either way.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple, NoReturn

import msgspec

from service.grammars import tags
from service.grammars.source import InvalidGrammar
from service.grammars.tags import StructuralTag

MAX_FORMATS = 500
MAX_LEVELS = 50
ANY = "/(?s:.*)/"
RUN = "/(?s:.+)/"


class Markers(NamedTuple):
    """The tokens that are no text to a grammar, by their text."""

    ids: Mapping[str, int] = {}
    special: frozenset[str] = frozenset()  # those of them that are never free text


NO_MARKERS = Markers()


class Parts(NamedTuple):
    """How the grammars of parts are made, each given its place; they raise InvalidGrammar naming it."""

    schema: Callable[[str, Any], str]  # llguidance's JSON
    regex: Callable[[str, str], str]  # a regex literal of Lark
    grammar: Callable[[str, str], str]  # Lark


class Tag(NamedTuple):
    place: str
    begin: str
    content: tags.AnyFormat
    content_place: str
    ends: Sequence[str]


def grammar_of(field: str, content: Any, parts: Parts, markers: Markers) -> str:
    """The grammar of a structural tag. Raises InvalidGrammar naming the place of what is wrong."""
    content = _read(field, content)
    builder = _Builder(parts, markers, "schema" if content.format is None else "json_schema")
    if content.format is not None:
        for name in ("structures", "triggers", "at_least_one"):
            if getattr(content, name) is not None:
                _refuse(f"{field}.{name}", "format says what the answer must look like: send one of them")
        start = builder.closed(content.format, f"{field}.format", None)
    elif content.structures is None or content.triggers is None:
        _refuse(field, "a structural tag needs format, or structures and triggers")
    else:
        found = [
            Tag(
                f"{field}.structures[{index}]",
                each.begin,
                tags.JsonSchemaFormat(json_schema=True if each.schema is None else each.schema),
                f"{field}.structures[{index}]",
                [each.end],
            )
            for index, each in enumerate(content.structures)
        ]
        start = builder.triggered(f"{field}.triggers", content.triggers, found, None, begins=bool(content.at_least_one))
    return builder.whole(start)


def _read(field: str, content: Any) -> StructuralTag:
    if not isinstance(content, str):
        return msgspec.convert(content, StructuralTag)  # which a request's body has been checked to be
    try:
        return msgspec.json.decode(content, type=StructuralTag)
    except msgspec.DecodeError as error:
        _refuse(field, f"a string must hold a structural tag as JSON: {error}")


def _refuse(place: str, message: str) -> NoReturn:
    raise InvalidGrammar(place, message)


class _Builder:
    """Writes rules, terminals and the grammars beside them, each under a name of its own."""

    def __init__(self, parts: Parts, markers: Markers, schema_field: str) -> None:
        self._parts, self._markers, self._schema_field = parts, markers, schema_field
        self._lines: list[str] = [f"ANY: {ANY}", f"RUN: {RUN}"]
        self._beside: list[dict[str, Any]] = []
        self._bodies: dict[str, str] = {}  # by the place of a tag's content
        self._regexes: dict[str, str] = {}  # by pattern, since each format around one looks at it
        self._formats = self._levels = 0
        texts = sorted(markers.ids, key=len, reverse=True)
        self._marker = re.compile("|".join(map(re.escape, texts)) or r"(?!)")

    def whole(self, start: str) -> str:
        lark = "\n".join([f"start: {start}", *self._lines])
        return json.dumps({"grammars": [{"lark_grammar": lark}, *self._beside]})

    def closed(self, form: tags.AnyFormat, place: str, ends: Sequence[str] | None) -> str:
        """A format and one of the ends after it; None: it is the last of the answer."""
        self._formats += 1
        self._levels += 1
        if self._formats > MAX_FORMATS or self._levels > MAX_LEVELS:
            _refuse(place, f"a structural tag has at most {MAX_FORMATS} formats, {MAX_LEVELS} in one another")
        found = self._closed(form, place, ends)
        self._levels -= 1
        return found

    def _closed(self, form: tags.AnyFormat, place: str, ends: Sequence[str] | None) -> str:
        if (regular := self._regular(form, place)) is not None:
            return self._ended(regular, ends or ())
        match form:
            case tags.AnyTextFormat():
                return self._until(ends) if ends else self._free([])
            case tags.TriggeredTagsFormat():
                return self.triggered(
                    f"{place}.triggers",
                    form.triggers,
                    self._tags(form.tags, place),
                    ends,
                    begins=form.at_least_one,
                    once=form.stop_after_first,
                )
            case tags.SequenceFormat(elements=elements):
                for index, element in enumerate(elements[:-1]):
                    if _is_endless(element):
                        _refuse(f"{place}.elements[{index}]", "what has no end must be the last of a sequence")
                last = len(elements) - 1
                written = [
                    self.closed(each, f"{place}.elements[{index}]", ends if index == last else ())
                    for index, each in enumerate(elements)
                ]
                return " ".join(filter(None, written))
            case tags.OrFormat(elements=[only]):
                return self.closed(only, f"{place}.elements[0]", ends)
            case tags.OrFormat(elements=elements):
                if all(isinstance(each, tags.JsonSchemaFormat) for each in elements):
                    _refuse(place, "send one json_schema with anyOf instead of several in or")
                _check_apart([(f"{place}.elements[{index}]", _begins(each)) for index, each in enumerate(elements)])
                return self._rule(
                    " | ".join(
                        self.closed(each, f"{place}.elements[{index}]", ends) for index, each in enumerate(elements)
                    )
                )
        return " ".join(filter(None, [self._part(form, place), self._end(ends)]))

    def _ended(self, regular: str, ends: Sequence[str]) -> str:
        """A regular format and one of the ends, which is written out or has tokens of its own."""
        spelled = " ".join(filter(None, [regular, _one_of([_quoted(end) for end in ends])]))
        ways = [self._terminal(spelled)] if spelled else []
        for end in ends:
            if (token := self._marker.search(end)) is not None:
                text = " ".join(filter(None, [regular, _quoted(end[: token.start()])]))
                parts = [text and self._terminal(text), self._token(token[0]), self._literal(end, token.end())]
                ways.append(" ".join(filter(None, parts)))
        return self._rule(" | ".join(ways)) if len(ways) > 1 else "".join(ways)

    def _part(self, form: tags.AnyFormat, place: str) -> str:
        """A format that ends by itself."""
        match form:
            case tags.ConstStringFormat(value=value):
                return self._literal(value)
            case tags.JsonSchemaFormat(json_schema=schema):
                return self._side(
                    json.loads(self._parts.schema(f"{place}.{self._schema_field}", schema))["grammars"][0]
                )
            case tags.GrammarFormat(grammar=grammar):
                return self._side({"lark_grammar": self._parts.grammar(f"{place}.grammar", grammar)})
            case tags.TagFormat(begin=begin, content=content):
                return self._tag(Tag(place, begin, content, f"{place}.content", _ends(form)))
            case tags.SeparatedTagsFormat(separator=separator):
                found = self._tags(form.tags, place)
                _check_apart([(tag.place, [tag.begin]) for tag in found])
                tag = self._rule(" | ".join(map(self._tag, found)))
                several = tag if form.stop_after_first else f"{tag} ({self._literal(separator)} {tag})*"
                return several if form.at_least_one else f"({several})?"
        raise AssertionError(form)

    def _tags(self, listed: Sequence[tags.ListedTag], place: str) -> list[Tag]:
        return [
            Tag(f"{place}.tags[{index}]", each.begin, each.content, f"{place}.tags[{index}].content", _ends(each))
            for index, each in enumerate(listed)
        ]

    def _tag(self, tag: Tag, written: int = 0) -> str:
        """A tag of whose beginning so many characters have been written."""
        if _is_endless(tag.content) and "" in tag.ends:
            _refuse(f"{tag.place}.end", "what has no end of its own needs a tag with an end that is not empty")
        return " ".join(filter(None, [self._literal(tag.begin, written), self._body(tag)]))

    def _body(self, tag: Tag) -> str:
        """A tag's content and its end, which may follow its beginning in several ways."""
        if tag.content_place not in self._bodies:
            body = self.closed(tag.content, tag.content_place, tag.ends)
            self._bodies[tag.content_place] = self._rule(body) if body else ""
        return self._bodies[tag.content_place]

    def triggered(
        self,
        place: str,
        triggers: Sequence[str],
        found: Sequence[Tag],
        ends: Sequence[str] | None,
        *,
        begins: bool = False,
        once: bool = False,
    ) -> str:
        """Free text with tags: `begins` with one, or ends after the first; up to one of the ends, if there are any."""
        heads = self._heads(place, triggers, found, ends)
        stops = [*heads, *(ends or ())]
        _check_apart([(tag.place, [tag.begin]) for tag in found])
        tag = self._rule(" | ".join(map(self._tag, found))) if begins else ""
        if begins and once:
            return " ".join(filter(None, [tag, self._end(ends)]))
        hits = [hit for trigger, each in heads.items() for hit in self._hits(trigger, each)]
        hit = self._rule(f"{self._others(stops)} ({' | '.join(hits)})")
        rest = self._until(ends, stops) if ends else self._free(stops)
        if once:
            return self._rule(f"{rest} | {hit} {self._end(ends)}")
        return " ".join(filter(None, [tag, f"{hit}*", rest]))

    def _heads(
        self, place: str, triggers: Sequence[str], found: Sequence[Tag], ends: Sequence[str] | None
    ) -> dict[str, list[Tag]]:
        """The triggers, each with its tags. One that begins with another is left out: the other is complete first."""
        heads = [each for each in dict.fromkeys(triggers) if not any(_leads(other, each) for other in triggers)]
        for trigger in heads:
            inside = next((other for other in heads if other != trigger and other in trigger), None)
            if inside is not None:
                _refuse(place, f"{trigger!r} holds the trigger {inside!r}, which would be complete before it")
            if any(trigger in end for end in ends or ()):
                _refuse(place, f"{trigger!r} is in the end of the tag around it, which could not be written then")
            if self._marker.search(trigger) and trigger not in self._markers.ids:
                token = self._marker.search(trigger)
                assert token is not None
                _refuse(place, f"{trigger!r} holds the token {token[0]!r} and other text: make the token the trigger")
        for tag in found:
            if not any(tag.begin.startswith(trigger) for trigger in triggers):
                _refuse(f"{tag.place}.begin", f"{tag.begin!r} begins with none of the triggers")
        tagged = {head: [tag for tag in found if tag.begin.startswith(head)] for head in heads}
        for head, its in tagged.items():
            if not its:
                _refuse(place, f"no tag begins with the trigger {head!r}")
        return tagged

    def _hits(self, trigger: str, found: Sequence[Tag]) -> list[str]:
        """Text up to a trigger that is written out, or to the token in which it is, and the tags of it."""
        after = [self._spelled(tag, len(trigger)) for tag in found]
        hits = [f"{self._lazy(f'ANY {_quoted(trigger)}')} {self._rule(' | '.join(after))}"]
        for tag in found:
            token = next((each for each in self._marker.finditer(tag.begin) if each.end() >= len(trigger)), None)
            if token is not None and token.start() < len(trigger):
                text = self._text_before(tag.begin[: token.start()])
                rest = [self._literal(tag.begin, token.end()), self._body(tag)]
                hits.append(" ".join(filter(None, [text, self._token(token[0]), *rest])))
        return hits

    def _spelled(self, tag: Tag, written: int) -> str:
        """The rest of a tag whose trigger was written out."""
        regular = None if self._marker.search(tag.begin) else self._regular(tag.content, tag.content_place, tag.ends)
        if regular is None:
            return self._tag(tag, written) or '""'
        return self._terminal(" ".join(filter(None, [_quoted(tag.begin[written:]), regular])))

    def _until(self, ends: Sequence[str], stops: Sequence[str] | None = None) -> str:
        """Free text up to the first of the ends, which is written out or has tokens of its own."""
        lazy = self._lazy(f"ANY ({' | '.join(map(_quoted, ends))})")
        ways = [lazy]
        for end in ends:
            if (token := self._marker.search(end)) is not None:
                text = self._text_before(end[: token.start()])
                rest = self._literal(end, token.end())
                ways.append(" ".join(filter(None, [text, self._token(token[0]), rest])))
        return self._rule(f"{self._others(stops or ends)} ({' | '.join(ways)})")

    def _free(self, stops: Sequence[str]) -> str:
        return self._rule(f"{self._others(stops)} RUN?")

    def _text_before(self, text: str) -> str:
        return self._terminal(f"ANY {_quoted(text)}") if text else "RUN?"

    def _others(self, stops: Sequence[str]) -> str:
        """Free text that ends in a token which is none to the grammar, any number of times.

        It is none that is special, and none that could be a part of a stop, or have one.
        """
        shown = [text for text in self._markers.ids if text not in self._markers.special]
        ids = [self._markers.ids[text] for text in shown if not any(_overlap(text, stop) for stop in stops)]
        return f"(RUN? <[{','.join(map(str, sorted(ids)))}]>)*" if ids else ""

    def _literal(self, text: str, written: int = 0) -> str:
        """A constant from a character on, with the tokens that are in it or their characters."""
        found, at = [], written
        for token in self._marker.finditer(text):
            if token.start() >= written:
                found += [_quoted(text[at : token.start()]), f"({self._token(token[0])} | {_quoted(token[0])})"]
                at = token.end()
        return " ".join(filter(None, [*found, _quoted(text[at:])]))

    def _end(self, ends: Sequence[str] | None) -> str:
        return _one_of([self._literal(end) for end in ends or ()])

    def _token(self, text: str) -> str:
        return f"<[{self._markers.ids[text]}]>"

    def _regular(self, form: tags.AnyFormat, place: str, ends: Sequence[str] | None = None) -> str | None:
        """A format with its ends as an expression of terminals; None if it is not regular."""
        after = _one_of([_quoted(end) for end in ends or ()])
        if any(self._marker.search(end) for end in ends or ()):
            return None
        match form:
            case tags.ConstStringFormat(value=value):
                found = None if self._marker.search(value) else _quoted(value)
            case tags.RegexFormat(pattern=pattern):
                if pattern not in self._regexes:
                    self._regexes[pattern] = self._parts.regex(f"{place}.pattern", pattern)
                found = self._regexes[pattern]
            case tags.SequenceFormat(elements=elements) | tags.OrFormat(elements=elements):
                each = [self._regular(one, f"{place}.elements[{index}]") for index, one in enumerate(elements)]
                known = [one for one in each if one is not None]
                if len(known) < len(each):
                    return None
                sequence = isinstance(form, tags.SequenceFormat)
                found = " ".join(filter(None, known)) if sequence else _one_of(known)
            case tags.TagFormat(begin=begin, content=content) if not self._marker.search(begin):
                inner = self._regular(content, f"{place}.content", _ends(form))
                found = None if inner is None else " ".join(filter(None, [_quoted(begin), inner]))
            case _:
                return None
        return None if found is None else " ".join(filter(None, [found, after]))

    def _terminal(self, expression: str) -> str:
        return self._named("T", expression)

    def _rule(self, expression: str) -> str:
        return self._named("r", expression)

    def _lazy(self, expression: str) -> str:
        """A terminal that ends as soon as it can."""
        return self._named("u", self._terminal(expression), "[lazy]")

    def _named(self, letter: str, expression: str, option: str = "") -> str:
        name = f"{letter}{len(self._lines)}"
        self._lines.append(f"{name}{option}: {expression}")
        return name

    def _side(self, grammar: dict[str, Any]) -> str:
        name = f"g{len(self._beside)}"
        self._beside.append({**grammar, "name": name})
        return f"@{name}"


def _check_apart(ways: Sequence[tuple[str, Sequence[str] | None]]) -> None:
    """Raise InvalidGrammar for ways that may begin alike; each has its place and the constants it begins with."""
    for (first, some), (second, others) in combinations(ways, 2):
        if some is None or others is None or any(_same(one, other) for one in some for other in others):
            _refuse(second, f"it cannot be told from {first} by the constant text that it begins with")


def _is_endless(form: tags.AnyFormat) -> bool:
    """Whether a format ends only where something around it says so."""
    match form:
        case tags.TriggeredTagsFormat():
            return not (form.at_least_one and form.stop_after_first)
        case tags.SequenceFormat(elements=elements):
            return _is_endless(elements[-1])
        case tags.OrFormat(elements=elements):
            return any(map(_is_endless, elements))
    return isinstance(form, tags.AnyTextFormat)


def _begins(form: tags.AnyFormat) -> list[str] | None:
    """The constant texts that a format begins with; None if it may begin otherwise."""
    match form:
        case tags.ConstStringFormat(value=begin) | tags.TagFormat(begin=begin):
            return [begin] if begin else None
        case tags.SequenceFormat(elements=elements):
            return _begins(elements[0])
        case tags.OrFormat(elements=elements):
            each = [_begins(one) for one in elements]
            return None if None in each else [text for one in each for text in one or ()]
        case tags.TriggeredTagsFormat() | tags.SeparatedTagsFormat():
            return [tag.begin for tag in form.tags] if form.at_least_one else None
    return None


def _ends(tag: tags.TagFormat | tags.ListedTag) -> Sequence[str]:
    return [tag.end] if isinstance(tag.end, str) else tag.end


def _leads(first: str, second: str) -> bool:
    """Whether a text begins with another one and goes on."""
    return first != second and second.startswith(first)


def _same(one: str, other: str) -> bool:
    return one.startswith(other) or other.startswith(one)


def _overlap(one: str, other: str) -> bool:
    """Whether one text is in the other, or ends with what the other begins with."""
    if one in other or other in one:
        return True
    sizes = range(1, min(len(one), len(other)))
    return any(one[-size:] == other[:size] or other[-size:] == one[:size] for size in sizes)


def _one_of(expressions: Sequence[str]) -> str:
    """One of several expressions, of which some may be empty."""
    some = " | ".join(filter(None, expressions))
    return f"({some})?" if some and "" in expressions else f"({some})" if some else ""


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""
