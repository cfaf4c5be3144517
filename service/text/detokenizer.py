"""Text from tokens as they are generated: whole characters only, cut at the first stop string."""

from collections.abc import Callable, Iterable, Sequence

UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # stands for bytes that are no character, or the beginning of one
WINDOW = 16  # tokens without final text that are kept; a character takes at most 4
KEPT = 8  # of them, once there are more


class Detokenizer:
    """Decodes one sequence of tokens piece by piece; the pieces joined equal the text of the whole sequence.

    `decode` turns token ids into text. Each push decodes the tokens of the last piece again, as context, because a
    token's text may depend on the one before it (SentencePiece drops a space at the beginning of a text).
    `tokenizers.decoders.DecodeStream` works in the same way, but raises where a run of byte tokens becomes invalid
    after its first whole character, and holds special tokens and invalid bytes without a limit.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._context: list[int] = []
        self._pending: list[int] = []  # tokens after the context
        self._emitted = 0  # characters of the context's text that have been returned

    def push(self, token_ids: Sequence[int]) -> str:
        """Append tokens and return the text that is now complete."""
        self._pending += token_ids
        text = self._decode(self._context + self._pending)
        piece = text[self._emitted :]
        if text.endswith(UNKNOWN):
            if len(self._pending) < WINDOW:
                return ""
            self._set_context(self._pending[-KEPT:], held=1)  # only the last byte can still begin a character
            return piece[:-1]
        if len(text) != self._emitted:
            self._set_context(self._pending, held=0)
        elif len(self._pending) >= WINDOW:
            self._pending = []  # special tokens have no text
        return piece

    def flush(self) -> str:
        """Return the rest at the end of a sequence; bytes that did not become a character are UNKNOWN."""
        return self._decode(self._context + self._pending)[self._emitted :]

    def _set_context(self, token_ids: list[int], held: int) -> None:
        self._context, self._pending = token_ids, []
        self._emitted = len(self._decode(token_ids)) - held


class StopStrings:
    """Cuts a text that arrives in pieces at the first stop string to be completed; of several, at the longest.

    With `included`, after it.
    """

    def __init__(self, strings: Iterable[str], *, included: bool = False):
        self._included = included
        self._strings = [string for string in strings if string]
        self._longest = max(map(len, self._strings), default=0)
        self._held = ""  # the end of the text so far, if a stop string begins with it

    def push(self, piece: str, *, stops: bool = True) -> tuple[str, bool]:
        """Return the text before any stop string, and whether one was found.

        Without `stops` none that ends in this piece counts.
        """
        text, known = self._held + piece, len(self._held)
        places = [(text.find(string, max(known + 1 - len(string), 0)), len(string)) for string in self._strings]
        found = [(start + length, start) for start, length in places if start >= 0]
        if found and stops:
            end, start = min(found)
            return text[: end if self._included else start], True
        starts = range(max(0, len(text) - self._longest), len(text))
        held = next((i for i in starts if any(s.startswith(text[i:]) for s in self._strings)), len(text))
        self._held = text[held:]
        return text[:held], False

    def flush(self) -> str:
        """Return the text that was held back, at the end of a sequence."""
        held, self._held = self._held, ""
        return held
