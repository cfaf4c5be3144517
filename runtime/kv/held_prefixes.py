"""Prefixes whose blocks are held until they are released, so that they are not evicted."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from runtime.kv.block_pool import BlockPool
from runtime.messages import Generate, HoldPrefix, PrefixEnded, PrefixHeld, SamplingParams
from runtime.request import Request, RequestRefused

EndReason = Literal["dropped", "adapter_retired"]

HELD_SHARE = 2  # prefixes may hold one block in so many


@dataclass(eq=False, slots=True)
class HeldPrefix:
    command: HoldPrefix
    size: int  # blocks reserved for it
    blocks: list[int]  # empty while it is computed

    @property
    def computed(self) -> bool:
        return bool(self.blocks)


def as_generate(command: HoldPrefix) -> Generate:
    """The request that computes a prefix; the engine ends it before it generates a token."""
    return Generate(
        request_id=command.request_id,
        token_ids=command.token_ids,
        params=SamplingParams(max_tokens=1),
        adapter=command.adapter,
        invocation_start=command.invocation_start,
        kv_is_base=command.kv_is_base,
        cache_salt=command.cache_salt,
        tenant=command.tenant,
    )


class HeldPrefixes:
    """Owns held prefixes, with one reference of each prefix to each of its blocks.

    All prefixes together hold at most half of the blocks, and leave as many as the `longest` request needs (tokens).
    """

    def __init__(self, pool: BlockPool, *, block_size: int, longest: int):
        self._pool = pool
        self._block_size = block_size
        others = -(-longest // block_size)
        self.limit = max(min((pool.num_blocks - 1) // HELD_SHARE, pool.num_blocks - 1 - others), 0)
        self._prefixes: dict[str, HeldPrefix] = {}

    @property
    def blocks_held(self) -> int:
        """Distinct blocks that are held: a beginning that prefixes share counts once."""
        return len({block for prefix in self._prefixes.values() for block in prefix.blocks})

    def reserve(self, command: HoldPrefix) -> None:
        """Reserve blocks for a prefix that is about to be computed. Raises RequestRefused."""
        if not self._pool.prefix_cache:
            raise RequestRefused("prefix_cache_off", "the engine runs without a prefix cache: nothing would be found")
        if command.prefix_id in self._prefixes:
            raise RequestRefused("duplicate_prefix", f"prefix {command.prefix_id} is held already")
        size = -(-len(command.token_ids) // self._block_size)
        taken = self.blocks_held + sum(prefix.size for prefix in self._prefixes.values() if not prefix.computed)
        if taken + size > self.limit:
            message = (
                f"it takes {size} blocks, prefixes may hold {self.limit} and {taken} are taken; they leave "
                "half of all blocks, and as many as the longest request needs"
            )
            raise RequestRefused("prefixes_full", message)
        self._prefixes[command.prefix_id] = HeldPrefix(command, size, [])

    def hold(self, request: Request, blocks: list[int]) -> PrefixHeld:
        """Hold the blocks of a reserved prefix that `request` has computed; their references are handed over.

        Raises RequestRefused, and frees the blocks, if their K/V were dropped meanwhile.
        """
        assert request.prefix_id is not None
        prefix = self._prefixes[request.prefix_id]
        if not all(map(self._pool.knows, blocks)):
            del self._prefixes[request.prefix_id]
            self._pool.free(blocks)
            raise RequestRefused("prefix_dropped", "its K/V was dropped while it was computed")
        prefix.blocks = blocks
        return PrefixHeld(
            request_id=prefix.command.request_id,
            prefix_id=prefix.command.prefix_id,
            tokens=len(prefix.command.token_ids),
            blocks=len(blocks),
            cached_tokens=request.cached_tokens or 0,
        )

    def release(self, prefix_id: str) -> str | None:
        """Release a prefix, known or not. Returns the id of its request if it is still being computed."""
        prefix = self._prefixes.pop(prefix_id, None)
        if prefix is None:
            return None
        self._pool.free(prefix.blocks)
        return None if prefix.computed else prefix.command.request_id

    def end_dropped(self, reason: EndReason) -> list[PrefixEnded]:
        """Release the prefixes of which a block is not known any more."""
        dropped = [
            prefix_id for prefix_id, prefix in self._prefixes.items() if not all(map(self._pool.knows, prefix.blocks))
        ]
        for prefix_id in dropped:
            self.release(prefix_id)
        return [PrefixEnded(prefix_id=prefix_id, reason=reason) for prefix_id in dropped]

    @property
    def held(self) -> list[list[int]]:
        """The blocks of each prefix."""
        return [prefix.blocks for prefix in self._prefixes.values()]

    def check(self, computing: Iterable[str]) -> None:
        """Recount the bound; `computing` are the ids of the prefixes that requests compute now."""
        assert self.blocks_held <= self.limit
        assert {name for name, prefix in self._prefixes.items() if not prefix.computed} == set(computing)
        for prefix in self._prefixes.values():
            assert all(map(self._pool.knows, prefix.blocks))
