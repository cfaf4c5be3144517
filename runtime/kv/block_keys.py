"""The keys of K/V blocks: a hash of a block's tokens, of all tokens before it, and of the weights that computed it.

A block's key hashes its parent's key, its own tokens and a salt. The root of a chain is the tenant's
`cache_salt` and nothing else. Blocks that end at or before `invocation_start` have no adapter salt: they are the base's
blocks, also if a request under an adapter computed them. The first block that reaches past `invocation_start` is salted
with the adapter's digest and the offset of `invocation_start` inside the block, because the same tokens with two
offsets have different K/V; later blocks inherit the salt through their parent. Plain LoRA has `invocation_start` 0, the
base has no adapter, and an adapter that leaves every K and V as the base's is keyed as the base.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

from runtime.messages import Generate

KEY_BYTES = 32


class Salt(NamedTuple):
    """An adapter that begins to apply inside a block."""

    adapter: str  # digest
    offset: int  # of the first token in the block that it applies to


class BlockIdentity(NamedTuple):
    """The content of a block that has K/V."""

    key: bytes
    parent: bytes  # key of the block before it, or the root key
    token_ids: tuple[int, ...]  # as many as have K/V
    salt: Salt | None
    namespace: str | None  # the adapter that computed some of its K/V; None: all are the base's
    first: bool  # no block is before it: `parent` is a root key


def root_key(cache_salt: str) -> bytes:
    """The parent key of a first block; `cache_salt` separates tenants."""
    return blake2b(b"root\0" + cache_salt.encode(), digest_size=KEY_BYTES).digest()


def block_salt(start: int, length: int, adapter: str | None, invocation_start: int) -> Salt | None:
    """The salt of the block of `length` tokens from position `start`, if the adapter begins to apply in it."""
    if adapter is not None and start <= invocation_start < start + length:
        return Salt(adapter, invocation_start - start)
    return None


def block_key(parent: bytes, token_ids: Sequence[int], start: int, adapter: str | None, invocation_start: int) -> bytes:
    """The key of the block of `token_ids`, the first of which is at position `start` of its request."""
    hasher = blake2b(parent, digest_size=KEY_BYTES)
    hasher.update(array("q", token_ids).tobytes())
    salt = block_salt(start, len(token_ids), adapter, invocation_start)
    if salt is not None:
        hasher.update(f"{salt.adapter}@{salt.offset}".encode())
    return hasher.digest()


class BlockChain:
    """The keys of the blocks of one request, each computed once.

    Methods get the request's `token_ids`, which only grow, and the number of tokens in a block.
    """

    def __init__(self, command: Generate) -> None:
        self.root = root_key(command.cache_salt)  # parent key of the first block
        self.keys: list[bytes] = []  # of full blocks, as far as they were asked for
        self.namespace = None if command.kv_is_base else command.adapter  # of K/V from invocation_start on
        self.private = False  # blocks of the namespace are registered no more: its K/V were dropped meanwhile
        self._invocation_start = command.invocation_start

    def keys_up_to(self, token_ids: Sequence[int], tokens: int, block_size: int) -> list[bytes]:
        """The keys of the full blocks among the first `tokens` tokens."""
        while (len(self.keys) + 1) * block_size <= tokens:
            start = len(self.keys) * block_size
            self.keys.append(self._key(len(self.keys), token_ids[start : start + block_size], start))
        return self.keys[: tokens // block_size]

    def parent_of(self, index: int) -> bytes:
        """The key of the block before block `index`; the keys up to there must have been computed."""
        return self.keys[index - 1] if index else self.root

    def salt_of(self, index: int, block_size: int) -> Salt | None:
        """The salt of a full block."""
        return block_salt(index * block_size, block_size, self.namespace, self._invocation_start)

    def identity_of(self, token_ids: Sequence[int], computed: int, index: int, block_size: int) -> BlockIdentity:
        """The identity of block `index`, full or not, with the tokens of it among the first `computed` ones."""
        start = index * block_size
        tokens = tuple(token_ids[start : min(start + block_size, computed)])
        stop = start + len(tokens)
        keys = self.keys_up_to(token_ids, stop, block_size)
        key = keys[index] if index < len(keys) else self._key(index, tokens, start)
        salt = block_salt(start, len(tokens), self.namespace, self._invocation_start)
        namespace = self.namespace if stop > self._invocation_start else None
        return BlockIdentity(key, self.parent_of(index), tokens, salt, namespace, first=index == 0)

    def _key(self, index: int, token_ids: Sequence[int], start: int) -> bytes:
        return block_key(self.parent_of(index), token_ids, start, self.namespace, self._invocation_start)
