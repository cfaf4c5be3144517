"""The index of a prefix cache: blocks with known K/V, by their key and by the block before them."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, KeysView, Sequence

from runtime.kv.block_keys import BlockIdentity, Salt
from runtime.kv.log import KvLog

Entry = tuple[tuple[int, ...], int]  # tokens, and the block that holds their K/V
NEIGHBOURS = 8  # entries with a common beginning that are compared, to find a block that contains another


class PrefixIndex:
    """Maps block numbers to identities and back. Evicts nothing and counts no references: its owner does.

    Under each parent key, sorted lists of tokens find the block that continues a request: one list for each salt, and
    one without a salt. A salted block is in two lists: in its salt's with all its tokens, and in the one without a salt
    with the tokens before `invocation_start`, whose K/V are the base's. Blocks after a salted one need no salt.

    `log`, if there is one, is told of each change; `host` says that the blocks are slots of host memory.
    """

    def __init__(self, log: KvLog | None = None, *, host: bool = False) -> None:
        self._log, self._host = log, host
        self._identities: dict[int, BlockIdentity] = {}
        self._by_key: dict[bytes, int] = {}
        self._children: dict[bytes, dict[int, BlockIdentity]] = {}
        self._lists: dict[tuple[bytes, Salt | None], list[Entry]] = {}

    def __len__(self) -> int:
        return len(self._identities)

    def __contains__(self, block: int) -> bool:
        return block in self._identities

    def __iter__(self) -> Iterator[int]:
        return iter(self._identities)

    def __getitem__(self, block: int) -> BlockIdentity:
        return self._identities[block]

    @property
    def keys(self) -> KeysView[bytes]:
        return self._by_key.keys()

    def add(self, block: int, identity: BlockIdentity) -> None:
        self._identities[block] = identity
        self._by_key[identity.key] = block
        self._children.setdefault(identity.parent, {})[block] = identity
        for salt, tokens in _entries(identity):
            insort(self._lists.setdefault((identity.parent, salt), []), (tokens, block))
        if self._log is not None:
            self._log.stored(identity, host=self._host)

    def remove(self, block: int) -> BlockIdentity:
        identity = self._identities.pop(block)
        del self._by_key[identity.key]
        siblings = self._children[identity.parent]
        del siblings[block]
        if not siblings:
            del self._children[identity.parent]
        for salt, tokens in _entries(identity):
            entries = self._lists[identity.parent, salt]
            del entries[bisect_left(entries, (tokens, block))]
            if not entries:
                del self._lists[identity.parent, salt]
        if self._log is not None:
            self._log.removed(identity, host=self._host)
        return identity

    def find(self, key: bytes) -> int | None:
        return self._by_key.get(key)

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the longest prefix of `keys` that is known."""
        blocks: list[int] = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def match_within(self, parent: bytes, token_ids: Sequence[int], salt: Salt | None) -> tuple[int, int]:
        """The block after `parent` that has most of a next block's first tokens, and how many; (0, 0) if none has any.

        `token_ids` are the tokens of that next block, `salt` is its salt. A request can copy the K/V of the matching
        tokens; the rest of the block is not its own.
        """
        tokens = tuple(token_ids)
        best = 0, 0
        for of_salt, sought in [(salt, tokens)] if salt is None else [(salt, tokens), (None, tokens[: salt.offset])]:
            entries = self._lists.get((parent, of_salt), ())
            place = bisect_left(entries, (sought, 0))
            for held, block in entries[max(place - 1, 0) : place + 1]:  # the longest common beginnings are neighbours
                best = max(best, (_common(held, sought), block))
        return best[1], best[0]

    def has_children(self, key: bytes) -> bool:
        return key in self._children

    def after(self, key: bytes) -> list[int]:
        """All blocks that follow the block of `key`, each behind the one before it; `key` need not be known."""
        blocks = list(self._children.get(key, ()))
        for block in blocks:
            blocks += self._children.get(self._identities[block].key, ())
        return blocks

    def in_namespace(self, namespace: str | None) -> list[int]:
        return [block for block, identity in self._identities.items() if identity.namespace == namespace]

    def extension(self, identity: BlockIdentity) -> int | None:
        """A known block with the same parent that holds all K/V of this one, and more."""
        entries = self._lists.get((identity.parent, identity.salt), ())
        place = bisect_left(entries, (identity.token_ids, 0))
        for held, block in entries[place : place + NEIGHBOURS]:
            if held[: len(identity.token_ids)] != identity.token_ids:
                break
            if self._is_whole(block, identity, held):
                return block
        return None

    def beginning(self, identity: BlockIdentity) -> int | None:
        """A known block with the same parent that holds the first part of this one's K/V."""
        entries = self._lists.get((identity.parent, identity.salt), ())
        place = bisect_left(entries, (identity.token_ids, 0))
        for held, block in entries[max(place - NEIGHBOURS, 0) : place]:
            if identity.token_ids[: len(held)] == held and self._is_whole(block, identity, held):
                return block
        return None

    def _is_whole(self, block: int, sibling: BlockIdentity, held: tuple[int, ...]) -> bool:
        """Whether an entry has all tokens of a block, and the block is of the same salt and namespace."""
        other = self._identities[block]
        return other.token_ids == held and other.salt == sibling.salt and other.namespace == sibling.namespace

    def check(self) -> None:
        assert self._by_key == {identity.key: block for block, identity in self._identities.items()}
        assert all(self._children.values())
        children = {block: identity for siblings in self._children.values() for block, identity in siblings.items()}
        assert children == self._identities
        lists: dict[tuple[bytes, Salt | None], list[Entry]] = {}
        for block, identity in self._identities.items():
            for salt, tokens in _entries(identity):
                lists.setdefault((identity.parent, salt), []).append((tokens, block))
        assert {place: sorted(entries) for place, entries in lists.items()} == self._lists


def _entries(identity: BlockIdentity) -> Iterator[tuple[Salt | None, tuple[int, ...]]]:
    yield identity.salt, identity.token_ids
    if identity.salt is not None and identity.salt.offset > 0:
        yield None, identity.token_ids[: identity.salt.offset]


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many first tokens two sequences have in common."""
    for count, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return count
    return min(len(left), len(right))
