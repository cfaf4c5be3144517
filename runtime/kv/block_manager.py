"""The blocks of each request: matched in the prefix cache, allocated, registered and freed."""

from collections.abc import Iterable
from typing import NamedTuple

from runtime.kv.block_pool import BlockPool
from runtime.kv.cache import KvCopy
from runtime.request import Request


class Match(NamedTuple):
    """Known K/V of a request: whole blocks, then the first `tokens` tokens of block `source`."""

    blocks: list[int]
    source: int
    tokens: int  # 0: no part of a block

    @property
    def whole(self) -> "Match":
        """The whole blocks alone."""
        return Match(self.blocks, 0, 0)


class BlockManager:
    """Gives each request its block table, with blocks that other requests have computed where they match.

    `copies` are due before the step writes to any block; `copied` ends them.
    """

    def __init__(self, pool: BlockPool, block_size: int):
        self.pool = pool
        self.block_size = block_size
        self._copies: dict[Request, KvCopy] = {}  # ordered and not done yet; each source is referenced until then

    @property
    def copies(self) -> list[KvCopy]:
        return list(self._copies.values())

    def find(self, request: Request) -> Match:
        """The known K/V of a request, without the tokens that are computed again for their logits, as its last one."""
        size, limit = self.block_size, request.reusable
        blocks = self.pool.match(request.chain.keys_up_to(request.token_ids, limit, size))
        index = len(blocks)
        start = index * size
        following = request.token_ids[start : min(start + size, limit)]
        if not following:
            return Match(blocks, 0, 0)
        chain = request.chain
        source, tokens = self.pool.match_within(chain.parent_of(index), following, chain.salt_of(index, size))
        return Match(blocks, source, tokens)

    def known_tokens(self, match: Match) -> int:
        return len(match.blocks) * self.block_size + match.tokens

    def allocate(self, request: Request, spare: int) -> bool:
        """Fill the empty block table of a request for all its tokens, and leave `spare` blocks; False changes nothing.

        The source of a copy is one more block to hold: a request that fits without it is admitted without it.
        """
        match = self.find(request)
        return self._allocate(request, match, spare) or (
            match.tokens > 0 and self._allocate(request, match.whole, spare)
        )

    def _allocate(self, request: Request, match: Match, spare: int) -> bool:
        held = [*match.blocks, match.source] if match.tokens else match.blocks
        missing = self.blocks_for(request) - len(match.blocks)
        if missing + spare > self.pool.available_beside(held):
            return False
        self.pool.share(held)
        allocated = self.pool.allocate(missing)
        assert allocated is not None
        if match.tokens:
            self._copies[request] = KvCopy(match.source, allocated[0])
        request.blocks = match.blocks + allocated
        request.computed = self.known_tokens(match)
        return True

    def copied(self) -> None:
        """The ordered copies are done: release their sources."""
        for request in list(self._copies):
            self._end_copy(request)

    def grow(self, request: Request) -> bool:
        """Allocate blocks for the tokens that a request has got since; False if there are too few."""
        missing = self.blocks_for(request) - len(request.blocks)
        if missing <= 0:
            return True
        allocated = self.pool.allocate(missing)
        request.blocks += allocated or []
        return allocated is not None

    def register(self, request: Request, since: int, until: int) -> None:
        """Register the blocks that became full between `since` and `until` computed tokens."""
        for index in range(since // self.block_size, until // self.block_size):
            self._register(request, index)

    def register_tail(self, request: Request) -> None:
        """Register the computed part of a last block that is not full; nothing may write to it afterwards."""
        if request not in self._copies and request.computed % self.block_size:
            self._register(request, request.computed // self.block_size)

    def free(self, request: Request) -> None:
        """Free the blocks of a request; what it has computed stays in the prefix cache."""
        self.register_tail(request)
        if request in self._copies:
            self._end_copy(request)
        self.pool.free(request.blocks)
        request.blocks, request.computed = [], 0

    def _register(self, request: Request, index: int) -> None:
        identity = request.chain.identity_of(request.token_ids, request.computed, index, self.block_size)
        if request.chain.private and identity.namespace is not None:
            return
        previous = request.blocks[index - 1] if index else None
        request.blocks[index] = self.pool.register(request.blocks[index], identity, previous)

    def _end_copy(self, request: Request) -> None:
        self.pool.free([self._copies.pop(request).source])

    def blocks_for(self, request: Request) -> int:
        """How many blocks all tokens of a request take."""
        return -(-len(request) // self.block_size)

    def check(self, requests: Iterable[Request], others: Iterable[list[int]] = ()) -> None:
        """Recount the pool against the blocks of `requests` and of `others`."""
        requests = list(requests)
        sources = {request: [copy.source] for request, copy in self._copies.items()}
        self.pool.check([*(request.blocks + sources.get(request, []) for request in requests), *others])
        assert sources.keys() <= set(requests)
        for request in requests:
            assert len(request.blocks) * self.block_size >= request.computed
