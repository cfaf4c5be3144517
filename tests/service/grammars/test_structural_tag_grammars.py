"""The grammars of structural tags: exactly the texts of the form can be written, judged by Python's `re`."""

import random
import re
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer

from service.grammars import translation
from service.grammars.source import InvalidGrammar, Source
from service.grammars.structural_tags import NO_MARKERS, Markers
from service.grammars.tags import StructuralTag
from tests.service.tiny_model import SPECIAL, make_tokenizer

MARKS = ("<call>", "</call>", "<note>")
END = 2


def marked_tokenizer() -> Tokenizer:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    return tokenizer


TOKENIZER = marked_tokenizer()
MARKERS = Markers({text: TOKENIZER.token_to_id(text) for text in (*MARKS, *SPECIAL)}, frozenset(SPECIAL))
ONE = {"type": "json_schema", "json_schema": {"const": 1}}
TWO = {"type": "json_schema", "json_schema": {"enum": [2, "x"]}}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> LLTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    TOKENIZER.save(str(path))
    return LLTokenizer(str(path), n_vocab=TOKENIZER.get_vocab_size(), eos_token=END)


def translated(asked: dict[str, Any] | str, markers: Markers = NO_MARKERS) -> str:
    tag = asked if isinstance(asked, str) else msgspec.convert({"type": "structural_tag", **asked}, StructuralTag)
    source = Source("tag", "structural_tag", tag if isinstance(tag, str) else msgspec.to_builtins(tag))
    return translation.translated(source, markers)


def of_format(form: dict[str, Any], markers: Markers = NO_MARKERS) -> str:
    return translated({"format": form}, markers)


def spelled(text: str) -> list[int]:
    """A text by tokens of single bytes: no token hides where a lexeme ends."""
    plain = make_tokenizer()
    return [token_id for byte in text for token_id in plain.encode(byte).ids]


