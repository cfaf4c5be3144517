"""One adapter as the pool keeps it, from registration to retirement."""

from dataclasses import dataclass, field
from typing import Literal

from runtime.adapters.layout import AdapterLayout, Sites
from runtime.adapters.loader import Content, Source
from runtime.adapters.tier_entry import Claim
from runtime.messages import AdapterState, Tier

FIRST_RETRY_SECONDS = 1.0
LONGEST_RETRY_SECONDS = 60.0


@dataclass(eq=False, slots=True, kw_only=True)
class RegisteredAdapter:
    """What is known of an adapter, and how far the load is that is under way; where it is resident, the tiers know.

    `size` is what it takes in a tier, in bytes, known once its file has been read. `goal` is the tier that a load is to
    reach, `claim` how much that is waited for. `busy` while a job of the loader works for it: `filling` are the
    tiers it writes to, `reading` the one it reads from, `moving` the one in which it moves it, `started_with` how often
    the adapter had been registered when it began. `content` is the file between two jobs, `unload` the tier to give
    back when the job has ended. `wanted` if the file is not where it should be, `brought` once it has been registered
    again after that. `missed` if the next use comes after a wait, `expected` while a request has asked for the adapter
    and not got it; `awaited_poll` is when one at its turn last did. `retry_at` is the clock's time before which a
    failure stands. `stages` are the seconds of a load under way, `seconds` those to report.
    """

    digest: str
    source: Source
    registrations: int = 1
    started_with: int = 0
    size: int | None = None
    layout: AdapterLayout | None = None
    content: Content | None = None
    sites: Sites | None = None
    goal: Tier | None = None
    claim: Claim = Claim.NONE
    asked_at: float = 0.0
    awaited_poll: int = -1
    busy: bool = False
    filling: tuple[Tier, ...] = ()
    reading: Tier | None = None
    moving: Tier | None = None
    unload: Tier | None = None
    pins: list[tuple[str, Tier]] = field(default_factory=list)  # asked for, by request id, and not decided yet
    loads: list[tuple[str, Tier]] = field(default_factory=list)  # whose ends are to be answered, by request id
    retired: bool = False
    dropped: bool = False
    wanted: bool = False
    brought: bool = False
    missed: bool = False
    expected: bool = False
    failed: bool = False
    reason: str = ""
    retry_at: float = 0.0
    retry_seconds: float = FIRST_RETRY_SECONDS
    stages: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    reported: AdapterState | None = None

    @property
    def state(self) -> Literal["idle", "wanted", "loading", "failed", "retired"]:
        if self.dropped:
            return "retired"
        if self.failed:
            return "failed"
        if self.wanted:
            return "wanted"
        return "idle" if self.goal is None and not (self.pins and self.size is None) else "loading"

    def fail(self, reason: str, now: float) -> None:
        """Its load has ended; for a while, longer each time, nothing tries it again."""
        self.failed, self.reason = True, reason
        self.retry_at = now + self.retry_seconds
        self.retry_seconds = min(2 * self.retry_seconds, LONGEST_RETRY_SECONDS)
        self.forget_load()

    def start_anew(self) -> None:
        """Forget a failure, to try again."""
        self.failed, self.reason = False, ""

    def may_be_used(self, now: float) -> bool:
        """Whether no failure stands against it; one that is old enough to try again is forgotten."""
        if self.failed and now >= self.retry_at:
            self.start_anew()
        return not self.failed

    def forget_load(self) -> None:
        """Nothing is to be loaded any more."""
        self.goal, self.claim, self.content = None, Claim.NONE, None
        self.wanted = self.brought = self.missed = self.expected = False
        self.stages = {}

    def check(self) -> None:
        assert self.busy or not (self.filling or self.reading or self.moving or self.unload)
        assert not (self.failed and (self.wanted or self.goal)), "a failed adapter is loading"
        assert not self.wanted or not self.busy
        assert not self.retired or not self.pins
