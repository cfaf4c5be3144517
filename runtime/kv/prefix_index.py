"""Known blocks by the block before them, to find the one that begins as a request goes on."""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

from runtime.kv.block_keys import BlockIdentity, Salt

Entry = tuple[tuple[int, ...], int]  # tokens, and the block that holds their K/V
NEIGHBOURS = 8  # how many entries with the same beginning are looked at for one that says the same and more


class BlockChildren:
    """Indexes blocks under their parent's key, in sorted lists: one for each salt, and one for what is the base's.

    A salted block is in two: in its salt's with all its tokens, and, with those before the invocation, in the list
    without a salt, for there it holds what the base's blocks hold. Under an adapter's own blocks there is one list.
    """

    def __init__(self) -> None:
        self._blocks: dict[bytes, dict[int, BlockIdentity]] = {}
        self._lists: dict[tuple[bytes, Salt | None], list[Entry]] = {}

    def of(self, parent: bytes) -> Sequence[int]:
        """The blocks under a key."""
        return list(self._blocks.get(parent, ()))

    def any(self, parent: bytes) -> bool:
        return parent in self._blocks

    def add(self, block: int, identity: BlockIdentity) -> None:
        self._blocks.setdefault(identity.parent, {})[block] = identity
        for salt, tokens in _entries(identity):
            insort(self._lists.setdefault((identity.parent, salt), []), (tokens, block))

    def remove(self, block: int, identity: BlockIdentity) -> None:
        siblings = self._blocks[identity.parent]
        del siblings[block]
        if not siblings:
            del self._blocks[identity.parent]
        for salt, tokens in _entries(identity):
            entries = self._lists[identity.parent, salt]
            del entries[bisect_left(entries, (tokens, block))]
            if not entries:
                del self._lists[identity.parent, salt]

    def longest(self, parent: bytes, token_ids: Sequence[int], salt: Salt | None) -> tuple[int, int]:
        """The block that has most of a next block's tokens from its first on, and how many: 0 if there is none.

        `token_ids` are those of the next block that are known, `salt` says where an adapter begins to apply in it.
        """
        tokens = tuple(token_ids)
        best = 0, 0
        for of_salt, wanted in [(salt, tokens)] if salt is None else [(salt, tokens), (None, tokens[: salt.offset])]:
            entries = self._lists.get((parent, of_salt), ())
            place = bisect_left(entries, (wanted, 0))
            for held, block in entries[max(place - 1, 0) : place + 1]:  # in order, the most alike are neighbours
                best = max(best, (_common(held, wanted), block))
        return best[1], best[0]

    def extension(self, identity: BlockIdentity) -> int | None:
        """A block under the same parent that holds all that this one would, and more."""
        entries = self._lists.get((identity.parent, identity.salt), ())
        place = bisect_left(entries, (identity.token_ids, 0))
        for held, block in entries[place : place + NEIGHBOURS]:
            if held[: len(identity.token_ids)] != identity.token_ids:
                break
            if self._is_whole(block, identity, held):
                return block
        return None

    def beginning(self, identity: BlockIdentity) -> int | None:
        """A block under the same parent that holds a part of what this one would, from the first token on."""
        entries = self._lists.get((identity.parent, identity.salt), ())
        place = bisect_left(entries, (identity.token_ids, 0))
        for held, block in entries[max(place - NEIGHBOURS, 0) : place]:
            if identity.token_ids[: len(held)] == held and self._is_whole(block, identity, held):
                return block
        return None

    def _is_whole(self, block: int, sibling: BlockIdentity, held: tuple[int, ...]) -> bool:
        """Whether an entry is all of a block and not only the base's part of it, nor another namespace's."""
        other = self._blocks[sibling.parent][block]
        return other.token_ids == held and other.salt == sibling.salt and other.namespace == sibling.namespace

    def check(self, known: dict[int, BlockIdentity]) -> None:
        """Recount against all known blocks."""
        assert {b: i for siblings in self._blocks.values() for b, i in siblings.items()} == known
        assert all(self._blocks.values())
        lists: dict[tuple[bytes, Salt | None], list[Entry]] = {}
        for block, identity in known.items():
            for salt, tokens in _entries(identity):
                lists.setdefault((identity.parent, salt), []).append((tokens, block))
        assert {place: sorted(entries) for place, entries in lists.items()} == self._lists


def _entries(identity: BlockIdentity) -> Iterator[tuple[Salt | None, tuple[int, ...]]]:
    yield identity.salt, identity.token_ids
    if identity.salt is not None and identity.salt.offset > 0:
        yield None, identity.token_ids[: identity.salt.offset]


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many first tokens two have in common."""
    for count, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return count
    return min(len(left), len(right))