def fits(compiled: LLTokenizer, grammar: str, token_ids: list[int]) -> bool:
    matcher = LLMatcher(compiled, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


def tag(begin: str, content: dict[str, Any], end: str | list[str]) -> dict[str, Any]:
    return {"begin": begin, "content": content, "end": end}


TRIGGERED = {"type": "triggered_tags", "triggers": ["<f"]}
TAGS = [tag("<f=a>", ONE, "</f>"), tag("<f=b>", TWO, "</f>")]
A, B, FREE = "<f=a>1</f>", '<f=b>(?:2|"x")</f>', "(?:(?!<f).)*"
PIECES = ("<f", "=a>", "=b>", "1", "2", '"x"', "</f>", "<", "f", ";", "\n", "è")
# What each allows in Python's words, and the pieces of which texts are made
CASES: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "older": (
        {
            "structures": [
                {"begin": "<f=a>", "schema": {"const": 1}, "end": "</f>"},
                {"begin": "<f=b>", "schema": {"enum": [2, "x"]}, "end": "</f>"},
            ],
            "triggers": ["<f"],
        },
        f"(?:{FREE}(?:{A}|{B}))*{FREE}",
        PIECES,
    ),
    "triggered": ({"format": {**TRIGGERED, "tags": TAGS}}, f"(?:{FREE}(?:{A}|{B}))*{FREE}", PIECES),
    "a trigger that begins others": (
        {"format": {**TRIGGERED, "triggers": ["<f=b", "<f", "<f=a>"], "tags": TAGS}},
        f"(?:{FREE}(?:{A}|{B}))*{FREE}",
        PIECES,
    ),
    "triggers that differ": (
        {"format": {**TRIGGERED, "triggers": ["<f=a", "<f=b"], "tags": TAGS}},
        f"(?:(?:(?!<f=[ab]).)*(?:{A}|{B}))*(?:(?!<f=[ab]).)*",
        PIECES,
    ),
    "at least one": (
        {"format": {**TRIGGERED, "tags": TAGS, "at_least_one": True}},
        f"(?:{A}|{B})(?:{FREE}(?:{A}|{B}))*{FREE}",
        PIECES,
    ),
    "once": (
        {"format": {**TRIGGERED, "tags": TAGS, "stop_after_first": True}},
        f"{FREE}(?:{A}|{B})?",
        PIECES,
    ),
    "exactly one": (
        {"format": {**TRIGGERED, "tags": TAGS, "at_least_one": True, "stop_after_first": True}},
        f"{A}|{B}",
        PIECES,
    ),
    "regexes and any text in tags": (
        {
            "format": {
                **TRIGGERED,
                "tags": [
                    tag("<f=a>", {"type": "regex", "pattern": "[12]+"}, "</f>"),
                    tag("<f=b>", {"type": "any_text"}, ["</f>", ";"]),
                ],
            }
        },
        f"(?:{FREE}(?:<f=a>[12]+</f>|<f=b>(?:(?!</f>|;).)*(?:</f>|;)))*{FREE}",
        PIECES,
    ),
    "a sequence": (
        {
            "format": {
                "type": "sequence",
                "elements": [
                    {"type": "tag", "begin": "<t>", "content": {"type": "any_text"}, "end": "</t>"},
                    {"type": "const_string", "value": ";"},
                    {**TRIGGERED, "tags": TAGS[:1]},
                ],
            }
        },
        f"<t>(?:(?!</t>).)*</t>;(?:{FREE}{A})*{FREE}",
        ("<t>", "</t>", "</t>;", *PIECES),
    ),
    "tags in a tag": (
        {
            "format": {
                "type": "tag",
                "begin": "<t>",
                "content": {**TRIGGERED, "tags": TAGS[:1]},
                "end": ["</t>", "!"],
            }
        },
        f"<t>(?:(?:(?!<f|</t>|!).)*{A})*(?:(?!<f|</t>|!).)*(?:</t>|!)",
        ("<t>", "</t>", "!", "<f=a>1</f>", *PIECES),
    ),
    "or": (
        {
            "format": {
                "type": "or",
                "elements": [
                    {"type": "const_string", "value": "1"},
                    {"type": "tag", **TAGS[0]},
                    {"type": "sequence", "elements": [{"type": "const_string", "value": "2;"}, {"type": "any_text"}]},
                ],
            }
        },
        f"1|{A}|2;.*",
        PIECES,
    ),
    "constants and regexes": (
        {
            "format": {
                "type": "or",
                "elements": [
                    {"type": "regex", "pattern": "[12]*"},
                    {"type": "sequence", "elements": [{"type": "const_string", "value": "1"}, TWO]},
                ][:1],
            }
        },
        "[12]*",
        ("1", "2", ";"),
    ),
    "separated": (
        {"format": {"type": "tags_with_separator", "separator": ";", "tags": TAGS}},
        f"(?:(?:{A}|{B})(?:;(?:{A}|{B}))*)?",
        ("<f=a>1</f>", "<f=b>2</f>", *PIECES),
    ),
    "separated, at least one": (
        {"format": {"type": "tags_with_separator", "separator": "", "tags": TAGS, "at_least_one": True}},
        f"(?:{A}|{B})+",
        ("<f=a>1</f>", "<f=b>2</f>", *PIECES),
    ),
    "a grammar": (
        {"format": {**TRIGGERED, "tags": [tag("<f=a>", {"type": "grammar", "grammar": 'root ::= "1" | "2"'}, "</f>")]}},
        f"(?:{FREE}<f=a>[12]</f>)*{FREE}",
        PIECES,
    ),
}


STARTS = ("", "<t>", "<t>;</t>;", "<f=a>1</f>", '<f=b>"x"</f>', "2;")


