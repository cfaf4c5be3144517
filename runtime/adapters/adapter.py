"""One adapter's life in the engine: a state machine from registration to retirement."""

import enum
from dataclasses import dataclass, field
from typing import Literal

from runtime.adapters.layout import Layout
from runtime.adapters.loader import Content, Source, Stages
from runtime.messages import AdapterState, Tier

FIRST_RETRY_SECONDS = 1.0
LONGEST_RETRY_SECONDS = 60.0
LAST = 1 << 62  # the place in line of a load without a waiting request, command or pin


class State(enum.Enum):
    """What happens to an adapter now. Which tiers hold it is a separate question, which the tiers answer."""

    IDLE = "idle"  # nothing is asked for; it may be resident
    QUEUED = "queued"  # its load waits for memory or for a reader thread
    WORKING = "working"  # its load has a task under way: reading, packing or copying
    ABANDONED = "abandoned"  # its load was cancelled, but the task of the load still runs
    MISSING = "missing"  # its load waits for its file: the service is asked to fetch or replace it
    FAILED = "failed"  # it cannot be loaded, for the time that its failure stands
    RETIRED = "retired"  # it is forgotten; its memory goes with the last reference and the last task


LOADING = (State.QUEUED, State.WORKING, State.MISSING)  # the states that have a load
# The word for a state in reports. RETIRED is reported once, when the memory is gone.
REPORTED: dict[State, Literal["idle", "missing", "loading", "failed"]] = {
    State.IDLE: "idle",
    State.QUEUED: "loading",
    State.WORKING: "loading",
    State.ABANDONED: "idle",
    State.MISSING: "missing",
    State.FAILED: "failed",
    State.RETIRED: "idle",
}


@dataclass(slots=True, kw_only=True)
class Load:
    """A load from the moment it is asked for until the adapter is where it was asked for, or will not be."""

    goal: Tier | None  # None: only the size is asked for, by a pin
    place: int  # in line, of the command or pin that asked first; LAST if only requests ask
    asked_at: float  # seconds of the pool's clock
    turn: int = -1  # the last poll in which a request could have run but for this adapter
    content: Content | None = None  # the file, between the task that read it and the one that packs it
    waiters: list[tuple[str, Tier]] = field(default_factory=list)  # commands to answer: request id and tier
    refetched: bool = False  # the file was unusable and has been registered again since
    problem: str = ""  # in MISSING: why the file cannot be used
    stages: Stages = field(default_factory=dict)  # so far


