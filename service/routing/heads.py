"""The beginnings of prompts as a router knows them, without a tokenizer; and which of them the prefix cache holds."""

import asyncio
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any

from runtime.kv.block_keys import BlockChain
from runtime.kv.log import block_name
from runtime.messages import Generate, KvChanges, KvStored, SamplingParams

MAX_HEADS = 16  # of a prompt: its first messages, or pieces of its text
PIECE = 1024  # characters of a text that make another head
MAX_NOTED = 512  # heads that are remembered; of a server's last base prompts


def heads_of(messages: Any, text: Any) -> tuple[str, ...]:
    """Hashes of longer and longer beginnings of a prompt: of its messages, or of its text. Neither: none.

    Messages are values of JSON or have the attributes `role` and `content`. Two prompts with a common beginning have
    their first heads in common.
    """
    if isinstance(messages, Sequence) and not isinstance(messages, str):
        parts = [f"{_get(each, 'role')}\0{_text(_get(each, 'content'))}" for each in messages[:MAX_HEADS]]
    elif isinstance(text, str):
        parts = [text[at : at + PIECE] for at in range(0, min(len(text), PIECE * MAX_HEADS), PIECE)]
    else:
        return ()
    hasher, heads = blake2b(digest_size=8), []
    for part in parts:
        content = part.encode(errors="replace")
        hasher.update(len(content).to_bytes(8) + content)
        heads.append(hasher.hexdigest())
    return tuple(heads)


class PrefixHeads:
    """The heads of the last base prompts whose K/V the engine still has, as it says itself in K/V changes."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._blocks: set[tuple[int, bool]] = set()  # names of those that requests can find, and whether on the host
        self._noted: dict[str, int] = {}  # by head, the oldest first: the last full block of its prompt

    def note(self, heads: Sequence[str], token_ids: list[int], cache_salt: str) -> None:
        """Remember a prompt of the base that is to be computed; its heads as `heads_of` has them."""
        command = Generate(request_id="", token_ids=token_ids, params=SamplingParams(), cache_salt=cache_salt)
        keys = BlockChain(command).keys_up_to(token_ids, len(token_ids), self._block_size)
        if not heads or not keys:
            return
        self._noted.pop(heads[-1], None)
        self._noted[heads[-1]] = block_name(keys[-1])
        if len(self._noted) > MAX_NOTED:
            del self._noted[next(iter(self._noted))]

    def held(self) -> list[str]:
        """The heads whose prompts are known whole, on the device or in host memory."""
        return [
            head
            for head, block in self._noted.items()
            if (block, False) in self._blocks or (block, True) in self._blocks
        ]

    def on_changes(self, changes: KvChanges | None) -> None:
        """Follow the engine; None: another one has begun, and knows no block."""
        if changes is None:
            self._blocks.clear()
            return
        for change in changes.changes:
            named = ((block, change.host) for block in change.blocks)
            if isinstance(change, KvStored):
                self._blocks.update(named)
            else:
                self._blocks.difference_update(named)

    async def follow(
        self, changes: "asyncio.Queue[KvChanges | None]", onward: "asyncio.Queue[KvChanges | None] | None"
    ) -> None:
        """Take every change from the engine, and pass it on to whoever publishes them; never returns."""
        while True:
            change = await changes.get()
            self.on_changes(change)
            if onward is not None:
                onward.put_nowait(change)


def _get(message: Any, field: str) -> Any:
    return message.get(field) if isinstance(message, dict) else getattr(message, field, None)


def _text(content: Any) -> str:
    """A message's text, whether it is in one piece or in parts."""
    if isinstance(content, Iterable) and not isinstance(content, str):
        return "".join(str(_get(part, "text") or "") for part in content)
    return "" if content is None else str(content)
