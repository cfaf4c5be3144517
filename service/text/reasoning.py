"""What a reasoning model thinks before it answers, split from the answer, in a text that arrives in pieces."""

from typing import Literal, NamedTuple

# Of the same tags: qwen3 takes for thoughts what is between them, deepseek_r1 also what comes before a lone end
ReasoningFamily = Literal["qwen3", "deepseek_r1", "none"]
BEGIN, END = "<think>", "</think>"
TAIL = 16  # tokens at the end of a prompt that are enough to see a tag there


class Thought(NamedTuple):
    """What a piece of text adds."""

    reasoning: str
    content: str


def family_of(template: str) -> ReasoningFamily:
    """The family whose thoughts a chat template knows."""
    return "qwen3" if END in template else "none"


def splitter_after(family: ReasoningFamily, prompt: str, continued: str = "") -> "ReasoningSplitter | None":
    """What splits the answer to a prompt, of which the end is enough; None if all of it is content.

    A template may begin the thoughts itself, and may end them at once. `continued` is the message that the answer
    continues.
    """
    prompt = prompt.rstrip()
    if family == "none" or (prompt.endswith(END) and not continued):
        return None
    if prompt.endswith(BEGIN) or continued.rfind(BEGIN) > continued.rfind(END):
        return ReasoningSplitter(inside=True)
    return None if continued else ReasoningSplitter(inside=family == "deepseek_r1")


class ReasoningSplitter:
    """Splits one answer. Line feeds around the tags belong to neither part, as in the models' own templates.

    `inside` if the answer begins with thoughts, whether or not it says so; else only a tag at its start begins them.
    """

    def __init__(self, *, inside: bool) -> None:
        self.inside = inside
        self.has_thoughts = False  # also empty ones
        self._state: Literal["start", "thinking", "answering"] = "start"
        self._held = ""  # text that has not been decided on
        self._begun = False  # whether the part that is being read has any text yet

    @property
    def answering(self) -> bool:
        """Whether all that comes now is content."""
        return self._state == "answering"

    def push(self, text: str) -> Thought:
        """What is now certain."""
        self._held += text
        reasoning = content = ""
        if self._state == "start":
            begin = self._held.lstrip()
            if BEGIN.startswith(begin) and begin != BEGIN:  # nothing also
                return Thought("", "")
            self._start()
        if self._state == "thinking":
            thought, ended, rest = self._held.partition(END)
            if ended:
                reasoning = self._part(thought.rstrip("\n"))
                self._held, self._state, self._begun = rest, "answering", False
            else:
                certain = len(thought) - _uncertain(thought)
                reasoning, self._held = self._part(thought[:certain]), thought[certain:]
        if self._state == "answering":
            content, self._held = self._part(self._held), ""
        return Thought(reasoning, content)

    def flush(self) -> Thought:
        """The rest, at the end of the answer."""
        if self._state == "start":
            self._start()
        rest, self._held = self._held, ""
        if self._state == "thinking":
            return Thought(self._part(rest.rstrip("\n")), "")
        return Thought("", self._part(rest))

    def _start(self) -> None:
        """Know what the answer begins with."""
        begin = self._held.lstrip()
        if begin.startswith(BEGIN):
            self._held, self._state = begin.removeprefix(BEGIN), "thinking"
        elif self.inside:
            self._state = "thinking"
        else:
            self._state, self._begun = "answering", True  # an answer without thoughts is told as it is
        self.has_thoughts = self._state == "thinking"

    def _part(self, text: str) -> str:
        """A piece of a part, without line feeds before its first text."""
        if not self._begun:
            text = text.lstrip("\n")
            self._begun = bool(text)
        return text


def _uncertain(text: str) -> int:
    """How many characters at a text's end may belong to the end of the thoughts: line feeds, and part of the tag."""
    tag = next((size for size in range(min(len(END) - 1, len(text)), 0, -1) if text.endswith(END[:size])), 0)
    before = text[: len(text) - tag]
    return tag + len(before) - len(before.rstrip("\n"))
