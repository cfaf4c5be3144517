"""One adapter's copy in a tier of memory, and how much it is waited for."""

import enum
from dataclasses import dataclass


class Claim(enum.IntEnum):
    """How much an adapter is waited for: memory is taken only from those that are waited for less."""

    NONE = 0
    EXPECTED = 1  # by a request that is queued, and may be aborted before its turn
    AWAITED = 2  # by a request at its turn, or by whoever asked for the load itself


@dataclass(eq=False, slots=True)
class Entry:
    """An adapter's copy in a tier: `offset` and `size` in bytes; it is being filled until it is `ready`.

    `target` is where it is being moved to. In the tick `chance_at` it is safe from eviction, and up to `spared_until`
    as long as others work.
    """

    offset: int
    size: int
    ready: bool = False
    references: int = 0
    claim: Claim = Claim.NONE
    last_use: int = 0
    chance_at: int = -1
    spared_until: int = 0
    target: int | None = None
