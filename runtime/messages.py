"""What crosses between the service and the engine process: commands in, events out.

Both are msgspec Structs, sent as MessagePack over one ZeroMQ socket pair. The engine knows adapters by
digest only; a name never crosses.
"""

from typing import Literal

import msgspec

Tier = Literal["device", "host"]  # where an adapter's weights are ready: device memory, or host memory to copy from


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the tokens of one request are chosen.

    `temperature` 0 is greedy. `top_k` 0 is off. `seed` None draws one. `logprobs` is the number of
    alternatives to report with each token, None for no log-probabilities at all. `choice` separates the
    random streams of the n choices of one request: the same seed and choice always give the same stream.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    choice: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None


class Generate(msgspec.Struct, frozen=True, kw_only=True, tag="generate"):
    """Run one request. `invocation_start` is the index of the first prompt token the adapter applies to.

    `kv_is_base` says that the adapter leaves every K and V as the base's, so that its blocks are the base's.
    """

    request_id: str
    token_ids: list[int]
    params: SamplingParams
    adapter: str | None = None
    invocation_start: int = 0
    kv_is_base: bool = False
    cache_salt: str = ""


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
    """Compute a prefix's K/V, as `Generate` would, and hold its blocks for a time; answered by PrefixHeld or Failed."""

    request_id: str
    prefix_id: str
    token_ids: list[int]
    ttl_seconds: float
    adapter: str | None = None
    invocation_start: int = 0
    kv_is_base: bool = False
    cache_salt: str = ""


class ReleasePrefix(msgspec.Struct, frozen=True, kw_only=True, tag="release_prefix"):
    """Hold a prefix no longer, or stop computing it."""

    prefix_id: str


class DropNamespace(msgspec.Struct, frozen=True, kw_only=True, tag="drop_namespace"):
    """Make the K/V of an adapter, or of the base (None), unfindable and end the prefixes held of it; answered."""

    request_id: str
    namespace: str | None


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
    | GetStats
    | Shutdown
)


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The engine is up: what the service needs to know of it."""

    max_model_len: int
    vocab_size: int
    block_size: int
    num_blocks: int
    max_batch_tokens: int
    dtype: str
    adapter_bytes: int


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probabilities at one position: of the chosen token, and of the likeliest alternatives."""

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


class Tokens(msgspec.Struct, frozen=True, kw_only=True, tag="tokens"):
    """New tokens of one request; `finish_reason` is set on its last event ("stop" or "length").

    `cached_tokens` (prompt tokens whose K/V were reused) and `queue_seconds` come with the first event.
    A stop token that ended the request is not among `token_ids` and `stop_token` names it; each entry of
    `token_ids` has one entry in `logprobs` when they were asked for.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"] | None = None
    stop_token: int | None = None
    logprobs: list[TokenLogprobs] | None = None
    cached_tokens: int | None = None
    queue_seconds: float | None = None


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """A request ended without a result; `code` is the stable snake_case word for the client's error."""

    request_id: str
    code: str
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
    # Of the stages of a load that has just ended: "read" (and verify), "pack" into host memory, "copy" to the device.
    seconds: dict[str, float] = {}


class Answer(msgspec.Struct, frozen=True, kw_only=True, tag="answer"):
    """What became of a command that has a request_id: done, or refused with a `code` (a stable snake_case word)."""

    request_id: str
    code: str | None = None
    message: str = ""


class Refusal(msgspec.Struct, frozen=True):
    """Why a part of a command was not done; `code` is a stable snake_case word."""

    code: str
    message: str


class PinsSet(msgspec.Struct, frozen=True, kw_only=True, tag="pins_set"):
    """A SetPins has been decided: the adapters that could not be pinned, by digest; all others are pinned."""

    request_id: str
    refused: dict[str, Refusal] = {}


class PrefixHeld(msgspec.Struct, frozen=True, kw_only=True, tag="prefix_held"):
    """A prefix is computed, and its blocks are held; `cached_tokens` of its tokens had been computed before."""

    request_id: str
    prefix_id: str
    tokens: int
    blocks: int
    cached_tokens: int


class PrefixEnded(msgspec.Struct, frozen=True, kw_only=True, tag="prefix_ended"):
    """A prefix is held no longer, without having been released."""

    prefix_id: str
    reason: Literal["expired", "dropped", "adapter_retired"]


class KvNamespace(msgspec.Struct, frozen=True, kw_only=True):
    """The K/V of the base or of one adapter: its findable blocks, and prompt tokens looked up and found since start.

    `blocks_host` are those in host memory.
    """

    blocks_used: int
    blocks_cached: int
    blocks_host: int = 0
    query_tokens: int
    hit_tokens: int


class HostKvStats(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks that were evicted to host memory; counters since start."""

    bytes_total: int = 0
    bytes_used: int = 0
    blocks: int = 0
    stores: int = 0
    loads: int = 0
    evictions: int = 0


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


Event = Ready | Tokens | Failed | AdapterState | Answer | PinsSet | PrefixHeld | PrefixEnded | Stats

encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_events = msgspec.msgpack.Decoder(list[Event]).decode
