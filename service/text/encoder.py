"""Encoding of texts off the event loop, in pieces between which it can be stopped."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count

LONG_TEXT = 10_000  # characters; encoding more than this takes longer than a few milliseconds
PIECE = 64 * 1024  # characters that are encoded at a time: about 20 ms and 10 MB
THREADS = 2
# A text that is cut in pieces may have some more tokens than the whole one: at each cut a word or two are broken
SLACK, TOKENS_AT_A_CUT = 1.25, 16


class TooLong(ValueError):
    """A text has too many tokens; `length` says what was counted, of which `unit`."""

    def __init__(self, length: int, unit: str) -> None:
        super().__init__(f"{length} {unit}")
        self.length, self.unit = length, unit


class Stopped(Exception):
    """Nobody waits for the tokens any more."""


class TextEncoder:
    """Encodes texts of bounded length on a few threads of its own; shorter ones are encoded at once.

    `encode` makes token ids of texts, with or without special tokens around each. Memory for a text of 7 million
    tokens is gigabytes, so the tokens of a long text are counted piece by piece before it is encoded as a whole.
    """

    def __init__(self, encode: Callable[[Sequence[str], bool], list[list[int]]], longest_token: int) -> None:
        self._encode = encode
        self._longest_token = longest_token  # characters
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="encoder")

    async def encode(
        self, texts: Sequence[str], special: bool, most: int | None = None, *, last: bool = False
    ) -> list[list[int]]:
        """The token ids of each text. Raises TooLong for a text that has more than about `most` of them.

        With `last`, the beginning of such a text may be left out instead: at least its last `most` tokens stay. When
        the caller is cancelled, the thread ends after the piece that it is at.
        """
        if most is not None and not last:
            longest = max(map(len, texts), default=0)
            if longest > most * self._longest_token:
                raise TooLong(longest, "characters")
        if sum(map(len, texts)) < LONG_TEXT:
            return self._encode(texts, special)
        stop = threading.Event()
        work = asyncio.get_running_loop().run_in_executor(
            self._threads, self._on_thread, texts, special, most, last, stop
        )
        try:
            return await work
        finally:
            stop.set()

    def _on_thread(
        self, texts: Sequence[str], special: bool, most: int | None, last: bool, stop: threading.Event
    ) -> list[list[int]]:
        found = []
        for batch in _batches(texts):
            _go_on(stop)
            if most is not None and len(batch[0]) > PIECE:
                batch = [self._bounded(batch[0], most, last, stop)]
            found += self._encode(batch, special)
        return found

    def _bounded(self, text: str, most: int, last: bool, stop: threading.Event) -> str:
        """A text that is worth encoding: it has about `most` tokens, or fewer. Raises TooLong."""
        tokens = 0
        for number in count(1):
            start, end = PIECE * (number - 1), PIECE * number
            piece = text[-end : -start or None] if last else text[start:end]
            if not piece:
                return text
            _go_on(stop)
            tokens += len(self._encode([piece], False)[0])
            if tokens > SLACK * most + TOKENS_AT_A_CUT * number:
                if not last:
                    raise TooLong(tokens, "tokens")
                return text[-end:]
        raise AssertionError("a text has an end")


def _go_on(stop: threading.Event) -> None:
    if stop.is_set():
        raise Stopped


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in order, as many at a time as make a piece, but at least one."""
    batch: list[str] = []
    length = 0
    for text in texts:
        if batch and length + len(text) > PIECE:
            yield batch
            batch, length = [], 0
        batch.append(text)
        length += len(text)
    if batch:
        yield batch
