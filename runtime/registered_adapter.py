"""One adapter as the pool keeps it, from registration to retirement."""

from dataclasses import dataclass
from typing import Literal

from runtime.adapter_loader import Measured, Sites, Source

FIRST_RETRY_SECONDS = 1.0


@dataclass(eq=False, slots=True, kw_only=True)
class RegisteredAdapter:
    """An adapter's residency; `offset` is its extent's, in bytes, from the start of a load until eviction.

    `busy` while a job of the loader works for it, `wanted` if it is to be loaded as soon as it has been
    measured, `missed` if its next use comes after a wait. `safe_until` is the poll up to which it is spared
    from eviction, `retry_at` the clock's time before which a failure stands.
    """

    digest: str
    source: Source
    state: Literal["registered", "loading", "resident", "failed"] = "registered"
    measured: Measured | None = None
    offset: int | None = None
    sites: Sites | None = None
    references: int = 0
    retired: bool = False
    busy: bool = False
    wanted: bool = False
    missed: bool = False
    last_use: int = 0
    safe_until: int = 0
    reason: str = ""
    retry_at: float = 0.0
    retry_seconds: float = FIRST_RETRY_SECONDS

    @property
    def idle(self) -> bool:
        return self.state == "resident" and self.references == 0

    def check(self) -> None:
        assert self.references >= 0
        assert self.references == 0 or self.state == "resident"
        assert (self.sites is not None) == (self.state == "resident")
        assert (self.offset is not None) == (self.state in ("loading", "resident"))
        assert self.measured is not None or self.state in ("registered", "failed")
        assert self.busy == (self.state == "loading" or (self.state == "registered" and self.measured is None))
        assert not self.retired or self.references or self.busy
