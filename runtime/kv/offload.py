"""Offloading: K/V that the device evicts are copied to host memory, and reloaded when a request needs them."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import NamedTuple

from runtime.kv.block_keys import BlockIdentity
from runtime.kv.block_manager import BlockManager, Match
from runtime.kv.host_blocks import HostBlocks
from runtime.kv.log import KvLog
from runtime.kv.transfer import BlockTransfer
from runtime.messages import HostKvStats
from runtime.request import Request


class Arrival(NamedTuple):
    """A block of the device that a reload fills, and the identity that it will be registered with."""

    block: int
    identity: BlockIdentity


@dataclass(eq=False, slots=True)
class Reload:
    """A copy of consecutive blocks from host memory to the device."""

    held: list[int]  # the blocks before the first arrival, one reference each
    arrivals: list[Arrival]
    copying: "Future[None]"
    valid: int  # how many arrivals can be registered: fewer if their namespace is dropped during the copy

    @property
    def blocks(self) -> list[int]:
        """All blocks that it references."""
        return [*self.held, *(arrival.block for arrival in self.arrivals)]


class Offload:
    """Owns the blocks in host memory, and the reloads under way with their references.

    A step waits for host copies in one case only: before it overwrites a block whose old content is still being
    copied. A request whose K/V are reloaded waits meanwhile, and then finds them in the prefix cache.
    """

    def __init__(self, block_manager: BlockManager, transfer: BlockTransfer, log: KvLog | None = None) -> None:
        self._block_manager, self._pool, self._transfer = block_manager, block_manager.pool, transfer
        self._host = HostBlocks(transfer.num_slots, log)
        self._reloads: list[Reload] = []
        self._stores = self._loads = 0

    def watch(self, on_arrival: Callable[[], None]) -> None:
        """Call `on_arrival`, from a thread, when there is something for `register_reloaded`."""
        self._transfer.on_reloaded = on_arrival

    def wait(self, timeout: float) -> bool:
        """Block until a reload ends or `timeout` seconds pass; False if there is no reload."""
        wait([reload.copying for reload in self._reloads], timeout, FIRST_COMPLETED)
        return bool(self._reloads)

    def close(self) -> None:
        self._transfer.close()

    def save_evicted(self) -> None:
        """Start to copy the blocks that were evicted since the last call to host memory."""
        for block, identity in self._pool.take_evicted():
            slot = self._host.add(identity)
            if slot is not None:
                self._transfer.offload(block, slot)
                self._stores += 1

    def before_writing(self, blocks: Iterable[int]) -> None:
        """Save evicted blocks, and wait until the old content of `blocks`, which a step will overwrite, is saved."""
        self.save_evicted()
        self._transfer.wait_offloaded(blocks)

    def waits_for_reload(self, request: Request, spare: int) -> bool:
        """Whether a request without blocks has to wait for a reload of its K/V; starts one if host memory has them.

        Nothing is reloaded unless the whole request fits and leaves `spare` blocks, as for its start. Host memory is
        searched once for each time that the request waits.
        """
        self.save_evicted()
        if not self._host and not self._reloads:
            return False
        match = self._block_manager.find(request)
        following = request.chain.keys[len(match.blocks) :]
        if any(following[:1] == [arrival.identity.key] for reload in self._reloads for arrival in reload.arrivals):
            return True
        if request.reloaded:
            return False
        slots = self._find(request, match)
        missing = self._block_manager.blocks_for(request) - len(match.blocks)
        if not slots or max(missing, len(slots)) + spare > self._pool.available_beside(match.blocks):
            return False
        request.reloaded = True
        self._start_reload(match.blocks, slots)
        return True

    def _find(self, request: Request, match: Match) -> list[int]:
        """The slots of the blocks after those on the device; the last one may match in part."""
        size, limit = self._block_manager.block_size, len(request) - 1
        slots = self._host.match(request.chain.keys_up_to(request.token_ids, limit, size)[len(match.blocks) :])
        index = len(match.blocks) + len(slots)
        start = index * size
        following = request.token_ids[start : min(start + size, limit)]
        if not following:
            return slots
        chain = request.chain
        slot, tokens = self._host.match_within(chain.parent_of(index), following, chain.salt_of(index, size))
        return [*slots, slot] if tokens > (0 if slots else match.tokens) else slots

    def _start_reload(self, held: list[int], slots: Sequence[int]) -> None:
        identities = [self._host.remove(slot) for slot in slots]
        self._pool.share(held)
        blocks = self._pool.allocate(len(slots))
        assert blocks is not None
        self.save_evicted()  # copies run in order: the old content of `blocks` is saved before it is overwritten
        arrivals = [Arrival(*pair) for pair in zip(blocks, identities, strict=True)]
        copying = self._transfer.reload(slots, blocks)
        self._reloads.append(Reload(held, arrivals, copying, valid=len(arrivals)))
        self._host.free(slots)  # copies run in order: these slots are read before they are overwritten
        self._loads += len(slots)

    def register_reloaded(self) -> None:
        """Register the blocks of the reloads that have ended, and release them: requests find them from now on."""
        for reload in [reload for reload in self._reloads if reload.copying.done()]:
            self._reloads.remove(reload)
            reload.copying.result()
            blocks = list(reload.held)
            for block, identity in reload.arrivals[: reload.valid]:
                blocks.append(self._pool.register(block, identity, blocks[-1] if blocks else None))
            self._pool.free([*blocks, *(arrival.block for arrival in reload.arrivals[reload.valid :])])

    def drop(self, namespace: str | None, dropped: Sequence[bytes]) -> None:
        """Forget a namespace, and the blocks that follow those whose keys were `dropped` from the device."""
        self.save_evicted()
        self._host.drop_namespace(namespace)
        self._host.drop_after(dropped)
        gone = set(dropped)
        for reload in self._reloads:
            for index, (_, identity) in enumerate(reload.arrivals[: reload.valid]):
                if identity.namespace == namespace or identity.parent in gone:
                    reload.valid = index
                    self._host.drop_after(arrival.identity.key for arrival in reload.arrivals[index:])
                    break

    @property
    def held(self) -> list[list[int]]:
        """The blocks of the device that each reload references."""
        return [reload.blocks for reload in self._reloads]

    @property
    def keys(self) -> Collection[bytes]:
        """The keys of the blocks in host memory."""
        return self._host.keys

    def by_namespace(self) -> Counter[str | None]:
        """How many blocks of each namespace are in host memory."""
        return self._host.by_namespace()

    def stats(self) -> HostKvStats:
        return HostKvStats(
            bytes_total=self._host.num_slots * self._transfer.slot_bytes,
            bytes_used=len(self._host) * self._transfer.slot_bytes,
            blocks=len(self._host),
            stores=self._stores,
            loads=self._loads,
            evictions=self._host.evictions,
        )

    def check(self, roots: Collection[bytes] = ()) -> None:
        """Recount. `roots`, if given, are the parent keys of all first blocks."""
        self.save_evicted()
        arriving = [arrival.identity.key for reload in self._reloads for arrival in reload.arrivals[: reload.valid]]
        self._host.check([*self._pool.keys, *arriving, *roots] if roots else ())
