"""What a block of K/V is known by: its tokens, all before them, and whose weights computed them.

A block's key hashes its parent's key, its own tokens and a salt. The root of a chain is the tenant's
`cache_salt` and nothing else. Blocks that end at or before the invocation index carry no adapter salt: they
are the base's blocks, whoever computed them. The first block that reaches past the invocation index is
salted with the adapter's digest and the offset of the invocation inside the block, for the same tokens with
two invocation points hold different K/V; later blocks inherit the salt through their parent. Plain LoRA is
invocation index 0, and the base has no adapter. So is, for keys, an adapter that leaves K and V as the base's.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

KEY_BYTES = 32


class Salt(NamedTuple):
    """Whose weights begin to apply inside a block, and at which of its tokens."""

    adapter: str
    offset: int


class BlockIdentity(NamedTuple):
    """A block that holds K/V: `token_ids` are as many as are filled, `parent` is the key of the block before it.

    `namespace` is the adapter of whose weights some of its K/V are, None if all are the base's.
    """

    key: bytes
    parent: bytes
    token_ids: tuple[int, ...]
    salt: Salt | None
    namespace: str | None


def root_key(cache_salt: str) -> bytes:
    """The parent of a first block; `cache_salt` keeps tenants apart."""
    return blake2b(b"root\0" + cache_salt.encode(), digest_size=KEY_BYTES).digest()


def block_salt(start: int, length: int, adapter: str | None, invocation_start: int) -> Salt | None:
    """The salt of the block whose `length` tokens begin at position `start`, if the adapter begins to apply in it."""
    if adapter is not None and start <= invocation_start < start + length:
        return Salt(adapter, invocation_start - start)
    return None


def block_key(parent: bytes, token_ids: Sequence[int], start: int, adapter: str | None, invocation_start: int) -> bytes:
    """The key of the block whose first token stands at position `start` of its request."""
    hasher = blake2b(parent, digest_size=KEY_BYTES)
    hasher.update(array("q", token_ids).tobytes())
    salt = block_salt(start, len(token_ids), adapter, invocation_start)
    if salt is not None:
        hasher.update(f"{salt.adapter}@{salt.offset}".encode())
    return hasher.digest()
