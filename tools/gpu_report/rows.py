"""What the report is made of: sections of rows, each with its samples, its floor, its goal and what it is beside."""

import math
import statistics
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

Rounds = list[list[float]]
Status = Literal["complete", "failed", "out of time", "not run"]


class Goal(msgspec.Struct, frozen=True):
    """`value`, None if there is none, is to be at least or at most `bound`; `what` says of what, with its unit."""

    what: str
    value: float | None
    bound: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        if self.value is None or not math.isfinite(self.value):
            return False
        return self.value >= self.bound if self.at_least else self.value <= self.bound


class Row(msgspec.Struct, kw_only=True):
    """One figure: samples by round in `unit`, and those of `base` measured in turn with them, if it is half of a pair.

    `floor` is in the same unit. A row without samples says in its `note` why.
    """

    name: str
    rounds: Rounds = []
    base: Rounds = []
    unit: str = "ms"
    floor: float | None = None
    goal: Goal | None = None
    note: str = ""

    @property
    def samples(self) -> list[float]:
        return [sample for each in self.rounds for sample in each]

    @property
    def median(self) -> float | None:
        return statistics.median(self.samples) if self.samples else None

    @property
    def ratio(self) -> float | None:
        """The median over the floor."""
        return None if self.floor is None or self.median is None else self.median / self.floor

    @property
    def share(self) -> float | None:
        """The speed beside the base's, in %: the median over rounds, so that what drifts between them counts less."""
        return 100 * speed(self.rounds, self.base) if self.base else None


class Section(msgspec.Struct, kw_only=True):
    """A section's rows and how it ended. A `check` has goals that are right or wrong, not fast or slow."""

    name: str
    title: str
    check: bool = False
    status: Status = "not run"
    reason: str = ""
    seconds: float = 0.0
    rows: list[Row] = []

    @property
    def passed(self) -> bool:
        """Whether it came to its end, and found nothing wrong if it is a check."""
        wrong = self.check and any(row.goal is not None and not row.goal.met for row in self.rows)
        return self.status == "complete" and not wrong


class Report(msgspec.Struct, kw_only=True):
    """Everything that was measured and on what. `dry_run` says that no figure is a GPU's."""

    dry_run: bool
    date: str
    device: str
    driver: str
    versions: dict[str, str]
    model: dict[str, Any]
    dtype: str
    limits: dict[str, float]
    plan: dict[str, Any]
    sections: list[Section]
    minutes: float = 0.0


def speed(rounds: Rounds, base: Rounds) -> float:
    """How many times as fast as the base: the median over rounds of the ratio of the rounds' medians."""
    pairs = zip(rounds, base, strict=True)
    return statistics.median(statistics.median(theirs) / statistics.median(ours) for ours, theirs in pairs)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` (above 0, at most 1) of all are not above."""
    return sorted(values)[math.ceil(share * len(values)) - 1]