def texts_of(pieces: tuple[str, ...], expression: str) -> Iterator[str]:
    """Random texts; half of them are cut to the longest beginnings that fit, so that many fit as a whole."""
    rng = random.Random(1)
    for number in range(150):
        text = rng.choice(STARTS) + "".join(rng.choice((*pieces, *STARTS)) for _ in range(rng.randint(0, 7)))
        if number % 2:
            text = next(text[:end] for end in range(len(text), -1, -1) if end == 0 or fullmatch(expression, text[:end]))
        yield text
    yield from ("<t><f=a>1</f>!", "<t>ab</t>", "2;<f", "1", "1212", "<f=a>12</f>", "<f=b>;</f>", "<f=b>1<</f></f>")


def fullmatch(expression: str, text: str) -> bool:
    return re.fullmatch(expression, text, re.DOTALL) is not None


@pytest.mark.parametrize("name", CASES)
def test_exactly_the_texts_of_the_form_can_be_written(compiled: LLTokenizer, name: str) -> None:
    asked, expression, pieces = CASES[name]
    grammar = translated(asked)
    both = {True: 0, False: 0}
    for text in texts_of(pieces, expression):
        expected = fullmatch(expression, text)
        assert fits(compiled, grammar, spelled(text)) is expected, text
        both[expected] += 1
    assert min(both.values()) >= 3, both


def tokens(*parts: str | int) -> list[int]:
    return [each for part in parts for each in ([part] if isinstance(part, int) else spelled(part))]


CALL, LLAC, NOTE = (MARKERS.ids[mark] for mark in MARKS)
CALLS = {
    "type": "triggered_tags",
    "triggers": ["<call>"],
    "tags": [
        tag("<call>a ", ONE, "</call>"),
        tag("<call>b ", {"type": "any_text"}, "\n</call>"),
        tag("<call>r ", {"type": "or", "elements": [{"type": "regex", "pattern": "[0-9a-z<]*"}]}, "</call>"),
    ],
}


@pytest.mark.parametrize("trigger", ["<call>", "<ca"])
@pytest.mark.parametrize("ends", [(LLAC, True), ("</call>", True), (" </call>", False), (NOTE, False)])
@pytest.mark.parametrize("begin", [CALL, "<call>"])
def test_a_tag_may_be_a_token_and_its_characters(
    compiled: LLTokenizer, trigger: str, begin: str | int, ends: tuple[str | int, bool]
) -> None:
    grammar = of_format({**CALLS, "triggers": [trigger]}, MARKERS)
    end, good = ends
    assert fits(compiled, grammar, tokens("so ", begin, "a 1", end, " and")) is good
    assert fits(compiled, grammar, tokens(begin, "b c", end)) is False  # the end has a line of its own
    assert fits(compiled, grammar, tokens(begin, "b c\nd\n", end)) is good
    assert fits(compiled, grammar, tokens(begin, "r 12<", end)) is good
    assert not fits(compiled, grammar, tokens(begin, "r 12;", end))
    assert not fits(compiled, grammar, tokens(begin, "c 1", end))
    assert not fits(compiled, grammar, tokens("so ", begin))
    assert fits(compiled, grammar, tokens("<", "so", "<c"))


def test_other_tokens_that_an_answer_shows_are_free_text_and_special_ones_are_not(compiled: LLTokenizer) -> None:
    for grammar in (of_format(CALLS, MARKERS), of_format({"type": "any_text"}, MARKERS)):
        assert fits(compiled, grammar, tokens("so", NOTE, NOTE, "and", NOTE))
        assert not fits(compiled, grammar, tokens("so", MARKERS.ids[SPECIAL[1]]))
    assert fits(compiled, of_format({"type": "any_text"}, MARKERS), tokens(CALL))
    thought = {"type": "tag", "begin": "<note>", "content": {"type": "any_text"}, "end": "</call>"}
    for begin, end in ((NOTE, LLAC), ("<note>", "</call>"), (NOTE, "</call>")):
        assert fits(compiled, of_format(thought, MARKERS), tokens(begin, "so", CALL, end))
        assert not fits(compiled, of_format(thought, MARKERS), tokens(begin, "so", end, end))
    overlapping = {**thought, "end": ["all>", ">.", ". <"]}
    assert not fits(compiled, of_format(overlapping, MARKERS), tokens(NOTE, CALL, ">."))
    assert fits(compiled, of_format(overlapping, MARKERS), tokens(NOTE, "c", "all>"))


