"""The engine process and K/V: prefixes held and released, namespaces dropped, over the socket."""

import json

import pytest

from runtime.messages import (
    Answer,
    DropNamespace,
    Failed,
    GetStats,
    HoldPrefix,
    PrefixEnded,
    PrefixHeld,
    Ready,
    ReleasePrefix,
    Stats,
    Tokens,
)
from tests.runtime.engine_peer import Peer, generate
from tests.runtime.tiny_engine import BLOCK_BYTES
from tests.runtime.tiny_model import TINY

TOKENS = list(range(20, 60))


@pytest.fixture
def engine(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    peer = Peer(tmp_path)
    peer.next(Ready)
    yield peer
    peer.close()


def hold(name):
    return HoldPrefix(request_id=f"hold {name}", prefix_id=name, token_ids=TOKENS)


def stats(engine):
    engine.send(GetStats())
    return engine.next(Stats)


def test_a_prefix_is_held_found_and_released(engine):
    engine.send(hold("p"))
    held = engine.next(PrefixHeld)
    assert held == PrefixHeld(request_id="hold p", prefix_id="p", tokens=40, blocks=3, cached_tokens=0)
    engine.send(generate("a", token_ids=[*TOKENS, 7]))
    assert engine.next(Tokens).cached_tokens == 40
    engine.send(hold("p"))
    assert engine.next(Failed).code == "duplicate_prefix"
    assert stats(engine).blocks_held == 3
    engine.send(ReleasePrefix(prefix_id="p"))
    assert stats(engine).blocks_held == 0


def test_a_namespace_is_dropped_with_what_is_held_of_it(engine):
    engine.send(hold("p"))
    engine.next(PrefixHeld)
    namespace = stats(engine).namespaces[""]
    assert (namespace.blocks_used, namespace.query_tokens, namespace.hit_tokens) == (3, 40, 0)
    engine.send(DropNamespace(request_id="drop", namespace=None))
    answer, ended = engine.next_of_each(Answer, PrefixEnded)
    assert answer == Answer(request_id="drop")
    assert ended == PrefixEnded(prefix_id="p", reason="dropped")
    engine.send(generate("a", token_ids=[*TOKENS, 7]))
    assert engine.next(Tokens).cached_tokens == 0
    assert stats(engine).host_kv.bytes_total == 0


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
