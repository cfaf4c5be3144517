"""The keys of blocks. Tests of K/V reuse, here and elsewhere, have the number of their rule in their name:

1. A key hashes the parent's key, the block's tokens and a salt; the root's salt is the tenant's, nothing else.
2. A block that ends at or before `invocation_start` has no adapter's salt: it is the base's, for all requests.
3. The first block past it is salted with the adapter's digest and the offset of `invocation_start`; later ones inherit
   the salt.
4. Plain LoRA has `invocation_start` 0, and the base has no adapter anywhere.
5. Blocks before `invocation_start` are still the tenant's own.
6. The first tokens of a block that straddles `invocation_start` are copied from any block that has them.
7. A full hit computes the last token again, under the weights of its position.
8. Base and other adapters read the K/V that an aLoRA request computed before its invocation, and none past it.
9. A chunk may have both kinds of token; one before the invocation needs no resident adapter.
10. Before the invocation log-probabilities are the base's; tokens found in the cache have none.
11. Retiring an adapter drops its own blocks and no others.
12. Reuse is judged by equality in float32.
"""

import random

from runtime.kv.block_keys import block_key, root_key

B = 16


def chain(tokens, adapter=None, invocation_start=0, salt=""):
    keys, parent = [], root_key(salt)
    for start in range(0, len(tokens) - len(tokens) % B, B):
        parent = block_key(parent, tokens[start : start + B], start, adapter, invocation_start)
        keys.append(parent)
    return keys


TOKENS = random.Random(0).choices(range(50_000), k=4 * B)


def test_rule_1_a_key_depends_on_all_tokens_before_it_and_on_the_salt():
    keys = chain(TOKENS)
    assert keys == chain(list(TOKENS))
    changed = [TOKENS[0] + 1, *TOKENS[1:]]
    assert not set(keys) & set(chain(changed))
    assert not set(keys) & set(chain(TOKENS, salt="tenant"))
    assert not set(chain(TOKENS, salt="a")) & set(chain(TOKENS, salt="b"))


def test_rule_2_blocks_that_end_at_or_before_the_invocation_are_the_bases():
    for invocation_start in range(4 * B + 1):
        shared = invocation_start // B
        keys = chain(TOKENS, "adapter", invocation_start)
        assert keys[:shared] == chain(TOKENS)[:shared]
        assert not set(keys[shared:]) & set(chain(TOKENS))


def test_rule_3_the_offset_of_the_invocation_inside_its_block_matters():
    straddled = {chain(TOKENS, "adapter", B + offset)[1] for offset in range(B)}
    assert len(straddled) == B
    followers = {chain(TOKENS, "adapter", B + offset)[2] for offset in range(B)}
    assert len(followers) == B, "later blocks inherit the salt"


def test_rule_4_plain_lora_is_invocation_zero_and_adapters_stay_apart():
    assert not set(chain(TOKENS, "a")) & set(chain(TOKENS, "b"))
    assert not set(chain(TOKENS, "a")) & set(chain(TOKENS))


def test_rule_5_dropping_the_adapter_salt_does_not_drop_the_tenants():
    assert chain(TOKENS, "a", 2 * B, salt="t")[:2] == chain(TOKENS, salt="t")[:2]
    assert chain(TOKENS, "a", 2 * B, salt="t")[:2] != chain(TOKENS)[:2]
