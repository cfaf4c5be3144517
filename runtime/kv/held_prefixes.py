"""Prefixes whose K/V is held for a time, whatever else the blocks are needed for."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from runtime.admission import RequestRefused
from runtime.kv.block_pool import BlockPool
from runtime.messages import Generate, HoldPrefix, PrefixEnded, PrefixHeld, SamplingParams
from runtime.request import Request

EndReason = Literal["expired", "dropped", "adapter_retired"]

HELD_SHARE = 2  # prefixes may hold one block in so many


@dataclass(eq=False, slots=True)
class Hold:
    """A prefix: promised `size` blocks while it is computed, then holding `blocks` until `ends_at`."""

    command: HoldPrefix
    size: int
    blocks: list[int]
    ends_at: float | None = None  # None while it is computed


def as_generate(command: HoldPrefix) -> Generate:
    """The request that computes what is to be held, but for generating nothing."""
    return Generate(
        request_id=command.request_id,
        token_ids=command.token_ids,
        params=SamplingParams(max_tokens=1),
        adapter=command.adapter,
        invocation_start=command.invocation_start,
        kv_is_base=command.kv_is_base,
        cache_salt=command.cache_salt,
    )


class PrefixHolds:
    """Owns held prefixes and their references to blocks, one for each prefix.

    They hold at most half of all blocks, and leave what the longest request needs. `clock` is in seconds.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        longest: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._pool = pool
        self._block_size = block_size
        others = -(-longest // block_size)
        self.limit = max(min((pool.num_blocks - 1) // HELD_SHARE, pool.num_blocks - 1 - others), 0)
        self._holds: dict[str, Hold] = {}
        self.clock = clock

    @property
    def blocks_held(self) -> int:
        """Different blocks held; a beginning that prefixes share counts once."""
        return len({block for hold in self._holds.values() for block in hold.blocks})

    def promise(self, command: HoldPrefix) -> None:
        """Keep room for a prefix that is about to be computed. Raises RequestRefused."""
        if not self._pool.prefix_cache:
            raise RequestRefused("prefix_cache_off", "the engine runs without a prefix cache: nothing would be found")
        if command.prefix_id in self._holds:
            raise RequestRefused("duplicate_prefix", f"prefix {command.prefix_id} is held already")
        size = -(-len(command.token_ids) // self._block_size)
        taken = self.blocks_held + sum(hold.size for hold in self._holds.values() if hold.ends_at is None)
        if taken + size > self.limit:
            message = (
                f"it takes {size} blocks, prefixes may hold {self.limit} and {taken} are taken; they leave "
                "half of all blocks, and as many as the longest request needs"
            )
            raise RequestRefused("prefixes_full", message)
        self._holds[command.prefix_id] = Hold(command, size, [])

    def keep(self, request: Request, blocks: list[int]) -> PrefixHeld:
        """A promised prefix has been computed: hold its blocks, whose references are handed over.

        Raises RequestRefused, and gives them back, when they cannot be found because their K/V was dropped meanwhile.
        """
        assert request.prefix_id is not None
        hold = self._holds[request.prefix_id]
        if not all(map(self._pool.knows, blocks)):
            del self._holds[request.prefix_id]
            self._pool.free(blocks)
            raise RequestRefused("prefix_dropped", "its K/V was dropped while it was computed")
        hold.blocks, hold.ends_at = blocks, self.clock() + hold.command.ttl_seconds
        return PrefixHeld(
            request_id=hold.command.request_id,
            prefix_id=hold.command.prefix_id,
            tokens=len(hold.command.token_ids),
            blocks=len(blocks),
            cached_tokens=request.cached_tokens or 0,
        )

    def release(self, prefix_id: str) -> str | None:
        """Hold a prefix no longer; the id of its request if it is still being computed. Unknown ones are no error."""
        hold = self._holds.pop(prefix_id, None)
        if hold is None:
            return None
        self._pool.free(hold.blocks)
        return hold.command.request_id if hold.ends_at is None else None

    def expire(self) -> list[PrefixEnded]:
        """End those whose time is over."""
        if not self._holds:
            return []
        now = self.clock()
        over = [name for name, hold in self._holds.items() if hold.ends_at is not None and hold.ends_at <= now]
        return self._end(over, "expired")

    def end_dropped(self, reason: EndReason) -> list[PrefixEnded]:
        """End those of which a block can no longer be found."""
        holds = self._holds.items()
        return self._end([name for name, hold in holds if not all(map(self._pool.knows, hold.blocks))], reason)

    def _end(self, prefix_ids: Iterable[str], reason: EndReason) -> list[PrefixEnded]:
        for prefix_id in prefix_ids:
            self.release(prefix_id)
        return [PrefixEnded(prefix_id=prefix_id, reason=reason) for prefix_id in prefix_ids]

    @property
    def held(self) -> list[list[int]]:
        """The blocks of each prefix."""
        return [hold.blocks for hold in self._holds.values()]

    def check(self, computing: set[str]) -> None:
        """Recount the bound; `computing` are the prefixes that requests compute now."""
        assert self.blocks_held <= self.limit
        assert {name for name, hold in self._holds.items() if hold.ends_at is None} == computing
        for hold in self._holds.values():
            assert all(map(self._pool.knows, hold.blocks))
