"""One request: its tokens, how far its K/V has been computed, and the blocks that hold it."""

import secrets
import time
from collections.abc import Iterable
from typing import Literal, NamedTuple

from runtime.kv.block_keys import BlockIdentity, block_key, block_salt, root_key
from runtime.messages import Generate
from runtime.token_counts import TokenCounts

FinishReason = Literal["stop", "length"]


class KvCopy(NamedTuple):
    """The first `tokens` slots of block `source` go to block `target` before that is written to."""

    source: int
    target: int
    tokens: int


class Request:
    """Prompt and generated tokens of one request, from admission to its end.

    `computed` counts the tokens whose K/V is in the cache, or will be after the steps under way; `pending` those that
    such steps sample, which count although nobody knows them yet. `invocation_start` is its adapter's first position:
    it is fixed at admission and outlives preemption. `kv_namespace` is the adapter that K/V from there on
    belong to, None if it leaves them as the base's. `seed` is the request's own or drawn here. `max_tokens` bounds
    prompt and output together; `eos_token_ids` end it unless the request ignores them. With a `prefix_id`, nothing is
    generated: it is a prefix that is computed to be held.
    """

    def __init__(
        self,
        command: Generate,
        *,
        max_tokens: int,
        eos_token_ids: Iterable[int] = (),
        prefix_id: str | None = None,
    ):
        params = command.params
        self.request_id = command.request_id
        self.params = params
        self.adapter = command.adapter
        self.invocation_start = command.invocation_start
        self.kv_namespace = None if command.kv_is_base else command.adapter
        self.prefix_id = prefix_id
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self.stop_ids = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else eos_token_ids)
        self.token_ids = list(command.token_ids)
        self.num_prompt = len(command.token_ids)
        self._penalised: TokenCounts | None = None
        self.max_tokens = min(max_tokens, self.num_prompt + params.max_tokens)
        self.root = root_key(command.cache_salt)
        self.computed = self.pending = 0
        self.blocks: list[int] = []
        self.keys: list[bytes] = []
        self.copy: KvCopy | None = None  # ordered and not done yet: the source is held until then
        self.holds_adapter = False
        self.may_start_early = True  # without its adapter, up to the invocation: once
        self.recalled = False  # its K/V have been asked for in host memory since it began to wait
        self.kv_is_private = False  # its adapter has been forgotten, so what it computes is for nobody else
        self.cached_tokens: int | None = None  # prompt tokens reused at the first admission
        self.enqueued_at = time.monotonic()
        self.started_at: float | None = None

    def __len__(self) -> int:
        return len(self.token_ids) + self.pending

    @property
    def missing(self) -> int:
        """Tokens whose K/V is still to be computed: one while it decodes."""
        return len(self) - self.computed

    @property
    def lacks_adapter(self) -> bool:
        """Whether the request can go only as far as its invocation for now."""
        return self.adapter is not None and not self.holds_adapter

    @property
    def reach(self) -> int:
        """Tokens that can be computed with what the request holds: those before the invocation need no adapter."""
        if not self.lacks_adapter:
            return self.missing
        return min(self.missing, max(self.invocation_start - self.computed, 0))

    @property
    def num_generated(self) -> int:
        return len(self) - self.num_prompt

    @property
    def is_whole(self) -> bool:
        """Whether nothing is to be computed beside what is under way."""
        return len(self) >= self.max_tokens or self.missing == 0

    @property
    def needs_tokens(self) -> bool:
        """Whether its tokens must be known to sample the next one."""
        params = self.params
        return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0

    @property
    def penalised(self) -> TokenCounts:
        """The tokens whose logits its penalties change, counted as far as they are known; if any penalty is asked for.

        Those of the prompt are among them only where repetition is penalised.
        """
        if self._penalised is None:
            prompt = self.token_ids[: self.num_prompt] if self.params.repetition_penalty != 1.0 else ()
            self._penalised = TokenCounts(prompt, self.num_prompt)
        self._penalised.catch_up(self.token_ids)
        return self._penalised

    @property
    def forbidden_ids(self) -> frozenset[int]:
        """Tokens that may not be sampled now: what would end the request before its least length."""
        return self.stop_ids if self.num_generated < self.params.min_tokens else frozenset()

    def advance(self, tokens: int, *, samples: bool) -> None:
        """A step is under way that computes the next `tokens`, and samples one after them if it `samples`."""
        self.computed += tokens
        self.pending += samples

    def forget_pending(self) -> None:
        """Nobody waits any more for what is under way; of the K/V, those of known tokens will be there."""
        self.pending = 0
        self.computed = min(self.computed, len(self.token_ids))

    def append(self, token_id: int) -> FinishReason | None:
        """Take the first pending token; the reason when it ends the request."""
        assert self.pending > 0, "no step that samples is under way"
        self.pending -= 1
        self.token_ids.append(token_id)
        if token_id in self.stop_ids:
            return "stop"
        return "length" if len(self.token_ids) >= self.max_tokens else None

    def keys_up_to(self, tokens: int, block_size: int) -> list[bytes]:
        """Keys of the full blocks among the first `tokens` tokens, each computed once."""
        while (len(self.keys) + 1) * block_size <= tokens:
            start = len(self.keys) * block_size
            block_tokens = self.token_ids[start : start + block_size]
            parent = self.parent_of(len(self.keys))
            self.keys.append(block_key(parent, block_tokens, start, self.kv_namespace, self.invocation_start))
        return self.keys[: tokens // block_size]

    def parent_of(self, block_index: int) -> bytes:
        """The key before that of a block, whose predecessors' keys have been computed."""
        return self.keys[block_index - 1] if block_index else self.root

    def identity_of(self, block_index: int, block_size: int) -> BlockIdentity:
        """What a block of the request is known by, with as much of it as has been computed."""
        start = block_index * block_size
        tokens = tuple(self.token_ids[start : min(start + block_size, self.computed)])
        keys = self.keys_up_to(start + len(tokens), block_size)
        parent = self.parent_of(block_index)
        key = (
            keys[block_index]
            if block_index < len(keys)
            else block_key(parent, tokens, start, self.kv_namespace, self.invocation_start)
        )
        salt = block_salt(start, len(tokens), self.kv_namespace, self.invocation_start)
        return BlockIdentity(key, parent, tokens, salt, self.namespace_of(start + len(tokens)))

    def namespace_of(self, stop: int) -> str | None:
        """Whose the K/V of a block up to position `stop` are: the adapter's if it reaches past the invocation."""
        return self.kv_namespace if stop > self.invocation_start else None
