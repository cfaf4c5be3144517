"""Events of the K/V cache for inference routers, as vLLM publishes them: ZeroMQ PUB, MessagePack.

A message has three frames: the topic, a sequence number of 8 bytes, big-endian, and an `EventBatch`. The layout is that
of vllm/distributed/kv_events.py, in which a batch is an array and an event a map with its `type`. A subscriber that has
missed numbers asks the replay endpoint, a ROUTER, with the first number that it wants, and gets a message (number,
batch) for each batch that is kept, then one with the number -1 and nothing.
"""

import asyncio
import logging
import time
from collections import deque

import msgspec
import zmq
import zmq.asyncio

from runtime.messages import KvChanges, KvRemoved, KvStored
from service.catalog.versions import Versions
from service.kv.endpoints import binds
from service.metrics import Metrics

_log = logging.getLogger(__name__)

KEPT_BATCHES = 10_000  # for replay; and for each subscriber that does not read, before it loses some
DEVICE, HOST = "GPU", "CPU"  # vLLM's names of media, by which routers weigh them, whatever the device is
END = (-1).to_bytes(8, "big", signed=True)  # the number of a replay's last message


class BlockStored(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Blocks can be found from now on, each behind the one before it."""

    block_hashes: list[int]
    parent_block_hash: int | None  # of the block before the first one; None: a prompt begins with it
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None  # deprecated by vLLM; adapters have no numbers here
    medium: str
    lora_name: str | None  # None: the base's


class BlockRemoved(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Blocks can be found no longer."""

    block_hashes: list[int]
    medium: str


class AllBlocksCleared(msgspec.Struct, frozen=True, tag=True):
    """No block can be found: the engine has started, or has started again."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(msgspec.Struct, frozen=True, array_like=True):
    """What became of blocks in one step."""

    ts: float  # seconds since 1970
    events: list[Event]
    data_parallel_rank: int = 0  # one engine


class EventsUnavailable(RuntimeError):
    """The endpoint of events cannot be used; the message is a sentence."""


class KvEvents:
    """Publishes the engine's changes; owns the sockets, the sequence numbers and the batches that are kept for replay.

    Nobody waits for a subscriber. One that leaves `KEPT_BATCHES` batches unread loses the next ones, and sees it by the
    sequence numbers.
    """

    def __init__(
        self, publish_at: str, topic: str, replay_at: str | None, versions: Versions, metrics: Metrics, block_size: int
    ) -> None:
        self._topic, self._versions, self._metrics, self._block_size = topic.encode(), versions, metrics, block_size
        self._encode = msgspec.msgpack.Encoder().encode
        self.published = 0  # batches: the sequence number of the next one
        self._kept: deque[tuple[bytes, bytes]] = deque(maxlen=0 if replay_at is None else KEPT_BATCHES)
        self._contexts = zmq.Context(), zmq.asyncio.Context()
        self._publisher = self._contexts[0].socket(zmq.PUB)
        self._replays = self._contexts[1].socket(zmq.ROUTER)
        self._tasks: list[asyncio.Task[None]] = []
        self._publisher.setsockopt(zmq.SNDHWM, KEPT_BATCHES)
        self._replays.setsockopt(zmq.SNDHWM, 2 * KEPT_BATCHES)  # a whole replay and its end fit
        for socket, at in ((self._publisher, publish_at), (self._replays, replay_at)):
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.IPV6, at is not None and "[" in at)
        try:
            place = publish_at
            self._publisher.bind(place) if binds(place) else self._publisher.connect(place)
            if replay_at is not None:
                place = replay_at
                self._replays.bind(place)
        except zmq.ZMQError as error:
            self._destroy()
            raise EventsUnavailable(f"cannot publish K/V events at {place}: {error.strerror}") from None

    def start(self, changes: "asyncio.Queue[KvChanges | None]") -> None:
        """Publish what comes in; None stands for an engine that has started, and knows no block."""
        self._tasks = [
            asyncio.create_task(self._follow(changes), name="kv events"),
            asyncio.create_task(self._answer_replays(), name="kv event replays"),
        ]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._destroy()

    def _destroy(self) -> None:
        for context in self._contexts:
            context.destroy()

    async def _follow(self, changes: "asyncio.Queue[KvChanges | None]") -> None:
        while True:
            self.publish(await changes.get())

    def publish(self, changes: KvChanges | None) -> None:
        """Send a batch to the subscribers that have room for it."""
        events: list[Event] = [AllBlocksCleared()]
        if changes is not None:
            events = [self._event(change) for change in changes.changes]
        number, batch = self.published.to_bytes(8, "big"), self._encode(EventBatch(time.time(), events))
        self.published += 1
        self._kept.append((number, batch))
        self._metrics.kv_event_batches.inc()
        try:
            self._send((self._topic, number, batch), or_fail=True)
        except zmq.Again:  # a subscriber has no room: count it, and send to the others
            self._metrics.kv_event_stalls.inc()
            self._send((self._topic, number, batch), or_fail=False)

    def _send(self, frames: tuple[bytes, bytes, bytes], *, or_fail: bool) -> None:
        self._publisher.setsockopt(zmq.XPUB_NODROP, or_fail)
        self._publisher.send_multipart(frames, zmq.NOBLOCK)

    def _event(self, change: KvStored | KvRemoved) -> BlockStored | BlockRemoved:
        medium = HOST if change.host else DEVICE
        if isinstance(change, KvRemoved):
            return BlockRemoved(block_hashes=change.blocks, medium=medium)
        return BlockStored(
            block_hashes=change.blocks,
            parent_block_hash=change.parent,
            token_ids=change.token_ids,
            block_size=self._block_size,
            medium=medium,
            lora_name=self._name_of(change.namespace),
        )

    def _name_of(self, digest: str | None) -> str | None:
        """What a router finds in requests as `model`: a name of the adapter, or the digest of one that has none now."""
        if digest is None:
            return None
        return next(iter(self._versions.names_of(digest)), digest)

    async def _answer_replays(self) -> None:
        while True:
            sender, *frames = await self._replays.recv_multipart()
            if len(frames) != 2 or len(frames[1]) != 8:
                _log.debug("a request for a replay has %d frames; expected are an empty one and 8 bytes", len(frames))
                continue
            wanted = [kept for kept in self._kept if kept[0] >= frames[1]]  # big-endian: in the order of the numbers
            for number, batch in [*wanted, (END, b"")]:
                await self._replays.send_multipart((sender, b"", number, batch))  # a ROUTER drops, and waits for nobody
                await asyncio.sleep(0)
