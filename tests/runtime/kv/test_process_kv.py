"""The engine process with too little device memory: K/V are offloaded to host memory, and their arrival wakes it."""

import json

from runtime.messages import GetStats, Ready, Stats, Tokens
from tests.runtime.engine_peer import Peer, generate
from tests.runtime.tiny_engine import BLOCK_BYTES
from tests.runtime.tiny_model import TINY

TOKENS = list(range(20, 60))


def stats(engine):
    engine.send(GetStats())
    return engine.next(Stats)


def test_a_request_whose_kv_were_evicted_waits_until_they_are_back(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    engine = Peer(tmp_path, kv_cache_bytes=9 * BLOCK_BYTES, host_kv_bytes=2**20)
    try:
        engine.next(Ready)
        for name, tokens in (("a", TOKENS), ("b", [1, *range(120)]), ("c", [2, *range(120)])):
            engine.send(generate(name, max_tokens=1, token_ids=tokens))
            engine.next(Tokens)
        assert stats(engine).host_kv.blocks >= 3
        engine.send(generate("d", token_ids=TOKENS))
        assert engine.next(Tokens).cached_tokens == len(TOKENS) - 1
        assert stats(engine).host_kv.loads == 3
    finally:
        engine.close()
