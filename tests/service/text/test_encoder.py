"""Long texts are encoded in bounded pieces on threads that stop when nobody waits any more."""

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from service.text.encoder import PIECE, TextEncoder, TooLong
from service.text.tokenizer import Tokenizer


class Counting:
    """Makes a token of each word, and notes what it was given."""

    def __init__(self) -> None:
        self.given: list[int] = []  # characters of each call
        self.threads: set[str] = set()

    def encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        self.given.append(sum(map(len, texts)))
        self.threads.add(threading.current_thread().name)
        return [[len(word) for word in text.split()] for text in texts]


def test_a_text_of_too_many_tokens_is_refused_after_the_pieces_that_show_it() -> None:
    counting = Counting()
    encoder = TextEncoder(counting.encode, longest_token=1000)
    with pytest.raises(TooLong) as refused:
        asyncio.run(encoder.encode(["a " * (20 * PIECE)], False, PIECE))
    assert refused.value.unit == "tokens"
    assert counting.given == [PIECE] * 3, "half a piece's characters are tokens, and a quarter more is let pass"


def test_a_text_of_too_many_characters_is_not_encoded_at_all() -> None:
    counting = Counting()
    with pytest.raises(TooLong) as refused:
        asyncio.run(TextEncoder(counting.encode, longest_token=10).encode(["a" * 1001], False, 100))
    assert (refused.value.length, refused.value.unit, counting.given) == (1001, "characters", [])


def test_a_long_text_that_fits_is_encoded_whole_and_not_on_the_event_loop() -> None:
    counting = Counting()
    text = "abc " * PIECE
    found = asyncio.run(TextEncoder(counting.encode, longest_token=10).encode([text, "x y"], False, 2 * PIECE))
    assert found == [[3] * PIECE, [1, 1]]
    assert max(counting.given) == len(text)
    assert all(name.startswith("encoder") for name in counting.threads)


def test_many_texts_are_encoded_some_at_a_time() -> None:
    counting = Counting()
    texts = ["ab " * 1000] * 100
    assert asyncio.run(TextEncoder(counting.encode, longest_token=10).encode(texts, False, 1000)) == [[2] * 1000] * 100
    assert max(counting.given) <= PIECE < sum(counting.given)


def test_encoding_stops_when_nobody_waits() -> None:
    begun, go_on = threading.Event(), threading.Event()
    calls = []

    def encode(texts: Sequence[str], special: bool) -> list[list[int]]:
        calls.append(len(texts))
        begun.set()
        go_on.wait(20)
        return [[] for _ in texts]

    async def leave() -> None:
        encoder = TextEncoder(encode, longest_token=10)
        waiting = asyncio.create_task(encoder.encode(["a " * PIECE] * 50, False))
        await asyncio.to_thread(begun.wait, 20)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        go_on.set()
        assert await encoder.encode(["b " * PIECE], False) == [[]]

    asyncio.run(leave())
    assert len(calls) == 2, "the piece that was under way, and the next caller's"


@pytest.mark.parametrize("most", [100, 5000])
def test_the_last_tokens_of_a_long_text_are_those_of_the_whole(default_model_path: Path, most: int) -> None:
    tokenizer = Tokenizer(default_model_path)
    text = " ".join(f"word{number} 東京 is {number * 7}," for number in range(20_000))
    [found] = asyncio.run(tokenizer.encode_texts([text], most=most, last=True))
    assert found[-most:] == tokenizer.encode(text)[-most:]
    assert len(found) < len(text) // 4