@pytest.mark.parametrize(
    ("asked", "place", "said"),
    [
        ({}, "tag", "format, or structures and triggers"),
        ({"structures": [{"begin": "<f>", "end": ""}]}, "tag", "format, or structures and triggers"),
        ({"format": ONE, "triggers": ["a"]}, "tag.triggers", "send one of them"),
        ({"structures": [{"begin": "<f>", "end": ""}], "triggers": ["<f", "<g"]}, "tag.triggers", "trigger '<g'"),
        (
            {"structures": [{"begin": "<f>", "end": "", "schema": {"not": {}}}], "triggers": ["<f"]},
            "tag.structures[0].schema",
            "at /not: ",
        ),
        ({"format": {**TRIGGERED, "tags": [*TAGS, TAGS[0]]}}, "tag.format.tags[2]", "from tag.format.tags[0]"),
        (
            {"format": {**TRIGGERED, "tags": [*TAGS, tag("<g>", ONE, "")]}},
            "tag.format.tags[2].begin",
            "none of the triggers",
        ),
        (
            {"format": {**TRIGGERED, "triggers": ["<f", "a<f="], "tags": [*TAGS, tag("a<f=>", ONE, "")]}},
            "tag.format.triggers",
            "holds the trigger",
        ),
        (
            {"format": {"type": "tag", **tag("<t>", {**TRIGGERED, "triggers": ["<"], "tags": TAGS}, "</t>")}},
            "tag.format.content.triggers",
            "the end of the tag around it",
        ),
        ({"format": {**TRIGGERED, "tags": [tag("<f>", {"type": "any_text"}, "")]}}, "tag.format.tags[0].end", "empty"),
        (
            {"format": {"type": "sequence", "elements": [{"type": "any_text"}, ONE]}},
            "tag.format.elements[0]",
            "last of a sequence",
        ),
        ({"format": {"type": "or", "elements": [ONE, TWO]}}, "tag.format", "anyOf"),
        (
            {"format": {"type": "or", "elements": [{"type": "tag", **TAGS[0]}, ONE]}},
            "tag.format.elements[1]",
            "from tag.format.elements[0]",
        ),
        ({"format": {"type": "regex", "pattern": "("}}, "tag.format.pattern", "("),
        ({"format": {"type": "grammar", "grammar": "root ::= other"}}, "tag.format.grammar", "other"),
        (
            {"format": {"type": "tag", **tag("", {"type": "json_schema", "json_schema": {"pattern": "("}}, "")}},
            "tag.format.content.json_schema",
            "at /pattern: ",
        ),
        (
            {"format": {**CALLS, "triggers": ["<call>a", "<call>b", "<call>r"]}},
            "tag.format.triggers",
            "make the token the trigger",
        ),
    ],
)
def test_a_fault_is_told_with_its_place(asked: dict[str, Any], place: str, said: str) -> None:
    with pytest.raises(InvalidGrammar) as refused:
        translated(asked, MARKERS)
    assert refused.value.place == place
    assert str(refused.value).startswith(place)
    assert said in str(refused.value)


def test_deep_and_many_formats_are_refused_in_time() -> None:
    deep: dict[str, Any] = ONE
    for _ in range(60):
        deep = {"type": "tag", "begin": "<t>", "content": deep, "end": "</t>"}
    many = {"type": "sequence", "elements": [ONE] * 600}
    wide: dict[str, Any] = ONE
    for _ in range(20):  # each tag is begun in two ways
        wide = {"type": "triggered_tags", "triggers": ["<call>"], "tags": [tag("<call>", wide, "</call>")]}
    for form in (deep, many):
        with pytest.raises(InvalidGrammar, match="at most"):
            of_format(form)
    assert len(of_format(wide, MARKERS)) < 20_000
