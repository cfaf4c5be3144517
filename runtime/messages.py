"""The messages between the service and the engine process: commands in, events out.

Both are msgspec Structs, sent as MessagePack over one ZeroMQ socket pair. The engine knows adapters by digest only: no
message has an adapter's name.
"""

from typing import Literal

import msgspec

CANNOT_START, BROKEN = 3, 4  # exit statuses of an engine; the last line that it has written says why

Group = tuple[str | None, ...]  # of requests: a tenant's salt; with an adapter of it; with a call on that
Tier = Literal["device", "host"]  # where an adapter's weights are ready: device memory, or host memory to copy from

# Why a command or a request failed: every code that the engine sends in Failed and Answer.
EngineCode = Literal[
    "adapter_failed",  # it could not be loaded, or was retired
    "adapter_in_use",
    "adapter_pinned",
    "alora_invocation_missing",  # of Engine.generate alone
    "context_length_exceeded",
    "duplicate_prefix",
    "duplicate_request",
    "empty_prompt",
    "engine_error",
    "grammar_failed",  # it cannot be compiled, or passed a limit while it was followed
    "invalid_invocation_start",
    "invalid_max_tokens",
    "invalid_token_id",
    "load_cancelled",
    "non_finite_logits",
    "pins_full",
    "prefix_cache_off",
    "prefix_dropped",
    "prefix_released",
    "prefixes_full",
    "queue_full",
    "superseded",  # a pin, by a later one
    "unknown_adapter",
]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the tokens of one request are chosen."""

    max_tokens: int = 16  # 0: the prompt is computed, and nothing generated
    min_tokens: int = 0
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None  # None: the engine draws one
    choice: int = 0  # which of the n choices of an HTTP request: each has its own random stream
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # alternatives to report with each token; None: no log-probabilities at all
    prompt_logprobs: int | None = None  # the same for each token of the prompt, which is then computed for it
    logprobs_from: int = 0  # the first token of the prompt that is reported; those before may come from the cache
    logit_bias: dict[int, float] = {}  # added to the logits of tokens
    allowed_token_ids: tuple[int, ...] = ()  # only these can be generated; empty: all
    bad_words: tuple[tuple[int, ...], ...] = ()  # sequences of tokens that are never completed
    grammar: str | None = None  # of llguidance: only its texts are generated, and its end ends the request


class Generate(msgspec.Struct, frozen=True, kw_only=True, tag="generate"):
    """Run one request. Answered by Tokens, the last of which has a `finish_reason`, or by Failed."""

    request_id: str
    token_ids: list[int]
    params: SamplingParams
    adapter: str | None = None  # digest; None for the base
    invocation_start: int = 0  # index of the first prompt token that the adapter applies to
    kv_is_base: bool = False  # the adapter leaves every K and V as the base's, so that they share blocks
    cache_salt: str = ""  # only requests with the same salt share K/V
    tenant: str = ""  # whose turn to run it is; empty: that of its cache_salt
    call: str = ""  # the client's request, which may have many sequences; empty: this is the only one

    @property
    def groups(self) -> tuple[Group, Group, Group]:
        """Whose turn it is when this runs: a tenant's, an adapter's of it, a call's on that."""
        tenant, adapter, call = self.tenant or self.cache_salt, self.adapter, self.call or self.request_id
        return (tenant,), (tenant, adapter), (tenant, adapter, call)


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag="abort"):
    request_id: str


class RegisterAdapter(msgspec.Struct, frozen=True, kw_only=True, tag="register_adapter"):
    """Make an adapter known.

    For a known digest: its file has been fetched again, and loads that wait for it go on.
    """

    digest: str
    path: str  # of its canonical file, which may not be there until the engine reports it missing


class FailAdapter(msgspec.Struct, frozen=True, kw_only=True, tag="fail_adapter"):
    """The file that an adapter was reported missing for cannot be fetched: loads that wait for it fail."""

    digest: str
    reason: str


class LoadAdapter(msgspec.Struct, frozen=True, kw_only=True, tag="load_adapter"):
    """Load an adapter into a tier."""

    digest: str
    tier: Tier = "device"
    request_id: str | None = None  # if there is one, an Answer follows when the load has ended


class UnloadAdapter(msgspec.Struct, frozen=True, kw_only=True, tag="unload_adapter"):
    """Free the memory of an adapter in a tier and above it; answered, and refused while it is in use or pinned."""

    request_id: str
    digest: str
    tier: Tier = "device"


