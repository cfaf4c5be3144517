"""Blocks of K/V that go to host memory when they are evicted, and come back when a request wants them."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import NamedTuple

from runtime.kv.block_keys import BlockIdentity, block_salt
from runtime.kv.block_tables import BlockTables, Found
from runtime.kv.host_blocks import HostBlocks
from runtime.kv.transfer import KvMover
from runtime.messages import HostKvStats
from runtime.request import Request


class Arrival(NamedTuple):
    """A block of the device that is being filled from host memory, and what it will be known by."""

    block: int
    identity: BlockIdentity


@dataclass(eq=False, slots=True)
class Recall:
    """Blocks on their way to the device, each after the other and the first after the last of `held`.

    Their K/V are good up to `good` of them: a namespace may be dropped while they are under way.
    """

    held: list[int]
    arrivals: list[Arrival]
    moving: "Future[None]"
    good: int

    @property
    def blocks(self) -> list[int]:
        """All that it references."""
        return [*self.held, *(arrival.block for arrival in self.arrivals)]


class HostKv:
    """Owns the blocks that left the device for host memory, and those on their way back with their references.

    Nothing waits in a step but for a block's old content to be saved before the block is written to. A request whose
    K/V come back waits meanwhile, once for each time that it wants to start, and finds them on the device then.
    """

    def __init__(self, tables: BlockTables, mover: KvMover) -> None:
        self._tables, self._pool, self._mover = tables, tables.pool, mover
        self._blocks = HostBlocks(mover.num_slots)
        self._recalls: list[Recall] = []
        self._stores = self._loads = 0
        self._pool.on_evict = self._store

    def watch(self, on_arrival: Callable[[], None]) -> None:
        """Call `on_arrival`, from a thread, when there is something to `land`."""
        self._mover.on_move = on_arrival

    def wait(self, timeout: float) -> bool:
        """Block until there is something to land, or `timeout` seconds pass; False when nothing is under way."""
        wait([recall.moving for recall in self._recalls], timeout, FIRST_COMPLETED)
        return bool(self._recalls)

    def settle(self, blocks: Iterable[int]) -> None:
        """Wait until what was in `blocks`, which are about to be written to, has been saved."""
        self._mover.settle(blocks)

    def close(self) -> None:
        self._mover.close()

    # ------------------------------------------------------------------ there

    def _store(self, block: int, identity: BlockIdentity) -> None:
        """A block is evicted from the device."""
        slot = self._blocks.add(identity)
        if slot is not None:
            self._mover.save(block, slot)
            self._stores += 1

    # ------------------------------------------------------------------ and back

    def awaits(self, request: Request, spare: int) -> bool:
        """Whether a request that holds no blocks should wait for K/V that come back; starts that if there are any.

        There must be room for the whole request with `spare` blocks left over, as to start it: else nothing comes.
        """
        if not self._blocks and not self._recalls:
            return False
        found = self._tables.find(request)
        following = request.keys[len(found.blocks) :]
        if any(following[:1] == [arrival.identity.key] for recall in self._recalls for arrival in recall.arrivals):
            return True
        if request.recalled:
            return False
        slots = self._find(request, found)
        missing = self._tables.blocks_for(request) - len(found.blocks)
        if not slots or max(missing, len(slots)) + spare > self._pool.available_beside(found.blocks):
            return False
        request.recalled = True
        self._recall(found.blocks, slots)
        return True

    def _find(self, request: Request, found: Found) -> list[int]:
        """The slots of what follows the blocks on the device: of whole ones, and of one that has some of the next."""
        size, limit = self._tables.block_size, len(request) - 1
        slots = self._blocks.match(request.keys_up_to(limit, size)[len(found.blocks) :])
        index = len(found.blocks) + len(slots)
        start = index * size
        wanted = request.token_ids[start : min(start + size, limit)]
        salt = block_salt(start, size, request.kv_namespace, request.invocation_start)
        slot, tokens = self._blocks.match_within(request.parent_of(index), wanted, salt) if wanted else (0, 0)
        return [*slots, slot] if tokens > (0 if slots else found.tokens) else slots

    def _recall(self, held: list[int], slots: Sequence[int]) -> None:
        identities = [self._blocks.take(slot) for slot in slots]
        self._pool.share(held)
        blocks = self._pool.allocate(len(slots))
        assert blocks is not None
        arrivals = [Arrival(*pair) for pair in zip(blocks, identities, strict=True)]
        self._recalls.append(Recall(held, arrivals, self._mover.load(slots, blocks), good=len(arrivals)))
        self._blocks.free(slots)  # whatever is saved there from now on is saved after they have been read
        self._loads += len(slots)

    def land(self) -> None:
        """Make known what has come back; whoever waits for it finds it then."""
        for recall in [recall for recall in self._recalls if recall.moving.done()]:
            self._recalls.remove(recall)
            recall.moving.result()
            blocks = list(recall.held)
            for block, identity in recall.arrivals[: recall.good]:
                blocks.append(self._pool.register(block, identity, blocks[-1] if blocks else None))
            self._pool.free([*blocks, *(arrival.block for arrival in recall.arrivals[recall.good :])])

    def drop(self, namespace: str | None, dropped: Sequence[bytes]) -> None:
        """Forget a namespace, and what comes after the blocks whose keys were `dropped` from the device."""
        self._blocks.drop_namespace(namespace)
        self._blocks.drop_after(dropped)
        gone = set(dropped)
        for recall in self._recalls:
            for index, (_, identity) in enumerate(recall.arrivals[: recall.good]):
                if identity.namespace == namespace or identity.parent in gone:
                    recall.good = index
                    self._blocks.drop_after(arrival.identity.key for arrival in recall.arrivals[index:])
                    break

    # ------------------------------------------------------------------ looking in

    @property
    def held(self) -> list[list[int]]:
        """The blocks of the device that each recall references."""
        return [recall.blocks for recall in self._recalls]

    @property
    def keys(self) -> Collection[bytes]:
        """Of the blocks in host memory."""
        return self._blocks.keys

    def by_namespace(self) -> Counter[str | None]:
        """How many blocks of each namespace are in host memory."""
        return self._blocks.by_namespace()

    def stats(self) -> HostKvStats:
        return HostKvStats(
            bytes_total=self._blocks.num_slots * self._mover.slot_bytes,
            bytes_used=len(self._blocks) * self._mover.slot_bytes,
            blocks=len(self._blocks),
            stores=self._stores,
            loads=self._loads,
            evictions=self._blocks.evictions,
        )

    def check(self, roots: Collection[bytes] = ()) -> None:
        """Recount. `roots`, if given, are the parents of all first blocks."""
        arriving = [arrival.identity.key for recall in self._recalls for arrival in recall.arrivals[: recall.good]]
        self._blocks.check([*self._pool.keys, *arriving, *roots] if roots else ())
