"""Text from tokens piece by piece: the pieces are the whole, no character is split, stop strings are cut."""

import random
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

from service.text.detokenizer import UNKNOWN, WINDOW, Detokenizer, StopStrings
from tests.service.tiny_model import make_tokenizer

BYTE_LEVEL = make_tokenizer()
TEXTS = st.text(st.characters(codec="utf-8"), max_size=40)


def metaspace() -> Tokenizer:
    """As SentencePiece makes them: words begin with a space, which a text's first one loses; bytes are tokens too."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁b", "ab"]
    tokenizer = Tokenizer(BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


METASPACE = metaspace()


def decode(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    return tokenizer.decode(list(token_ids), skip_special_tokens=True)


def pieces_of(tokenizer: Tokenizer, groups: Sequence[Sequence[int]]) -> list[str]:
    detokenizer = Detokenizer(lambda token_ids: decode(tokenizer, token_ids))
    return [*map(detokenizer.push, groups), detokenizer.flush()]


@given(TEXTS, st.data())
def test_the_pieces_of_a_text_are_the_text_and_split_no_character(text: str, data: st.DataObject) -> None:
    token_ids = BYTE_LEVEL.encode(text).ids
    cuts = sorted(data.draw(st.sets(st.integers(0, len(token_ids)))))
    groups = [token_ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(token_ids)], strict=True)]
    pieces = pieces_of(BYTE_LEVEL, groups)
    assert "".join(pieces) == text
    assert UNKNOWN in text or not any(UNKNOWN in piece for piece in pieces)


@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=80))
def test_any_tokens_become_what_they_decode_to_together(token_ids: list[int]) -> None:
    assert "".join(pieces_of(BYTE_LEVEL, [[i] for i in token_ids])) == decode(BYTE_LEVEL, token_ids)


@pytest.mark.parametrize("token", ["Ð", "ł", "ÿ"])
def test_a_long_run_of_bytes_that_are_no_characters_is_decoded_all_the_same(token: str) -> None:
    token_ids = [BYTE_LEVEL.token_to_id(token)] * 100
    assert "".join(pieces_of(BYTE_LEVEL, [[i] for i in token_ids])) == decode(BYTE_LEVEL, token_ids)


@given(TEXTS, st.sampled_from(["a", "b", "▁a", "▁b", "ab", "▁"]))
def test_spaces_that_count_only_inside_a_text_are_kept(text: str, first: str) -> None:
    token_ids = [METASPACE.token_to_id(first)]
    for character in text:
        known = METASPACE.token_to_id(character)
        token_ids += [known] if known else [METASPACE.token_to_id(f"<0x{byte:02X}>") for byte in character.encode()]
        token_ids.append(METASPACE.token_to_id("▁a"))
    assert "".join(pieces_of(METASPACE, [[i] for i in token_ids])) == decode(METASPACE, token_ids)


BYTES = [METASPACE.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]


def test_characters_made_of_byte_tokens_follow_each_other() -> None:
    for text in ("a€€a", "😀😀", "€" * 50 + "b", "é€😀" * 20):
        token_ids = [METASPACE.token_to_id(c) if c in "ab" else BYTES[b] for c in text for b in c.encode()]
        assert "".join(pieces_of(METASPACE, [[i] for i in token_ids])) == decode(METASPACE, token_ids) == text


@given(st.lists(st.integers(0, METASPACE.get_vocab_size() - 1), max_size=80))
def test_byte_tokens_that_become_invalid_spoil_no_text_after_them(token_ids: list[int]) -> None:
    # One invalid byte makes the decoder show a whole run as invalid, characters that were returned among it
    token_ids += [METASPACE.token_to_id("▁a"), METASPACE.token_to_id("▁b")]
    text = "".join(pieces_of(METASPACE, [[i] for i in token_ids]))
    assert text.replace(UNKNOWN, "").endswith(decode(METASPACE, token_ids).rpartition(UNKNOWN)[2])


def test_special_tokens_are_no_text_and_cost_no_memory() -> None:
    longest = 0

    def measured(token_ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(token_ids))
        return decode(BYTE_LEVEL, token_ids)

    detokenizer = Detokenizer(measured)
    hello = BYTE_LEVEL.encode("hello").ids
    pieces = [detokenizer.push([i]) for i in [*hello, *[1] * 500, *hello]]
    assert "".join(pieces) == "hellohello"
    assert longest <= WINDOW + 1


def test_each_push_decodes_a_few_tokens_however_long_the_text_is() -> None:
    decoded = 0

    def counted(token_ids: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(token_ids)
        return decode(BYTE_LEVEL, token_ids)

    detokenizer = Detokenizer(counted)
    for token_id in BYTE_LEVEL.encode("größe €uro 😀" * 500).ids:
        detokenizer.push([token_id])
    assert decoded < 16 * len(BYTE_LEVEL.encode("größe €uro 😀" * 500).ids)


def first_stop(text: str, stops: Sequence[str], after: int = 0, *, included: bool = False) -> tuple[str, bool]:
    """The specification: the stop string that is complete first, `after` so many characters, ends the text.

    Of several, the longest.
    """
    for end in range(after + 1, len(text) + 1):
        found = max((len(stop) for stop in stops if stop and text[:end].endswith(stop)), default=0)
        if found:
            return text[: end if included else end - found], True
    return text, False


@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    st.integers(0, 12),
    st.booleans(),
)
def test_a_stop_string_is_found_however_the_text_is_cut(
    pieces: list[str], stops: list[str], least: int, included: bool
) -> None:
    """None counts that ends in the first `least` pieces, but one that begins there and ends later does."""
    finder = StopStrings(stops, included=included)
    given_out = []
    stopped = False
    for index, piece in enumerate(pieces):
        text, stopped = finder.push(piece, stops=index >= least)
        given_out.append(text)
        if stopped:
            break
    if not stopped:
        given_out.append(finder.flush())
    after = len("".join(pieces[:least]))
    assert ("".join(given_out), stopped) == first_stop("".join(pieces), stops, after, included=included)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3))
def test_nothing_is_held_back_that_no_stop_string_begins_with(text: str, stops: list[str]) -> None:
    finder = StopStrings(stops)
    for prefix in accumulate(text):
        piece, stopped = finder.push(prefix[-1])
        if stopped:
            return
        held = finder.flush()
        finder = StopStrings(stops)  # flush ends a text, so play it again
        for character in prefix:
            finder.push(character)
        assert not held or any(stop.startswith(held) for stop in stops)
        assert prefix.endswith(piece + held) or piece == ""


MULTILINGUAL = (
    "Grüße aus München, 東京 and 😀👩‍👩‍👧! \n\n  def f(x):\n\treturn x  # naïve",
    "Привет, мир. Как дела? Ёлка — 10 €",
    "नमस्ते दुनिया, यह एक परीक्षा है।",
    "السلام عليكم ورحمة الله",
    "日本語のテキスト、한국어 텍스트, ไทย",
)


@pytest.fixture(scope="module")
def default_tokenizer(default_model_path: Path) -> Tokenizer:
    return Tokenizer.from_file(str(default_model_path / "tokenizer.json"))


@pytest.mark.parametrize("text", MULTILINGUAL)
def test_an_embedded_tokenizers_text_comes_out_whole(default_tokenizer: Tokenizer, text: str) -> None:
    token_ids = default_tokenizer.encode(text).ids
    for size in (1, 2, 5):
        groups = [token_ids[i : i + size] for i in range(0, len(token_ids), size)]
        pieces = pieces_of(default_tokenizer, groups)
        assert "".join(pieces) == text
        assert not any(UNKNOWN in piece for piece in pieces)


def test_any_tokens_of_the_embedded_model_become_what_they_decode_to(default_tokenizer: Tokenizer) -> None:
    for seed in range(300):
        chance = random.Random(seed)
        # Among the first 300 tokens are all single bytes, so every other sequence has long runs of invalid ones
        vocabulary = 300 if seed % 2 else default_tokenizer.get_vocab_size()
        token_ids = [chance.randrange(vocabulary) for _ in range(100)]
        text = "".join(pieces_of(default_tokenizer, [[i] for i in token_ids]))
        assert text == decode(default_tokenizer, token_ids), f"seed {seed}"
