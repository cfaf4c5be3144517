"""The data of the report: sections of rows, each with samples, a floor, a goal and the base's samples."""

import math
import statistics
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

Rounds = list[list[float]]  # samples by round
Status = Literal["complete", "failed", "out of time", "running", "not run"]


class Goal(msgspec.Struct, frozen=True):
    """A bound on a figure."""

    what: str  # the figure, with its unit
    value: float | None  # None if it was not measured
    bound: float
    at_least: bool = False  # the value must be at least, not at most, the bound

    @property
    def met(self) -> bool:
        if self.value is None or not math.isfinite(self.value):
            return False
        return self.value >= self.bound if self.at_least else self.value <= self.bound


class Row(msgspec.Struct, kw_only=True):
    """One figure."""

    name: str
    rounds: Rounds = []  # in `unit`
    base: Rounds = []  # samples of the base, measured in turn with `rounds`
    unit: str = "ms"
    floor: float | None = None  # in `unit`
    goal: Goal | None = None
    note: str = ""  # for a row without samples, the reason

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
        """The speed in % of the base's: a median over rounds, so that drift between rounds counts less."""
        return 100 * speed(self.rounds, self.base) if self.base else None


class Section(msgspec.Struct, kw_only=True):
    """A section's rows and how it ended."""

    name: str
    title: str
    check: bool = False  # its goals decide right or wrong, not fast or slow
    status: Status = "not run"
    reason: str = ""  # why it is not complete
    seconds: float = 0.0
    rows: list[Row] = []

    @property
    def passed(self) -> bool:
        """Whether it is complete and, if it is a check, met all of its goals."""
        wrong = self.check and any(row.goal is not None and not row.goal.met for row in self.rows)
        return self.status == "complete" and not wrong


class Report(msgspec.Struct, kw_only=True):
    """All sections and the conditions of the measurements."""

    dry_run: bool  # no figure is a GPU's
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
    """The least of `values` that at least the share `share`, in (0, 1], of them do not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]
