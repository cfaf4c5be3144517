"""The blocks of each request: matched in the prefix cache, allocated, registered and freed."""

from collections.abc import Iterable
from typing import NamedTuple

from runtime.kv.block_pool import BlockPool
from runtime.request import KvCopy, Request


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
        self._copying: list[Request] = []

    @property
    def copies(self) -> list[KvCopy]:
        return [request.copy for request in self._copying if request.copy is not None]

    def find(self, request: Request) -> Match:
        """The known K/V of a request, without its last token: that is computed again, for its logits."""
        size, limit = self.block_size, len(request) - 1
        blocks = self.pool.match(request.keys_up_to(limit, size))
        index = len(blocks)
        start = index * size
        following = request.token_ids[start : min(start + size, limit)]
        if not following:
            return Match(blocks, 0, 0)
        source, tokens = self.pool.match_within(request.parent_of(index), following, request.salt_of(index, size))
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
            request.copy = KvCopy(match.source, allocated[0], match.tokens)
            self._copying.append(request)
        request.blocks = match.blocks + allocated
        request.computed = self.known_tokens(match)
        return True

    def copied(self) -> None:
        """The ordered copies are done: release their sources."""
        for request in self._copying:
            self._end_copy(request)
        self._copying.clear()

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
        if request.copy is None and request.computed % self.block_size:
            self._register(request, request.computed // self.block_size)

    def free(self, request: Request) -> None:
        """Free the blocks of a request; what it has computed stays in the prefix cache."""
        self.register_tail(request)
        if request.copy is not None:
            self._copying.remove(request)
            self._end_copy(request)
        self.pool.free(request.blocks)
        request.blocks, request.computed = [], 0

    def _register(self, request: Request, index: int) -> None:
        identity = request.identity_of(index, self.block_size)
        if request.kv_is_private and identity.namespace is not None:
            return
        previous = request.blocks[index - 1] if index else None
        request.blocks[index] = self.pool.register(request.blocks[index], identity, previous)

    def _end_copy(self, request: Request) -> None:
        assert request.copy is not None
        self.pool.free([request.copy.source])
        request.copy = None

    def blocks_for(self, request: Request) -> int:
        """How many blocks all tokens of a request take."""
        return -(-len(request) // self.block_size)

    def check(self, requests: Iterable[Request], others: Iterable[list[int]] = ()) -> None:
        """Recount the pool against the blocks of `requests` and of `others`."""
        requests = list(requests)
        sources = {request: [] if request.copy is None else [request.copy.source] for request in requests}
        self.pool.check([*(request.blocks + sources[request] for request in requests), *others])
        assert set(self._copying) == {request for request in requests if request.copy is not None}
        for request in requests:
            assert len(request.blocks) * self.block_size >= request.computed
