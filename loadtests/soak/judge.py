"""Judges series of samples: which of them grew, and which are not back at rest to what they were."""

import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

LEAST_SECONDS = 60.0  # of a series: what a process does in less says nothing of growth
MOST_POINTS = 240  # of a series; more would only cost time, as there are n² / 2 pairs


class Limit(NamedTuple):
    """A series has grown if it rises faster than `per_minute`, and by more than `in_all` during what is judged."""

    per_minute: float
    in_all: float


class Growth(NamedTuple):
    """How one series went after the warm-up."""

    name: str
    first: float  # the median of the first fifth
    last: float  # the median of the last fifth
    seconds: float  # from the first point to the last
    per_minute: float
    limit: Limit

    @property
    def failed(self) -> bool:
        if self.seconds < LEAST_SECONDS:
            return False
        return self.per_minute > self.limit.per_minute and self.last - self.first > self.limit.in_all

    @property
    def verdict(self) -> str:
        if self.seconds < LEAST_SECONDS:
            return "too short to judge"
        return "grew" if self.failed else "flat"

    @property
    def reason(self) -> str:
        return (
            f"{self.name} grew by {self.per_minute:.2f} a minute, from {self.first:.1f} to {self.last:.1f}; "
            f"at most {self.limit.per_minute:g} a minute are allowed"
        )


def growth(name: str, points: Sequence[tuple[float, float]], limit: Limit) -> Growth:
    """Measure a series of (seconds, value) by the median of the slopes between all pairs (Theil and Sen).

    Up to 29 % of the points may be anything without changing it much: a peak is no growth.
    """
    points = points[:: -(-len(points) // MOST_POINTS)]
    values = [value for _, value in points]
    part = max(len(values) // 5, 1)
    slopes = [(b - a) / (later - earlier) for (earlier, a), (later, b) in combinations(points, 2) if later > earlier]
    per_minute = 60 * statistics.median(slopes) if slopes else 0.0
    first, last = statistics.median(values[:part]), statistics.median(values[-part:])
    return Growth(name, first, last, points[-1][0] - points[0][0], per_minute, limit)


def not_back(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """Return a reason for each figure at rest that is above what it was."""
    return [
        f"{name} is {after[name]:g} at rest, and was {value:g}" for name, value in before.items() if after[name] > value
    ]
