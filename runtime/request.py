"""A request inside the engine: its tokens, how far they are computed, and the blocks that it holds."""

import itertools
import secrets
import time
from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from runtime.kv.block_keys import BlockChain
from runtime.messages import EngineCode, Generate, TokenLogprobs

if TYPE_CHECKING:
    from runtime.grammar.constraint import Constraint

FinishReason = Literal["stop", "length"]


class RequestRefused(ValueError):
    """The engine cannot run a request; `code` is what the client's error is made of."""

    def __init__(self, code: EngineCode, message: str):
        super().__init__(message)
        self.code: EngineCode = code


def check_limits(command: Generate, max_model_len: int, vocab_size: int) -> None:
    """Raise RequestRefused for a request that an engine with these limits can never run."""
    tokens, params = command.token_ids, command.params
    if not tokens:
        raise RequestRefused("empty_prompt", "the prompt has no tokens")
    longest = max_model_len - (params.max_tokens > 0)
    if len(tokens) > longest:
        message = f"the prompt has {len(tokens)} tokens; at most {longest} leave room to answer"
        raise RequestRefused("context_length_exceeded", message)
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        raise RequestRefused("invalid_token_id", f"token ids must be between 0 and {vocab_size - 1}")
    if not 0 <= command.invocation_start <= len(tokens):
        message = f"invocation_start must be between 0 and {len(tokens)}, not {command.invocation_start}"
        raise RequestRefused("invalid_invocation_start", message)
    if params.max_tokens < 0:
        raise RequestRefused("invalid_max_tokens", f"max_tokens must be at least 0, not {params.max_tokens}")
    given = {
        "stop_token_ids": params.stop_token_ids,
        "logit_bias": params.logit_bias,
        "allowed_token_ids": params.allowed_token_ids,
        "bad_words": tuple(itertools.chain.from_iterable(params.bad_words)),
    }
    for name, token_ids in given.items():
        if any(not 0 <= token < vocab_size for token in token_ids):
            raise RequestRefused("invalid_token_id", f"{name} must be between 0 and {vocab_size - 1}")


class TokenCounts:
    """Distinct tokens in order of appearance, and how often each was generated; updates cost only what is new."""

    def __init__(self, prompt: Iterable[int], start: int) -> None:
        # Both arrays grow: callers read them at once and keep no reference.
        self.ids = array("q", dict.fromkeys(prompt))  # int64
        self.counts = array("i", [0]) * len(self.ids)  # int32; 0 for a token of the prompt alone
        self._places = {token_id: place for place, token_id in enumerate(self.ids)}
        self._counted = start  # generated tokens begin at this position

    def catch_up(self, token_ids: list[int]) -> None:
        """Count the tokens that a request has generated since the last call."""
        for token_id in token_ids[self._counted :]:
            place = self._places.setdefault(token_id, len(self.ids))
            if place == len(self.ids):
                self.ids.append(token_id)
                self.counts.append(0)
            self.counts[place] += 1
        self._counted = len(token_ids)


