"""The blocks of requests: found, copied from, taken, made known and given back."""

from collections.abc import Iterable
from typing import NamedTuple

from runtime.kv.block_keys import block_salt
from runtime.kv.block_pool import BlockPool
from runtime.request import KvCopy, Request


class Found(NamedTuple):
    """What is known of a request's K/V: whole blocks, and the first `tokens` of another one, `source`."""

    blocks: list[int]
    source: int
    tokens: int

    @property
    def whole(self) -> "Found":
        """Without the part of a block."""
        return Found(self.blocks, 0, 0)


class BlockTables:
    """Gives requests their blocks; with what other requests have left, they need not compute everything.

    `copies` are to be done before the step in which they were ordered writes anything, and then reported to `copied`.
    """

    def __init__(self, pool: BlockPool, block_size: int):
        self.pool = pool
        self.block_size = block_size
        self._copying: list[Request] = []

    @property
    def copies(self) -> list[KvCopy]:
        return [request.copy for request in self._copying if request.copy is not None]

    def find(self, request: Request) -> Found:
        """The K/V known of a request, short of its last token: that is computed again, for its logits."""
        size, limit = self.block_size, len(request) - 1
        blocks = self.pool.match(request.keys_up_to(limit, size))
        start = len(blocks) * size
        wanted = request.token_ids[start : min(start + size, limit)]
        salt = block_salt(start, size, request.kv_namespace, request.invocation_start)
        source, tokens = self.pool.match_within(request.parent_of(len(blocks)), wanted, salt) if wanted else (0, 0)
        return Found(blocks, source, tokens)

    def known_tokens(self, found: Found) -> int:
        return len(found.blocks) * self.block_size + found.tokens

    def take(self, request: Request, spare: int) -> bool:
        """Blocks for all tokens of a request that holds none, so that `spare` are left over; False changes nothing."""
        found = self.find(request)
        # A source is one block more to hold; what can do without it must not wait for it.
        return self._take(request, found, spare) or (found.tokens > 0 and self._take(request, found.whole, spare))

    def _take(self, request: Request, found: Found, spare: int) -> bool:
        held = [*found.blocks, found.source] if found.tokens else found.blocks
        missing = self.blocks_for(request) - len(found.blocks)
        if missing + spare > self.pool.available_beside(held):
            return False
        self.pool.share(held)
        taken = self.pool.allocate(missing)
        assert taken is not None
        if found.tokens:
            request.copy = KvCopy(found.source, taken[0], found.tokens)
            self._copying.append(request)
        request.blocks = found.blocks + taken
        request.computed = self.known_tokens(found)
        return True

    def copied(self) -> None:
        """The copies ordered so far are done: their sources may go."""
        for request in self._copying:
            self._end_copy(request)
        self._copying.clear()

    def grow(self, request: Request) -> bool:
        """Blocks for the tokens that a request has got since; False when there are too few."""
        missing = self.blocks_for(request) - len(request.blocks)
        if missing <= 0:
            return True
        taken = self.pool.allocate(missing)
        request.blocks += taken or []
        return taken is not None

    def register(self, request: Request, since: int, until: int) -> None:
        """Make known the blocks that became full between `since` and `until` computed tokens."""
        for index in range(since // self.block_size, until // self.block_size):
            self._register(request, index)

    def register_tail(self, request: Request) -> None:
        """Make known what has been computed of a last block that is not full; nothing may be written to it any more."""
        if request.copy is None and request.computed % self.block_size:
            self._register(request, request.computed // self.block_size)

    def give_back(self, request: Request) -> None:
        """Free a request's blocks; what has been computed stays known."""
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
        """Recount the pool against what requests and `others` hold."""
        requests = list(requests)
        sources = {request: [] if request.copy is None else [request.copy.source] for request in requests}
        self.pool.check([*(request.blocks + sources[request] for request in requests), *others])
        assert set(self._copying) == {request for request in requests if request.copy is not None}
        for request in requests:
            assert len(request.blocks) * self.block_size >= request.computed
