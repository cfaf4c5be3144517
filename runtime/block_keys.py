"""What a block of K/V is known by: its tokens, all before them, and whose weights computed them.

A block's key hashes its parent's key, its own tokens and a salt. The root of a chain is the tenant's
`cache_salt` and nothing else. Blocks that end at or before the activation index carry no adapter salt: they
are the base's blocks, whoever computed them. The first block that reaches past the activation index is
salted with the adapter's digest and the offset of the activation inside the block, for the same tokens with
two activation points hold different K/V; later blocks inherit the salt through their parent. Plain LoRA is
activation index 0, and the base has no adapter.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

KEY_BYTES = 32


def root_key(cache_salt: str) -> bytes:
    """The parent of a first block; `cache_salt` keeps tenants apart."""
    return blake2b(b"root\0" + cache_salt.encode(), digest_size=KEY_BYTES).digest()


def block_key(parent: bytes, token_ids: Sequence[int], start: int, adapter: str | None, activation: int) -> bytes:
    """The key of the full block whose first token stands at position `start` of its sequence."""
    hasher = blake2b(parent, digest_size=KEY_BYTES)
    hasher.update(array("q", token_ids).tobytes())
    if adapter is not None and start <= activation < start + len(token_ids):
        hasher.update(f"{adapter}@{activation - start}".encode())
    return hasher.digest()
