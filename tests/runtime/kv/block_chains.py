"""Chains of blocks for tests of the pool, registered as a request's blocks are."""

from runtime.kv.block_keys import BlockIdentity, Salt, block_key, root_key

B = 4


def identities(token_ids, adapter=None, invocation_start=0, salt=""):
    """The identities of a request's blocks, the last one as far as it is filled."""
    parent, found = root_key(salt), []
    for start in range(0, len(token_ids), B):
        tokens = tuple(token_ids[start : start + B])
        stop = start + len(tokens)
        within = Salt(adapter, invocation_start - start) if adapter and start <= invocation_start < stop else None
        key = block_key(parent, tokens, start, adapter, invocation_start)
        namespace = adapter if adapter and stop > invocation_start else None
        found.append(BlockIdentity(key, parent, tokens, within, namespace, first=start == 0))
        parent = key
    return found


def compute(pool, token_ids, **fields):
    """Hold the blocks of a request, known ones first, and register all of them."""
    chain = identities(token_ids, **fields)
    blocks = pool.match([each.key for each in chain])
    pool.share(blocks)
    taken = pool.allocate(len(chain) - len(blocks))
    assert taken is not None
    blocks += taken
    for index, identity in enumerate(chain):
        blocks[index] = pool.register(blocks[index], identity, blocks[index - 1] if index else None)
    return blocks


def find(pool, token_ids, **fields):
    """How many of a request's tokens are known, by whole blocks and within one."""
    chain = identities(token_ids, **fields)
    blocks = pool.match([each.key for each in chain if len(each.token_ids) == B])
    if len(blocks) == len(chain):
        return len(token_ids)
    following = chain[len(blocks)]
    return len(blocks) * B + pool.match_within(following.parent, following.token_ids, following.salt)[1]
