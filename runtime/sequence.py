"""One sequence: its tokens, how far its K/V has been computed, and the blocks that hold it."""

import secrets
import time
from collections.abc import Iterable
from typing import Literal

from runtime.block_keys import block_key, root_key
from runtime.messages import Generate

FinishReason = Literal["stop", "length"]


class Sequence:
    """Prompt and generated tokens of one request, from admission to its end.

    `computed` counts the tokens whose K/V is in the cache. `activation` is the first position that the adapter
    applies to; it is fixed at admission and outlives preemption. `seed` is the request's own or drawn here.
    `max_tokens` bounds prompt and output together; `eos_token_ids` end it unless the request ignores them.
    """

    def __init__(self, request: Generate, *, max_tokens: int, eos_token_ids: Iterable[int] = ()):
        params = request.params
        self.request_id = request.request_id
        self.params = params
        self.adapter = request.adapter
        self.activation = request.activation
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self.stop_ids = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else eos_token_ids)
        self.token_ids = list(request.token_ids)
        self.num_prompt = len(request.token_ids)
        self.max_tokens = min(max_tokens, self.num_prompt + params.max_tokens)
        self.root = root_key(request.cache_salt)
        self.computed = 0
        self.blocks: list[int] = []
        self.keys: list[bytes] = []
        self.cached_tokens: int | None = None  # prompt tokens reused at the first admission
        self.enqueued_at = time.monotonic()
        self.started_at: float | None = None

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def missing(self) -> int:
        """Tokens whose K/V is still to be computed: one while it decodes."""
        return len(self.token_ids) - self.computed

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def forbidden_ids(self) -> frozenset[int]:
        """Tokens that may not be sampled now: what would end the sequence before its least length."""
        return self.stop_ids if self.num_generated < self.params.min_tokens else frozenset()

    def append(self, token_id: int) -> FinishReason | None:
        """Take a sampled token; the reason when it ends the sequence."""
        self.token_ids.append(token_id)
        if token_id in self.stop_ids:
            return "stop"
        return "length" if len(self.token_ids) >= self.max_tokens else None

    def keys_up_to(self, tokens: int, block_size: int) -> list[bytes]:
        """Keys of the full blocks among the first `tokens` tokens, each computed once."""
        while (len(self.keys) + 1) * block_size <= tokens:
            start = len(self.keys) * block_size
            parent = self.keys[-1] if self.keys else self.root
            block_tokens = self.token_ids[start : start + block_size]
            self.keys.append(block_key(parent, block_tokens, start, self.adapter, self.activation))
        return self.keys[: tokens // block_size]

    def namespace_of(self, block_index: int, block_size: int) -> str | None:
        """Whose K/V a block holds: the adapter's once it reaches past the activation index, else the base's."""
        return self.adapter if (block_index + 1) * block_size > self.activation else None
