"""The blocks of sequences: found, copied from, taken, made known and given back."""

from collections.abc import Iterable
from typing import NamedTuple

from runtime.kv.block_keys import block_salt
from runtime.kv.block_pool import BlockPool
from runtime.request import KvCopy, Sequence


class Found(NamedTuple):
    """What is known of a sequence's K/V: whole blocks, and the first `tokens` of another one, `source`."""

    blocks: list[int]
    source: int
    tokens: int

    @property
    def whole(self) -> "Found":
        """Without the part of a block."""
        return Found(self.blocks, 0, 0)


class BlockTables:
    """Gives sequences their blocks; with what other sequences have left, they need not compute everything.

    `copies` are to be done before the step in which they were ordered writes anything, and then reported to `copied`.
    """

    def __init__(self, pool: BlockPool, block_size: int):
        self.pool = pool
        self.block_size = block_size
        self._copying: list[Sequence] = []

    @property
    def copies(self) -> list[KvCopy]:
        return [sequence.copy for sequence in self._copying if sequence.copy is not None]

    def find(self, sequence: Sequence) -> Found:
        """The K/V known of a sequence, short of its last token: that is computed again, for its logits."""
        size, limit = self.block_size, len(sequence) - 1
        blocks = self.pool.match(sequence.keys_up_to(limit, size))
        start = len(blocks) * size
        wanted = sequence.token_ids[start : min(start + size, limit)]
        salt = block_salt(start, size, sequence.kv_adapter, sequence.activation)
        source, tokens = self.pool.match_within(sequence.parent_of(len(blocks)), wanted, salt) if wanted else (0, 0)
        return Found(blocks, source, tokens)

    def known_tokens(self, found: Found) -> int:
        return len(found.blocks) * self.block_size + found.tokens

    def take(self, sequence: Sequence, spare: int) -> bool:
        """Blocks for all tokens of a sequence that holds none, so that `spare` are left over; False changes nothing."""
        found = self.find(sequence)
        # A source is one block more to hold; what can do without it must not wait for it.
        return self._take(sequence, found, spare) or (found.tokens > 0 and self._take(sequence, found.whole, spare))

    def _take(self, sequence: Sequence, found: Found, spare: int) -> bool:
        held = [*found.blocks, found.source] if found.tokens else found.blocks
        missing = self.blocks_for(sequence) - len(found.blocks)
        if missing + spare > self.pool.available_beside(held):
            return False
        self.pool.share(held)
        taken = self.pool.allocate(missing)
        assert taken is not None
        if found.tokens:
            sequence.copy = KvCopy(found.source, taken[0], found.tokens)
            self._copying.append(sequence)
        sequence.blocks = found.blocks + taken
        sequence.computed = self.known_tokens(found)
        return True

    def copied(self) -> None:
        """The copies ordered so far are done: their sources may go."""
        for sequence in self._copying:
            self._end_copy(sequence)
        self._copying.clear()

    def grow(self, sequence: Sequence) -> bool:
        """Blocks for the tokens that a sequence has got since; False when there are too few."""
        missing = self.blocks_for(sequence) - len(sequence.blocks)
        if missing <= 0:
            return True
        taken = self.pool.allocate(missing)
        sequence.blocks += taken or []
        return taken is not None

    def register(self, sequence: Sequence, since: int, until: int) -> None:
        """Make known the blocks that became full between `since` and `until` computed tokens."""
        for index in range(since // self.block_size, until // self.block_size):
            self._register(sequence, index)

    def register_tail(self, sequence: Sequence) -> None:
        """Make known what has been computed of a last block that is not full; nothing may be written to it any more."""
        if sequence.copy is None and sequence.computed % self.block_size:
            self._register(sequence, sequence.computed // self.block_size)

    def give_back(self, sequence: Sequence) -> None:
        """Free a sequence's blocks; what has been computed stays known."""
        self.register_tail(sequence)
        if sequence.copy is not None:
            self._copying.remove(sequence)
            self._end_copy(sequence)
        self.pool.free(sequence.blocks)
        sequence.blocks, sequence.computed = [], 0

    def _register(self, sequence: Sequence, index: int) -> None:
        identity = sequence.identity_of(index, self.block_size)
        if sequence.keeps_kv_to_itself and identity.namespace is not None:
            return
        previous = sequence.blocks[index - 1] if index else None
        sequence.blocks[index] = self.pool.register(sequence.blocks[index], identity, previous)

    def _end_copy(self, sequence: Sequence) -> None:
        assert sequence.copy is not None
        self.pool.free([sequence.copy.source])
        sequence.copy = None

    def blocks_for(self, sequence: Sequence) -> int:
        """How many blocks all tokens of a sequence take."""
        return -(-len(sequence) // self.block_size)

    def check(self, sequences: Iterable[Sequence], others: Iterable[list[int]] = ()) -> None:
        """Recount the pool against what sequences and `others` hold."""
        sequences = list(sequences)
        sources = {sequence: [] if sequence.copy is None else [sequence.copy.source] for sequence in sequences}
        self.pool.check([*(sequence.blocks + sources[sequence] for sequence in sequences), *others])
        assert set(self._copying) == {sequence for sequence in sequences if sequence.copy is not None}
        for sequence in sequences:
            assert len(sequence.blocks) * self.block_size >= sequence.computed