class Request:
    """Prompt and generated tokens of one request, from the queue to its end.

    `max_tokens` bounds prompt and output together. `eos_token_ids` end the request unless its parameters ignore them.
    """

    def __init__(
        self,
        command: Generate,
        *,
        max_tokens: int,
        eos_token_ids: Iterable[int] = (),
        prefix_id: str | None = None,
        constraint: "Constraint | None" = None,
    ):
        params = command.params
        self.request_id = command.request_id
        self.params = params
        self.adapter = command.adapter  # digest; None for the base
        self.invocation_start = command.invocation_start  # first position that the adapter applies to; never changes
        self.groups = command.groups
        self.prefix_id = prefix_id  # the prefix is computed to be held, and nothing is generated
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self.constraint = constraint  # of `params.grammar`
        ends = () if params.ignore_eos and constraint is None else eos_token_ids
        self.stop_ids = frozenset(params.stop_token_ids) | frozenset(ends)
        self._end_ids = self.stop_ids | frozenset(eos_token_ids)  # that may not come before `min_tokens`
        self.max_tokens = min(max_tokens, len(command.token_ids) + params.max_tokens)
        self.num_prompt = len(command.token_ids)
        # The prompt's first token whose log-probability is still to be computed; `num_prompt` if none is
        self.unscored = self.num_prompt if params.prompt_logprobs is None else max(params.logprobs_from, 1)
        self.prompt_logprobs: list[TokenLogprobs] = []  # those of the tokens before
        self.token_ids = list(command.token_ids)  # all that are known: the prompt's and the generated ones
        self.pending = 0  # tokens that launched steps sample; they count, though their ids are not known yet
        self.computed = 0  # tokens whose K/V are in the cache, or will be after the launched steps
        self._penalised: TokenCounts | None = None
        self.chain = BlockChain(command)  # the keys of its blocks
        self.blocks: list[int] = []  # its block table, one reference each
        self.holds_adapter = False  # its adapter is resident and referenced
        self.may_start_early = True  # it may run once without its adapter, up to invocation_start
        self.reloaded = False  # host memory has been searched for its K/V since it began to wait
        self.cached_tokens: int | None = None  # prompt tokens whose K/V were reused at its first start
        self.enqueued_at = time.monotonic()
        self.started_at: float | None = None

    def __len__(self) -> int:
        return len(self.token_ids) + self.pending

    @property
    def missing(self) -> int:
        """Tokens whose K/V are still to be computed: one while the request decodes."""
        return len(self) - self.computed

    @property
    def lacks_adapter(self) -> bool:
        """Whether the request can be computed only up to `invocation_start` for now."""
        return self.adapter is not None and not self.holds_adapter

    @property
    def reach(self) -> int:
        """Tokens that can be computed now: without the adapter, only those before `invocation_start`."""
        if not self.lacks_adapter:
            return self.missing
        return min(self.missing, max(self.invocation_start - self.computed, 0))

    @property
    def generates(self) -> bool:
        """Whether a token is sampled after the prompt."""
        return self.prefix_id is None and self.params.max_tokens > 0

    @property
    def scores(self) -> bool:
        """Whether log-probabilities of the prompt are still to be computed."""
        return self.unscored < self.num_prompt

    @property
    def reusable(self) -> int:
        """The first tokens whose K/V are enough: of the others the logits are needed too."""
        return self.unscored - 1 if self.scores else len(self) - 1

    @property
    def first_event(self) -> dict[str, Any]:
        """What the first event of a request says besides its tokens, once its prompt has been computed."""
        assert self.started_at is not None
        return {
            "cached_tokens": self.cached_tokens,
            "queue_seconds": self.started_at - self.enqueued_at,
            "started_at": self.started_at,
            "computed_at": time.monotonic(),
        }

    @property
    def num_generated(self) -> int:
        return len(self) - self.num_prompt

    @property
    def generated(self) -> list[int]:
        """The generated tokens that are known."""
        return self.token_ids[self.num_prompt :]

    @property
    def is_whole(self) -> bool:
        """Whether the launched steps compute everything that is left."""
        return self.missing == 0 or (self.num_generated > 0 and len(self) >= self.max_tokens)

    @property
    def needs_tokens(self) -> bool:
        """Whether all tokens must be known when the next one is sampled, not only when it is computed."""
        return self.has_penalty or bool(self.params.bad_words) or self.constraint is not None

    @property
    def has_penalty(self) -> bool:
        params = self.params
        return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0

    @property
    def penalised(self) -> TokenCounts:
        """The tokens whose logits a penalty changes, counted up to the last known one.

        The prompt's tokens are among them only if there is a repetition penalty.
        """
        if self._penalised is None:
            prompt = self.token_ids[: self.num_prompt] if self.params.repetition_penalty != 1.0 else ()
            self._penalised = TokenCounts(prompt, self.num_prompt)
        self._penalised.catch_up(self.token_ids)
        return self._penalised

    @property
    def forbidden_ids(self) -> frozenset[int]:
        """Tokens that may not be sampled next.

        Before `min_tokens`, those that end a text, ignored or not; and the last token of a bad word, after its others.
        """
        forbidden = self._end_ids if self.num_generated < self.params.min_tokens else frozenset()
        if not self.params.bad_words:
            return forbidden
        generated = self.generated
        completed = {
            word[-1]
            for word in self.params.bad_words
            if len(word) == 1 or tuple(generated[len(generated) - len(word) + 1 :]) == word[:-1]
        }
        return forbidden | completed

    def advance(self, tokens: int, *, samples: bool) -> None:
        """A step was launched that computes the next `tokens`, and samples one more if it `samples`."""
        self.computed += tokens
        self.pending += samples

    def forget_pending(self) -> None:
        """Discard the tokens that launched steps sample; the K/V of known tokens will be computed all the same."""
        self.pending = 0
        self.computed = min(self.computed, len(self.token_ids))

    def tell(self, token_id: int) -> None:
        """Make the first pending token known until `untell`, before it is appended for good."""
        self.pending -= 1
        self.token_ids.append(token_id)

    def untell(self) -> None:
        self.pending += 1
        self.token_ids.pop()

    def append(self, token_id: int) -> FinishReason | None:
        """Make the first pending token known. Returns the reason if it ends the request."""
        assert self.pending > 0, "no launched step samples a token of this request"
        self.pending -= 1
        self.token_ids.append(token_id)
        if token_id in self.stop_ids:
            return "stop"
        return "length" if len(self.token_ids) >= self.max_tokens else None
