"""What becomes of the blocks that requests can find, for whoever routes requests to where their K/V are."""

from runtime.kv.block_keys import BlockIdentity
from runtime.messages import KvChanges, KvRemoved, KvStored

NAME_BYTES = 8  # of a key's end: routers take a block's name as a number of 64 bits


def block_name(key: bytes) -> int:
    """The number that stands for a block's key outside of the engine."""
    return int.from_bytes(key[-NAME_BYTES:], "big")


class KvLog:
    """The full blocks that became known or unknown since `take`, in order, on the device and in host memory.

    Blocks that are not full are left out: nobody can ask for one by its key, and no block follows one.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._changes: list[KvStored | KvRemoved] = []

    def stored(self, identity: BlockIdentity, *, host: bool) -> None:
        if len(identity.token_ids) < self._block_size:
            return
        name, last = block_name(identity.key), self._changes[-1] if self._changes else None
        parent = None if identity.first else block_name(identity.parent)
        if (
            isinstance(last, KvStored)
            and last.blocks[-1] == parent
            and (last.host, last.namespace) == (host, identity.namespace)
        ):
            last.blocks.append(name)
            last.token_ids.extend(identity.token_ids)
            return
        tokens = list(identity.token_ids)
        self._changes.append(
            KvStored(blocks=[name], parent=parent, token_ids=tokens, namespace=identity.namespace, host=host)
        )

    def removed(self, identity: BlockIdentity, *, host: bool) -> None:
        if len(identity.token_ids) < self._block_size:
            return
        last = self._changes[-1] if self._changes else None
        if isinstance(last, KvRemoved) and last.host == host:
            last.blocks.append(block_name(identity.key))
        else:
            self._changes.append(KvRemoved(blocks=[block_name(identity.key)], host=host))

    def take(self) -> list[KvChanges]:
        """One message of everything since the last call; none if there is nothing."""
        changes, self._changes = self._changes, []
        return [KvChanges(changes=changes)] if changes else []
