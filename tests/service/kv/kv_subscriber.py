"""A subscriber to K/V events as vLLM documents them: its own structs, written after vllm/distributed/kv_events.py."""

from typing import Any

import msgspec
import zmq

Known = dict[int, tuple[int | None, tuple[int, ...], str | None]]  # by block: parent, tokens, name of the adapter


class KVCacheEvent(msgspec.Struct, omit_defaults=True, gc=False, tag=True):
    pass


class BlockStored(KVCacheEvent):
    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None


class BlockRemoved(KVCacheEvent):
    block_hashes: list[bytes | int]
    medium: str | None
    group_idx: int | None = None


class AllBlocksCleared(KVCacheEvent):
    pass


class KVEventBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


class Subscriber:
    """Follows a publisher, and keeps what is stored in each medium."""

    def __init__(self, endpoint: str, topic: str = "", unread: int = 1000) -> None:
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.setsockopt(zmq.RCVHWM, unread)
        self._socket.connect(endpoint)
        self._socket.subscribe(topic)
        self._decode = msgspec.msgpack.Decoder(KVEventBatch).decode
        self.topic = topic
        self.known: dict[str, Known] = {"GPU": {}, "CPU": {}}
        self.numbers: list[int] = []
        self.cleared = 0

    def close(self) -> None:
        self._socket.close(linger=0)

    def hears(self, milliseconds: int = 0) -> bool:
        return bool(self._socket.poll(milliseconds))

    def read(self) -> int:
        """Take in the next batch, and return its number."""
        assert self._socket.poll(20_000), f"nothing came after {self.numbers[-1:]}"
        topic, number, batch = self._socket.recv_multipart()
        assert topic == self.topic.encode()
        self.take(number, batch)
        return self.numbers[-1]

    def take(self, number: bytes, batch: bytes) -> None:
        self.numbers.append(int.from_bytes(number, "big"))
        for event in self._decode(batch).events:
            self._follow(event)

    def _follow(self, event: BlockStored | BlockRemoved | AllBlocksCleared) -> None:
        if isinstance(event, AllBlocksCleared):
            self.cleared += 1
            self.known = {"GPU": {}, "CPU": {}}
            return
        known = self.known[event.medium or "GPU"]
        if isinstance(event, BlockRemoved):
            for block in event.block_hashes:
                del known[block]  # an error if it is not there
            return
        parent, size = event.parent_block_hash, event.block_size
        assert len(event.token_ids) == len(event.block_hashes) * size
        for place, block in enumerate(event.block_hashes):
            assert block not in known
            known[block] = parent, tuple(event.token_ids[place * size : (place + 1) * size]), event.lora_name
            parent = block


def replayed(endpoint: str, first: int) -> list[tuple[bytes, bytes]]:
    """The batches that a replay endpoint has from a number on; an error if their end does not come."""
    with zmq.Context.instance().socket(zmq.DEALER) as socket:
        socket.connect(endpoint)
        socket.send_multipart((b"", first.to_bytes(8, "big")))
        found: list[tuple[bytes, bytes]] = []
        while True:
            assert socket.poll(20_000), f"no end came after {len(found)} batches"
            empty, number, batch = socket.recv_multipart()
            assert empty == b""
            if number == (-1).to_bytes(8, "big", signed=True):
                assert batch == b""
                return found
            found.append((number, batch))