class SetPins(msgspec.Struct, frozen=True, kw_only=True, tag="set_pins"):
    """Pin exactly these adapters: load each into its tier and never evict it from there; unpin all others.

    Answered by PinsSet once all of it is decided. A later SetPins replaces it.
    """

    request_id: str
    pins: dict[str, Tier]  # by digest


class RetireAdapter(msgspec.Struct, frozen=True, kw_only=True, tag="retire_adapter"):
    """Forget a digest: requests that run on it finish, then its memory is freed. Its cached blocks are freed now."""

    digest: str


class HoldPrefix(msgspec.Struct, frozen=True, kw_only=True, tag="hold_prefix"):
    """Compute the K/V of a prefix and hold its blocks until they are released. Answered by PrefixHeld or Failed.

    Fields with the names of Generate's fields mean the same.
    """

    request_id: str
    prefix_id: str
    token_ids: list[int]
    adapter: str | None = None
    invocation_start: int = 0
    kv_is_base: bool = False
    cache_salt: str = ""
    tenant: str = ""


class ReleasePrefix(msgspec.Struct, frozen=True, kw_only=True, tag="release_prefix"):
    """Release a held prefix, or stop computing it."""

    prefix_id: str


class DropNamespace(msgspec.Struct, frozen=True, kw_only=True, tag="drop_namespace"):
    """Forget the K/V of an adapter, or of the base (None), and end the prefixes held of it. Answered."""

    request_id: str
    namespace: str | None


class SetPaused(msgspec.Struct, frozen=True, kw_only=True, tag="set_paused"):
    """Compute nothing, or go on. Requests keep what they have, and new ones queue. Answered."""

    request_id: str
    paused: bool


class GetStats(msgspec.Struct, frozen=True, kw_only=True, tag="get_stats"):
    pass


class Shutdown(msgspec.Struct, frozen=True, kw_only=True, tag="shutdown"):
    pass


Command = (
    Generate
    | Abort
    | RegisterAdapter
    | FailAdapter
    | LoadAdapter
    | UnloadAdapter
    | SetPins
    | RetireAdapter
    | HoldPrefix
    | ReleasePrefix
    | DropNamespace
    | SetPaused
    | GetStats
    | Shutdown
)


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The engine has started; these are its limits."""

    max_model_len: int
    vocab_size: int
    block_size: int
    num_blocks: int
    max_running: int
    max_batch_tokens: int
    dtype: str
    adapter_bytes: int
    kernels: str  # triton, compiled or torch; of the compiled ones with their instructions
    weights: str = ""  # how the base's weights are held: a dtype, or how they are quantised
    timings: dict[str, float] = {}  # milliseconds of what was measured to choose the kernels
    device: str = "cpu"
    threads: int | None = None  # of a step on a CPU
    num_host_blocks: int = 0  # of K/V in host memory
    host_adapter_bytes: int = 0


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probabilities at one position."""

    logprob: float  # of the chosen token
    top_ids: list[int]  # the likeliest tokens, in order
    top_logprobs: list[float]
    rank: int | None = None  # of the chosen token, 1 for the likeliest; known of a prompt's tokens


class Tokens(msgspec.Struct, frozen=True, kw_only=True, tag="tokens"):
    """New tokens of one request."""

    request_id: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"] | None = None  # in the last event of a request
    stop_token: int | None = None  # the token that ended the request; it is not among token_ids
    logprobs: list[TokenLogprobs] | None = None  # one entry for each of token_ids, if they were asked for
    stop_logprobs: TokenLogprobs | None = None  # of stop_token, if they were asked for
    # One entry for each token of the prompt from `logprobs_from` or the second on, if asked for; in the first event
    prompt_logprobs: list[TokenLogprobs] | None = None
    cached_tokens: int | None = None  # prompt tokens whose K/V were reused; in the first event
    queue_seconds: float | None = None  # in the first event
    # Also in the first event: when the request's first step was scheduled, and when its prompt was computed. Times are
    # of the system's monotonic clock, which both processes read.
    started_at: float | None = None
    computed_at: float | None = None


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """A request ended without a result."""

    request_id: str
    code: EngineCode
    message: str


class AdapterState(msgspec.Struct, frozen=True, kw_only=True, tag="adapter_state"):
    """The state of an adapter has changed."""

    digest: str
    # "missing": its file is not there or does not match the digest, and a load waits for it. "failed": it cannot be
    # loaded; another request or command tries again after a while.
    state: Literal["idle", "missing", "loading", "failed", "retired"]
    tier: Tier | None = None  # the highest that holds the adapter
    pinned: Tier | None = None
    reason: str = ""  # in "missing" and "failed"
    # When each stage of a load that has just ended began and ended, on the system's monotonic clock: "read" (and
    # verify), "pack" into host memory, "copy" to the device.
    stages: dict[str, tuple[float, float]] = {}

    @property
    def seconds(self) -> dict[str, float]:
        """How long each stage took."""
        return {stage: ended - began for stage, (began, ended) in self.stages.items()}


