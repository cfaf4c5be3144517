"""The stages of a request, which become the spans of its trace."""

from collections.abc import Mapping
from typing import NamedTuple

from runtime.messages import Tokens

Attributes = Mapping[str, str | int | float | bool]
MOST_SEQUENCES = 16  # of a request, that have spans


class Stage(NamedTuple):
    """A part of a request; its times are of the system's monotonic clock."""

    name: str
    began: float
    ended: float
    attributes: Attributes


class SequenceStages:
    """Notes the stages of one sequence in its request's list, from the engine's own times."""

    def __init__(self, stages: list[Stage], index: int, sent: float) -> None:
        self._stages, self._index, self._sent = stages, index, sent
        self._computed: float | None = None  # when its prompt was

    def started(self, first: Tokens, loads: Mapping[str, tuple[float, float]]) -> None:
        """The first event has come; `loads` are the stages of its adapter's last load."""
        if first.started_at is None or first.computed_at is None:
            return
        for name, (began, ended) in loads.items():
            if ended > self._sent:  # an earlier one was nothing to wait for
                self._note(f"adapter.{name}", max(began, self._sent), ended)
        self._note("queue", self._sent, first.started_at)
        self._note("prefill", first.started_at, first.computed_at, cached_tokens=first.cached_tokens or 0)
        self._computed = first.computed_at

    def ended(self, now: float, tokens: int) -> None:
        """The sequence has ended, after so many tokens."""
        if self._computed is not None and tokens > 1:
            self._note("decode", self._computed, now, tokens=tokens)

    def _note(self, name: str, began: float, ended: float, **attributes: int) -> None:
        named = {f"rootstock.{name}": value for name, value in attributes.items()}
        self._stages.append(Stage(name, began, max(began, ended), {"rootstock.sequence": self._index, **named}))
