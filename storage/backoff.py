"""How long to wait before something is tried again."""

import random

_FIRST_SECONDS, _MOST_SECONDS = 0.2, 5.0


def backoff_seconds(attempt: int) -> float:
    """A random share of a pause that doubles with each attempt (the second one is 1), so that clients spread out."""
    return random.random() * min(_FIRST_SECONDS * 2**attempt, _MOST_SECONDS)
