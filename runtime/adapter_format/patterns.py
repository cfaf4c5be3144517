"""Regular expressions of strangers, matched against the base's module names in bounded time.

PEFT matches with Python's `re`, so nothing but `re` has its answer for every expression; and `re` may take exponential
time. So it runs in a process with a limit of processor time. Only a few patterns without repeats, branches and groups,
which take no time worth the name, are matched here: a process costs some 20 ms.
"""

import re
import subprocess
import sys
from functools import lru_cache
from typing import NamedTuple

import msgspec

from runtime.adapter_format import pattern_process
from runtime.adapter_format.errors import InvalidAdapter, shown
from runtime.adapter_format.pattern_process import Match, first_matches

SECONDS = 3.0  # of processor time for all patterns of a field, and more than 1,000 keys on 500 modules take
PLAIN_KEYS, PLAIN_CHARACTERS = 32, 200
_PLAIN = re.compile(rf"(?:[A-Za-z0-9_\-.^$]|\\[.d]){{0,{PLAIN_CHARACTERS}}}")


class Question(NamedTuple):
    """Which pattern matches a name first? A pattern is one of the keys of a field, between `before` and `after`."""

    field: str  # of the configuration
    keys: tuple[str, ...]
    before: str = ""  # without repeats that could multiply with those of a plain key
    after: str = ""
    whole: bool = False  # it has to match a whole name, not only its beginning

    @property
    def patterns(self) -> list[str]:
        return [f"{self.before}{key}{self.after}" for key in self.keys]


@lru_cache(maxsize=16)  # a training loop brings one configuration again and again
def answers(
    questions: tuple[Question, ...], names: tuple[str, ...], seconds: float = SECONDS
) -> tuple[list[Match | None], ...]:
    """Return for each question and each name its first match: the key's index and the group `idx`, or None.

    Raises InvalidAdapter, by the field, for what is no regular expression or takes more than `seconds` of processor
    time.
    """
    if all(_is_plain(question) for question in questions):
        return tuple(first_matches(question.patterns, question.whole, names) for question in questions)
    asked = subprocess.run(
        [sys.executable, "-I", "-S", "-W", "ignore", pattern_process.__file__, str(seconds)],
        input=msgspec.json.encode((names, [(question.patterns, question.whole) for question in questions])),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    if asked.returncode:
        fields = ", ".join(question.field for question in questions)
        reason = f"takes over {seconds:g} s or too much memory to match with the base's module names"
        raise InvalidAdapter(fields, reason, "list the names of the modules instead")
    found = msgspec.json.decode(asked.stdout, type=list[list[Match | None] | _Broken])
    return tuple(_checked(question, answer) for question, answer in zip(questions, found, strict=True))


def _is_plain(question: Question) -> bool:
    return len(question.keys) <= PLAIN_KEYS and all(_PLAIN.fullmatch(key) for key in question.keys)


def _checked(question: Question, answer: "list[Match | None] | _Broken") -> list[Match | None]:
    if isinstance(answer, _Broken):
        key = shown(question.keys[answer.index])
        reason = f"has {key!r}, which is not a regular expression: {shown(answer.reason)}"
        raise InvalidAdapter(question.field, reason, "correct it, or list the names of modules")
    return answer


class _Broken(msgspec.Struct, frozen=True):
    """A key that is no regular expression."""

    index: int
    reason: str
