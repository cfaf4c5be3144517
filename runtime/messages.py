"""What crosses between the service and the engine process: commands in, events out.

Both are msgspec Structs, sent as MessagePack over one ZeroMQ socket pair. The engine knows adapters by
digest only; a name never crosses.
"""

from typing import Literal

import msgspec


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
    """Run one sequence. `activation` is the index of the first prompt token the adapter applies to."""

    request_id: str
    token_ids: list[int]
    params: SamplingParams
    adapter: str | None = None
    activation: int = 0
    cache_salt: str = ""


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag="abort"):
    request_id: str


class RegisterAdapter(msgspec.Struct, frozen=True, kw_only=True, tag="register_adapter"):
    """Make the canonical adapter file at `path` known under its digest; `load` also makes it resident."""

    digest: str
    path: str
    load: bool = False


class RetireAdapter(msgspec.Struct, frozen=True, kw_only=True, tag="retire_adapter"):
    """Forget a digest: running sequences finish on it, then its memory and its cached blocks go."""

    digest: str


class GetStats(msgspec.Struct, frozen=True, kw_only=True, tag="get_stats"):
    pass


class Shutdown(msgspec.Struct, frozen=True, kw_only=True, tag="shutdown"):
    pass


Command = Generate | Abort | RegisterAdapter | RetireAdapter | GetStats | Shutdown


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
    A stop token that ended the sequence is not among `token_ids` and `stop_token` names it; each entry of
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
    """An adapter's residency changed. `bytes` is what it occupies on the device, 0 when not resident."""

    digest: str
    state: Literal["registered", "loading", "resident", "failed", "retired"]
    bytes: int = 0
    load_seconds: float = 0.0
    reason: str = ""


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
    adapter_bytes_total: int
    adapter_bytes_used: int
    adapter_loads: int
    adapter_evictions: int
    adapter_hits: int
    adapter_misses: int
    resident_adapters: list[str]
    running_adapters: list[str]
    waiting_adapters: list[str]


Event = Ready | Tokens | Failed | AdapterState | Stats

encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_events = msgspec.msgpack.Decoder(list[Event]).decode
