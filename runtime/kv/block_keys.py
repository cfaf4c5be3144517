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