class Answer(msgspec.Struct, frozen=True, kw_only=True, tag="answer"):
    """The answer to a command that has a request_id: done, or refused with a `code`."""

    request_id: str
    code: EngineCode | None = None
    message: str = ""


class Refusal(msgspec.Struct, frozen=True):
    """Why a part of a command was not done; `message` is for a person."""

    code: EngineCode
    message: str


class PinsSet(msgspec.Struct, frozen=True, kw_only=True, tag="pins_set"):
    """A SetPins has been decided: the adapters that could not be pinned, by digest; all others are pinned."""

    request_id: str
    refused: dict[str, Refusal] = {}


class PrefixHeld(msgspec.Struct, frozen=True, kw_only=True, tag="prefix_held"):
    """A prefix is computed and its blocks are held."""

    request_id: str
    prefix_id: str
    tokens: int
    blocks: int
    cached_tokens: int  # tokens of the prefix whose K/V were known before


class PrefixEnded(msgspec.Struct, frozen=True, kw_only=True, tag="prefix_ended"):
    """A prefix is not held any more, though it was not released: its K/V were dropped."""

    prefix_id: str
    reason: Literal["dropped", "adapter_retired"]


class KvStored(msgspec.Struct, frozen=True, kw_only=True, tag="kv_stored"):
    """Full blocks of K/V that requests can find from now on, each behind the one before it.

    A block's name is a number made of its key, which has the tenant's salt, all tokens before and the adapter in it.
    """

    blocks: list[int]  # names
    parent: int | None  # the name of the block before the first one; None: a request begins with it
    token_ids: list[int]  # of all the blocks
    namespace: str | None  # the digest of the adapter that computed some of their K/V; None: all are the base's
    host: bool = False  # in host memory, not on the device


class KvRemoved(msgspec.Struct, frozen=True, kw_only=True, tag="kv_removed"):
    """Blocks of K/V that requests can find no longer on the device, or in host memory."""

    blocks: list[int]  # names
    host: bool = False


class KvChanges(msgspec.Struct, frozen=True, kw_only=True, tag="kv_changes"):
    """What became of blocks since the last such event, in order. Sent only if the configuration asks for it."""

    changes: list[KvStored | KvRemoved]


class KvNamespace(msgspec.Struct, frozen=True, kw_only=True):
    """The known K/V of the base or of one adapter."""

    blocks_used: int
    blocks_cached: int
    blocks_host: int = 0  # in host memory
    query_tokens: int  # prompt tokens since start
    hit_tokens: int  # of them, those whose K/V were reused


class HostKvStats(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks that were offloaded to host memory; counters since start."""

    bytes_total: int = 0
    bytes_used: int = 0
    blocks: int = 0
    stores: int = 0
    loads: int = 0
    evictions: int = 0


class RankStats(msgspec.Struct, frozen=True, kw_only=True):
    """What rank 0 has sent to other ranks; counters since start."""

    summed_bytes: int = 0  # given to sums over all ranks
    command_bytes: int = 0  # of commands, counted for each rank that got them


class TierStats(msgspec.Struct, frozen=True, kw_only=True):
    """One tier of adapter memory; counters since start. `adapters` are the digests that it holds whole."""

    bytes_total: int
    bytes_used: int
    bytes_pinned: int
    adapters: list[str]
    loads: int
    evictions: int
    hits: int
    misses: int


class Stats(msgspec.Struct, frozen=True, kw_only=True, tag="stats"):
    """A snapshot of the engine's state and its counters since start."""

    running: int
    waiting: int
    blocks_total: int
    blocks_used: int
    blocks_cached: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    preemptions: int
    steps: int
    device: TierStats
    host: TierStats
    running_adapters: list[str]
    waiting_adapters: list[str]
    blocks_held: int = 0
    namespaces: dict[str, KvNamespace] = {}  # by digest, "" is the base
    host_kv: HostKvStats = HostKvStats()
    ranks: RankStats | None = None  # None: there is one


Event = Ready | Tokens | Failed | AdapterState | Answer | PinsSet | PrefixHeld | PrefixEnded | KvChanges | Stats

encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_events = msgspec.msgpack.Decoder(list[Event]).decode
