"""A line of the log for what the engine does to an adapter by itself: load, unload, fail."""

import logging
from collections.abc import Collection

from runtime.messages import AdapterState, Tier
from service.engine.adapters import StateChange
from service.logs import log_event

RANK: dict[Tier | None, int] = {None: 0, "host": 1, "device": 2}
_log = logging.getLogger(__name__)


def log_change(change: StateChange, names: Collection[str], size: int | None) -> None:
    """Log what has become of an adapter with these names and so many bytes in its file."""
    now, before = change
    known = {"name": ",".join(names) or None, "digest": now.digest, "bytes": size, "who": "engine"}
    if now.stages:
        stages = {f"{stage}_ms": round(spent * 1000, 1) for stage, spent in now.seconds.items()}
        seconds = round(sum(now.seconds.values()), 3)
        log_event(_log, "adapter load", {**known, "tier": now.tier, "seconds": seconds, **stages})
    if before is not None and RANK[now.tier] < RANK[before.tier]:
        log_event(_log, "adapter unload", {**known, "tier": before.tier, "left_in": now.tier})
    if now.state == "failed" and not _has_failed(before):
        log_event(_log, "adapter failed", {**known, "during": "load", "reason": now.reason})


def _has_failed(state: AdapterState | None) -> bool:
    return state is not None and state.state == "failed"
