"""A process that matches the patterns of strangers: it reads questions as JSON from its input and writes the answers.

It imports nothing but the standard library, so that it starts in some milliseconds. A timer of the system ends it if an
expression runs for too long, which no expression can hold up, and memory above the limit it does not get.
"""

import json
import os
import re
import resource
import signal
import sys
from collections.abc import Iterable, Sequence

MEMORY_BYTES = 512 << 20
NICENESS = 10  # the steps of running requests come first

Match = tuple[int, str | None]  # the index of the first pattern that matches a name, and its group `idx`


class InvalidPattern(ValueError):
    """One of the patterns is no regular expression."""

    def __init__(self, index: int, reason: str) -> None:
        self.index = index
        super().__init__(reason)


def first_matches(patterns: Sequence[str], whole: bool, names: Iterable[str]) -> list[Match | None]:
    """Return for each name the first pattern that matches all of it, or its beginning. Raises InvalidPattern."""
    compiled = [_compiled(index, pattern) for index, pattern in enumerate(patterns)]
    return [_first(compiled, whole, name) for name in names]


def _compiled(index: int, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        raise InvalidPattern(index, str(error) or type(error).__name__) from None


def _first(compiled: Sequence[re.Pattern[str]], whole: bool, name: str) -> Match | None:
    for index, pattern in enumerate(compiled):
        match = pattern.fullmatch(name) if whole else pattern.match(name)
        if match is not None:
            return index, match.groupdict().get("idx")
    return None


def main(seconds: float) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process
    signal.setitimer(signal.ITIMER_PROF, seconds)
    os.nice(NICENESS)
    names, questions = json.load(sys.stdin)
    answers: list[object] = []
    for patterns, whole in questions:
        try:
            answers.append(first_matches(patterns, whole, names))
        except InvalidPattern as error:
            answers.append({"index": error.index, "reason": str(error)})
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main(float(sys.argv[1]))
