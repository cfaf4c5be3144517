"""How many servers there should be: a pure function of how long requests wait."""

from collections.abc import Sequence

WAIT_SECONDS = 1.0  # a new request waits so long on the mean server: too long
IDLE_LOAD = 0.5  # of all places but one server's: with less work than that, one server is too many


def servers_wanted(current: int, queue_seconds: Sequence[float], loads: Sequence[float]) -> int:
    """One server in two more where requests wait, one less where nobody waits and the others have room, else as many.

    `queue_seconds` has what a new request would wait on each server, `loads` the share of its places that is taken;
    both may lack servers that have not said anything yet.
    """
    if not queue_seconds or not loads:
        return current
    if sum(queue_seconds) / len(queue_seconds) > WAIT_SECONDS:
        return current + max(1, current // 2)
    if current > 1 and not any(queue_seconds) and sum(loads) < (current - 1) * IDLE_LOAD:
        return current - 1
    return current