@dataclass(slots=True, kw_only=True)
class Job:
    """A task of the loader that is under way for an adapter."""

    filling: tuple[Tier, ...]  # the tiers it writes to
    source: Tier | None = None  # the tier it copies from
    layout: Layout | None = None  # of the copy in that tier
    reads_file: bool = False
    outdated: bool = False  # the file has been registered again since the task began
    unload: Tier | None = None  # the tier to give back when the task ends: the adapter was unloaded meanwhile


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an adapter cannot be loaded, and when it may be tried again."""

    reason: str
    retry_at: float  # seconds of the pool's clock


@dataclass(eq=False, slots=True, kw_only=True)
class Adapter:
    """What the pool knows of one adapter. Only the methods here change `state`, and what belongs to a state."""

    digest: str
    source: Source  # its canonical file
    size: int | None = None  # bytes in a tier; None until its file has been read
    state: State = State.IDLE
    load: Load | None = None  # in QUEUED, WORKING and MISSING
    job: Job | None = None  # in WORKING and ABANDONED, and perhaps in RETIRED
    failure: Failure | None = None  # in FAILED
    retry_seconds: float = FIRST_RETRY_SECONDS  # how long the next failure stands
    waiting: list[int] = field(default_factory=list)  # places in line of the requests that wait to acquire it, sorted
    missed: bool = False  # the next acquire ends a wait: it counts as no hit
    stages: Stages = field(default_factory=dict)  # those of a load that has ended, to be reported
    reported: AdapterState | None = None  # the last report, without `stages`

    @property
    def place(self) -> int:
        """The place in line of its load: the first place of the requests, commands and pins that wait for it."""
        asked = LAST if self.load is None else self.load.place
        return min(asked, self.waiting[0]) if self.waiting else asked

    @property
    def problem(self) -> str:
        """The reason of its failure, or why its file cannot be used."""
        if self.failure is not None:
            return self.failure.reason
        return "" if self.load is None else self.load.problem

    @property
    def holds_file(self) -> bool:
        """Whether its file is in memory, or is being read into it."""
        return (self.job is not None and self.job.reads_file) or (
            self.load is not None and self.load.content is not None
        )

    def held_for(self, tier: Tier) -> int | None:
        """The place in line for which its copy in a tier is held, so that only earlier loads evict it; None: it is not.

        A request waits for the copy on the device; a load to the device needs the copy in host memory.
        """
        if tier == "device":
            return self.waiting[0] if self.waiting else None
        return self.place if self.load is not None and self.load.goal == "device" else None

    # Transitions

    def ask(self, load: Load) -> None:
        """A load begins."""
        self._enter(State.WORKING if self.job else State.QUEUED, State.IDLE, State.ABANDONED)
        self.load = load

    def start(self, job: Job) -> None:
        """A task of the load begins."""
        self._enter(State.WORKING, State.QUEUED)
        self.job = job

    def finish(self) -> Job:
        """The task has ended."""
        after = {State.WORKING: State.QUEUED, State.ABANDONED: State.IDLE, State.RETIRED: State.RETIRED}
        self._enter(after[self.state], *after)
        job, self.job = self.job, None
        assert job is not None
        return job

    def end_load(self) -> Load:
        """The load has reached its goal, or is cancelled; a task under way goes on."""
        self._enter(State.ABANDONED if self.job else State.IDLE, *LOADING)
        load, self.load = self.load, None
        assert load is not None
        return load

    def miss(self, problem: str) -> None:
        """The load needs a file that cannot be used."""
        self._enter(State.MISSING, State.QUEUED)
        assert self.load is not None
        self.load.problem = problem

    def refetch(self) -> None:
        """The file that the load needs has been registered again."""
        self._enter(State.QUEUED, State.MISSING)
        assert self.load is not None
        self.load.problem, self.load.refetched = "", True

    def fail(self, reason: str, now: float) -> Load:
        """The load cannot be done; the failure stands for a while, for longer each time."""
        self._enter(State.FAILED, State.QUEUED, State.MISSING)
        self.failure = Failure(reason, now + self.retry_seconds)
        self.retry_seconds = min(2 * self.retry_seconds, LONGEST_RETRY_SECONDS)
        self.missed = False
        load, self.load = self.load, None
        assert load is not None
        return load

    def forgive(self) -> None:
        """The failure is forgotten: a load may try again."""
        self._enter(State.IDLE, State.FAILED)
        self.failure = None

    def retire(self) -> Load | None:
        """The adapter is forgotten; returns the load that this ends."""
        self._enter(State.RETIRED, *set(State) - {State.RETIRED})
        self.missed, self.failure = False, None
        load, self.load = self.load, None
        return load

    def revive(self) -> None:
        """The adapter is registered again while its memory is still in use."""
        self._enter(State.ABANDONED if self.job else State.IDLE, State.RETIRED)

    def check(self) -> None:
        """Assert what each state implies."""
        assert (self.load is not None) == (self.state in LOADING), f"{self.state} and {self.load}"
        assert (self.job is not None) == (self.state in (State.WORKING, State.ABANDONED)) or self.state is State.RETIRED
        assert (self.failure is not None) == (self.state is State.FAILED)
        assert self.load is None or self.load.content is None or self.state is not State.MISSING
        assert self.waiting == sorted(self.waiting)

    def _enter(self, state: State, *origins: State) -> None:
        assert self.state in origins, f"{self.digest} cannot go from {self.state} to {state}"
        self.state = state
