"""Thoughts and answers, however the text is cut."""

import itertools

import pytest

from service.text.reasoning import ReasoningFamily, ReasoningSplitter, family_of, splitter_after
from tests.service.text.reasoning_templates import DEEPSEEK, QWEN

CASES = [
    # whether the answer begins inside thoughts, the text, the thoughts, the answer
    (False, "<think>\nTwo and two.\n</think>\n\nFour.", "Two and two.", "Four."),
    (True, "Two and two.\n</think>\n\nFour.", "Two and two.", "Four."),
    (True, "<think>\nTwo and two.\n</think>\n\nFour.", "Two and two.", "Four."),
    (True, "\nTwo\n\nand two.</think>Four.\n", "Two\n\nand two.", "Four.\n"),
    (False, "\n<think>a</think>b", "a", "b"),
    (False, "Four. <think>no thought</think>", "", "Four. <think>no thought</think>"),
    (False, "\n Four.", "", "\n Four."),
    (False, "<think>\n\n</think>\n\nFour.", "", "Four."),
    (True, "cut off", "cut off", ""),
    (True, "cut off\n\n", "cut off", ""),
    (False, "<think>cut off</thi", "cut off</thi", ""),
    (True, "a </thin b </thi", "a </thin b </thi", ""),
    (False, "<thin", "", "<thin"),
    (True, "<thin", "<thin", ""),
    (False, "<thinking> aloud", "", "<thinking> aloud"),
    (False, "<think>a</think>b</think>c<think>d", "a", "b</think>c<think>d"),
    (False, "", "", ""),
    (False, " \n", "", " \n"),
    (True, "</think>", "", ""),
]


def split(splitter: ReasoningSplitter, pieces: list[str]) -> tuple[str, str]:
    parts = [*map(splitter.push, pieces), splitter.flush()]
    return "".join(part.reasoning for part in parts), "".join(part.content for part in parts)


@pytest.mark.parametrize(("inside", "text", "reasoning", "content"), CASES)
def test_thoughts_are_split_from_the_answer_however_the_text_is_cut(
    inside: bool, text: str, reasoning: str, content: str
) -> None:
    assert split(ReasoningSplitter(inside=inside), [text]) == (reasoning, content)
    assert split(ReasoningSplitter(inside=inside), list(text)) == (reasoning, content)
    for first, second in itertools.combinations(range(len(text)), 2):
        pieces = [text[:first], text[first:second], text[second:]]
        assert split(ReasoningSplitter(inside=inside), pieces) == (reasoning, content)


def test_thoughts_are_told_as_soon_as_they_cannot_be_a_tag() -> None:
    splitter = ReasoningSplitter(inside=True)
    told = [splitter.push(piece).reasoning for piece in ("a", "b\n", "c <", "/think", "s", "</think>d")]
    assert told == ["a", "b", "\nc ", "", "</thinks", ""]


def test_a_template_tells_whether_its_model_thinks() -> None:
    assert [family_of(template) for template in (QWEN, DEEPSEEK, "{{ messages[0].content }}")] == [
        "qwen3",
        "qwen3",
        "none",
    ]


@pytest.mark.parametrize(
    ("family", "prompt", "continued", "expected"),
    [
        # What becomes of "a</think>b"; the content is all of it if nothing is split
        ("qwen3", "<|assistant|>\n", "", ("", "a</think>b")),
        ("qwen3", "<|assistant|><think>\n", "", ("a", "b")),
        ("qwen3", "<|assistant|><think>\n\n</think>\n\n", "", None),
        ("qwen3", "what does <think> mean?<|assistant|>", "", ("", "a</think>b")),
        ("qwen3", "<|assistant|><think>\nSo", "<think>\nSo", ("a", "b")),
        ("qwen3", "<|assistant|><think>So</think>", "<think>So</think>", None),
        ("qwen3", "<|assistant|>The answer", "The answer", None),
        ("deepseek_r1", "<|assistant|>", "", ("a", "b")),
        ("deepseek_r1", "<|assistant|></think>\n", "", None),
        ("deepseek_r1", "<|assistant|>The answer", "The answer", None),
        ("none", "<|assistant|><think>\n", "", None),
    ],
)
def test_the_end_of_the_prompt_tells_where_the_answer_begins(
    family: ReasoningFamily, prompt: str, continued: str, expected: tuple[str, str] | None
) -> None:
    splitter = splitter_after(family, prompt, continued)
    assert (splitter and split(splitter, ["a</think>b"])) == expected
