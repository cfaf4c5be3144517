"""Tool calls in text, whole and in any pieces."""

import json
import random

import pytest

from service.tool_calls.parser import Arguments, Begun, Piece, Text, ToolCallParser
from service.tool_calls.syntax import SYNTAXES, Family, family_of

CALL = '{"name": "weather", "arguments": {"city": "Bern {\\"}", "days": [1, {"a": "]"}]}}'
ARGUMENTS = '{"city": "Bern {\\"}", "days": [1, {"a": "]"}]}'
OTHER = '{"name": "time", "arguments": {}}'
LLAMA = CALL.replace('"arguments"', '"parameters"')
# family, text, its text beside calls, its calls
CASES: list[tuple[Family, str, str, list[tuple[str, str]]]] = [
    ("hermes", "Hello there.", "Hello there.", []),
    ("hermes", f"<tool_call>\n{CALL}\n</tool_call>", "", [("weather", ARGUMENTS)]),
    (
        "hermes",
        f"Let me see. <tool_call>\n{CALL}\n</tool_call>\n<tool_call>{OTHER}</tool_call>\n",
        "Let me see. ",
        [("weather", ARGUMENTS), ("time", "{}")],
    ),
    ("hermes", f"<tool_call>[{CALL}, {OTHER}]</tool_call>", "", [("weather", ARGUMENTS), ("time", "{}")]),
    ("hermes", f"<tool_call>{CALL}</tool_call> and so on", " and so on", [("weather", ARGUMENTS)]),
    ("hermes", "a < b, <tool and <tool_calls", "a < b, <tool and <tool_calls", []),
    ("hermes", "<tool_call>never mind", "never mind", []),
    ("hermes", '<tool_call>{"name": 5}</tool_call>', '{"name": 5}', []),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}, "id": "x"}</tool_call>', "", [("f", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "cut', "", [("f", '{"a": "cut')]),
    ("hermes", '<tool_call>{"na', '{"na', []),
    ("hermes", '<tool_call>{"name": "a\nb", "arguments": {}}</tool_call>', '{"name": "a\nb", "arguments": {}}', []),
    ("hermes", '<tool_call>{"name": "\\x", "arguments": {}}</tool_call>', '{"name": "\\x", "arguments": {}}', []),
    ("hermes", "<tool_call>" + '{"a":' * 5000 + "1" + "}" * 5000, '{"a":' * 5000 + "1" + "}" * 5000, []),
    ("llama3_json", LLAMA, "", [("weather", ARGUMENTS)]),
    ("llama3_json", f"{LLAMA}; {LLAMA}", "", [("weather", ARGUMENTS)] * 2),
    ("llama3_json", "It is {sunny}.", "It is {sunny}.", []),
    ("llama3_json", '{"sunny": true}', '{"sunny": true}', []),
    ("mistral", f"[TOOL_CALLS] [{CALL}, {OTHER}]", "", [("weather", ARGUMENTS), ("time", "{}")]),
    ("granite", f"<|tool_call|>[{CALL}]", "", [("weather", ARGUMENTS)]),
    ("granite", "  ", "  ", []),
]


def read(pieces: list[Piece]) -> tuple[str, list[tuple[str, str]]]:
    text, calls = "", []
    for piece in pieces:
        match piece:
            case Text(text=more):
                text += more
            case Begun(name=name):
                calls.append([name, ""])
            case Arguments(text=more):
                calls[-1][1] += more
    return text, [(name, arguments) for name, arguments in calls]


@pytest.mark.parametrize(("family", "answer", "text", "calls"), CASES)
def test_text_and_calls_are_the_same_in_whatever_pieces_they_come(
    family: Family, answer: str, text: str, calls: list[tuple[str, str]]
) -> None:
    draw = random.Random(0)
    for size in (len(answer), 1, 2, 3, 0, 0, 0):
        parser, pieces, rest = ToolCallParser(SYNTAXES[family]), [], answer
        while rest:
            take = size or draw.randrange(1, 9)
            pieces += parser.push(rest[:take])
            rest = rest[take:]
        pieces += parser.flush()
        assert read(pieces) == (text, calls)
        assert parser.flush() == []


def test_an_answer_that_is_forced_to_be_calls_needs_no_mark() -> None:
    for family in SYNTAXES:
        parser = ToolCallParser(SYNTAXES[family], inside=True)
        assert read(parser.push(f"[{CALL},\n {OTHER}]") + parser.flush()) == (
            "",
            [("weather", ARGUMENTS), ("time", "{}")],
        )


def test_text_and_arguments_are_not_held_back() -> None:
    parser = ToolCallParser(SYNTAXES["hermes"])
    assert parser.push("Hello") == [Text("Hello")]
    assert parser.push(" <tool") == [Text(" ")]
    assert parser.push('_call>{"name": "f", "arguments": {"a') == [Begun("f"), Arguments('{"a')]
    assert parser.push('": 1') == [Arguments('": 1')]
    assert parser.push("}}</tool_call>") == [Arguments("}")]


@pytest.mark.parametrize("seed", range(20))
def test_what_is_no_call_is_not_lost(seed: int) -> None:
    """Random parts of calls without a name: all of it comes out as text, but marks and what lies between calls."""
    draw = random.Random(seed)
    parts = ["<tool_call>", "</tool_call>", *'{}",[]', '"name": 5', '"arguments": ', "xyz", "\\", "\n"]

    def kept(text: str) -> str:
        for mark in ("<tool_call>", "</tool_call>"):
            text = text.replace(mark, "")
        return "".join(character for character in text if character not in " \n,[]")

    for family in SYNTAXES:
        for _ in range(20):
            answer = draw.choices(parts, k=40)
            parser = ToolCallParser(SYNTAXES[family])
            text, calls = read([piece for part in answer for piece in parser.push(part)] + parser.flush())
            assert calls == []
            assert kept(text) == kept("".join(answer))


@pytest.mark.parametrize(
    ("template", "family"),
    [
        ("{{ messages }}", "hermes"),
        ("... <tool_call>\n{{ call | tojson }}", "hermes"),
        ("[TOOL_CALLS] ", "mistral"),
        ("<|tool_call|>", "granite"),
        ("<|python_tag|>", "llama3_json"),
    ],
)
def test_the_family_is_the_chat_templates(template: str, family: Family) -> None:
    assert family_of(template) == family


def test_arguments_are_json_where_the_model_wrote_json() -> None:
    parser = ToolCallParser(SYNTAXES["hermes"])
    _, [(_, arguments)] = read(parser.push(f"<tool_call>{CALL}"))
    assert json.loads(arguments)["days"] == [1, {"a": "]"}]
