"""Tool calls in a text that arrives in pieces."""

import json
import re
from contextlib import suppress
from typing import NamedTuple

from service.tool_calls.syntax import Syntax

# A call whose name comes first, as all families write it: its arguments can be streamed.
_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*')
_BETWEEN = " \t\r\n,;[]"  # between the calls of a list or a row


class Begun(NamedTuple):
    """A call begins; its arguments follow."""

    name: str


class Arguments(NamedTuple):
    """More of the JSON text of the last call's arguments."""

    text: str


class Text(NamedTuple):
    """Text that belongs to no call."""

    text: str


Piece = Begun | Arguments | Text


class ToolCallParser:
    """Splits the text of one answer into text and calls; nothing is lost: what is no call comes out as text.

    `inside` for an answer that a grammar forces to be calls from its start.
    """

    def __init__(self, syntax: Syntax, *, inside: bool = False) -> None:
        self._syntax = syntax
        self._held = ""  # text that has not been decided on
        self._inside = inside  # between the marks
        self._text_begun = False  # whether more than white space has come since the last call
        self._calls = 0
        self._object: _Object | None = None  # the call that is being read

    def push(self, text: str) -> list[Piece]:
        """The pieces that are now certain."""
        self._held += text
        pieces: list[Piece] = []
        while self._held and self._advance(pieces):
            pass
        return pieces

    def flush(self) -> list[Piece]:
        """The rest at the end of the answer: a call that was cut off, or text."""
        pieces = [] if self._object is None else self._object.flush()
        if self._held and (self._held.strip(_BETWEEN) or not (self._calls or self._inside)):
            pieces.append(Text(self._held))
        self._object, self._held = None, ""
        return pieces

    def _advance(self, pieces: list[Piece]) -> bool:
        """Take something off `_held`; False if more text has to come first."""
        if self._object is not None:
            found, self._held = self._object.push(self._held)
            self._calls += sum(isinstance(piece, Begun) for piece in found)
            pieces += found
            if self._object.ended:
                self._object = None
            return True
        if self._inside:
            return self._between()
        return self._outside(pieces) if self._syntax.begin else self._whole_answer(pieces)

    def _outside(self, pieces: list[Piece]) -> bool:
        """Text, up to the mark of a call; white space beside a call belongs to neither."""
        begin = self._syntax.begin
        place = self._held.find(begin)
        if place >= 0:
            self._say(self._held[:place], pieces)
            self._held = self._held[place + len(begin) :]
            self._inside, self._text_begun = True, False
            return True
        starts = range(max(len(self._held) - len(begin) + 1, 0), len(self._held) + 1)
        certain = next(start for start in starts if begin.startswith(self._held[start:]))
        if self._say(self._held[:certain], pieces):
            self._held = self._held[certain:]
        return False

    def _whole_answer(self, pieces: list[Piece]) -> bool:
        """Without marks, calls are the whole answer or no part of it: its first character decides."""
        if not self._text_begun and self._held.lstrip().startswith("{"):
            self._inside = self._text_begun = True
            return True
        if self._say(self._held, pieces):
            self._held = ""
        return False

    def _between(self) -> bool:
        """Between the marks, and before or after a call."""
        self._held = self._held.lstrip(_BETWEEN)
        end = self._syntax.end
        if self._held.startswith("{"):
            self._object = _Object()
            return True
        if not self._held or (end != self._held and end.startswith(self._held)):
            return False
        if end:
            self._held = self._held.removeprefix(end)
        self._inside = False  # text again
        return True

    def _say(self, text: str, pieces: list[Piece]) -> bool:
        """Text is certain; False if it is white space that may belong to a call."""
        self._text_begun |= bool(text.strip())
        if self._text_begun and text:
            pieces.append(Text(text))
        return self._text_begun


class _Object:
    """One JSON object as it comes: a call, or text if it turns out to be none."""

    def __init__(self) -> None:
        self.ended = False
        self._text = ""
        self._scanned = 0  # characters of `_text` that were looked at
        self._depth, self._in_string, self._escaped = 0, False, False
        self._name: str | None = None  # once the arguments have begun
        self._sent = 0  # how far the arguments were returned
        self._end: int | None = None  # of the arguments

    def push(self, text: str) -> tuple[list[Piece], str]:
        """The pieces that are now certain, and the text after the object."""
        known = self._name is not None
        self._text += text
        while self._scanned < len(self._text) and not self.ended:
            self._look_at(self._text[self._scanned])
            self._scanned += 1
        rest, self._text = self._text[self._scanned :], self._text[: self._scanned]
        if self._name is None:
            return (self._whole() if self.ended else []), rest
        pieces: list[Piece] = [] if known else [Begun(self._name)]
        if more := self._text[self._sent : self._end]:
            pieces.append(Arguments(more))
        self._sent = max(self._sent, self._end or len(self._text))
        return pieces, rest

    def flush(self) -> list[Piece]:
        """The rest of an object that was cut off."""
        return [Text(self._text)] if self._name is None and self._text else []

    def _look_at(self, character: str) -> None:
        """Follow strings and braces, to where the arguments and the object end."""
        if self._in_string:
            if self._escaped or character == "\\":
                self._escaped = not self._escaped
            elif character == '"':
                self._in_string = False
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
            if self._depth == 2 and character == "{" and self._name is None:
                self._begin_arguments()
        elif character in "}]":
            self._depth -= 1
            if self._depth == 1 and self._name is not None and self._end is None:
                self._end = self._scanned + 1
            self.ended = self._depth == 0

    def _begin_arguments(self) -> None:
        """Know the name, if this brace begins the arguments after it; a name that is no JSON is left to `_whole`."""
        head = _HEAD.fullmatch(self._text, 0, self._scanned)
        if head is not None:
            with suppress(ValueError):
                self._name, self._sent = json.loads(head[1]), self._scanned

    def _whole(self) -> list[Piece]:
        """The call that a complete object is, whatever the order of its keys."""
        try:
            call = json.loads(self._text)
        except (ValueError, RecursionError):
            return [Text(self._text)]
        name, arguments = call.get("name"), call.get("arguments", call.get("parameters", {}))
        if not isinstance(name, str):
            return [Text(self._text)]
        return [Begun(name), Arguments(arguments if isinstance(arguments, str) else json.dumps(arguments))]
