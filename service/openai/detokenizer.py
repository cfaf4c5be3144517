"""Text out of tokens as they come: whole characters only, and cut at stop strings."""

from collections.abc import Callable, Iterable, Sequence

UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # what a decoder makes of bytes that are no character, or not yet
LONGEST_CHARACTER = 4  # bytes of UTF-8, and so at most as many tokens
WINDOW = 16  # tokens decoded together; beyond it the oldest are forgotten
KEPT = 8  # of them then


class Detokenizer:
    """Decodes one sequence of tokens piece by piece; the pieces joined are the text of the whole.

    `decode` turns token ids into text. Each push decodes only a short window: a few tokens of context before the new
    ones, since how a token is written may depend on the one before it (a leading space that only counts inside a text).
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._window: list[int] = []
        self._emitted = 0  # characters of the window's text that have been given out
        self._held = 0  # tokens since the text last ended in a whole character

    def push(self, token_ids: Sequence[int]) -> str:
        """Take in the next tokens and give out what is certain of their text."""
        self._window += token_ids
        text = self._decode(self._window)
        if text.endswith(UNKNOWN):
            return self._push_partial(text, len(token_ids))
        piece = text[self._emitted :]
        self._emitted, self._held = len(text), 0
        if piece and token_ids:
            self._restart(token_ids)
        elif len(self._window) > WINDOW:
            self._restart(self._window[-KEPT:])
        return piece

    def flush(self) -> str:
        """What is left at the end of a sequence: characters that never became whole."""
        text = self._decode(self._window)
        piece = text[self._emitted :]
        self._emitted, self._held = len(text), 0
        return piece

    def _push_partial(self, text: str, count: int) -> str:
        self._held += count
        # What was held for longer than any character takes is no beginning of one, but for the very last
        unsure = len(text) - len(text.rstrip(UNKNOWN)) if self._held < LONGEST_CHARACTER else 1
        piece = text[self._emitted : len(text) - unsure]
        self._emitted = max(self._emitted, len(text) - unsure)
        if len(self._window) > WINDOW and unsure == 1:
            self._window = self._window[-KEPT:]
            self._emitted = len(self._decode(self._window)) - 1
        return piece

    def _restart(self, token_ids: Sequence[int]) -> None:
        self._window = list(token_ids)
        self._emitted = len(self._decode(self._window))


class StopStrings:
    """Finds the first of some strings to be completed in a text that comes in pieces.

    One Knuth-Morris-Pratt automaton a string: a character costs the same however long the strings are.
    """

    def __init__(self, strings: Iterable[str]):
        self._strings = [string for string in strings if string]
        self._borders = [_borders(string) for string in self._strings]
        self._matched = [0] * len(self._strings)
        self._kept = ""  # the end of the text so far that a stop string may begin with

    def push(self, piece: str) -> tuple[str, bool]:
        """The text that can be given out now, and whether a stop string was found: it and all after it are cut."""
        if not self._strings:
            return piece, False
        text = self._kept + piece
        for end, character in enumerate(piece, len(self._kept) + 1):
            found = max((len(self._strings[i]) for i in self._advance(character)), default=0)
            if found:
                return text[: end - found], True
        kept = max(self._matched)
        self._kept = text[len(text) - kept :]
        return text[: len(text) - kept], False

    def flush(self) -> str:
        """What was held back in case a stop string had followed."""
        kept, self._kept = self._kept, ""
        return kept

    def _advance(self, character: str) -> Iterable[int]:
        for i, string in enumerate(self._strings):
            matched = self._matched[i]
            while matched and (matched == len(string) or string[matched] != character):
                matched = self._borders[i][matched - 1]
            self._matched[i] = matched = matched + (string[matched] == character)
            if matched == len(string):
                yield i


def _borders(string: str) -> list[int]:
    """For each prefix of a string, the length of its longest proper prefix that is also its suffix."""
    borders = [0]
    for character in string[1:]:
        border = borders[-1]
        while border and string[border] != character:
            border = borders[border - 1]
        borders.append(border + (string[border] == character))
    return borders
