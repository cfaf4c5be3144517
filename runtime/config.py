"""The configuration of an engine, and how a field declares that it can be set from outside."""

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, NamedTuple, get_origin

import msgspec
from msgspec.structs import FieldInfo

MIB = 1024 * 1024
Quantization = Literal["int8", "int4", "nf4"]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]


class Option(msgspec.Struct, frozen=True):
    """An annotation of a field that users can set. The field has the type and the default; all else is here."""

    help: str
    group: str
    name: str | None = None  # without the dashes; None: the field's, with dashes
    aliases: tuple[str, ...] = ()  # other names of the same option, without the dashes
    variables: tuple[str, ...] = ()  # environment variables that are read after the option's own
    unset: str | None = None  # the default in words, where the field's default does not say what happens
    unit: str = ""  # of a number; a field's name has those of sizes and times
    secret: bool = False  # the value is shown nowhere
    least: float | None = None
    most: float | None = None
    parse: Callable[[str], Any] | None = None  # from text, raises ValueError; None: the parser of the field's type

    def check(self, value: Any) -> None:
        """Raise ValueError for a number out of bounds; its text is a predicate, such as "must be at least 1, not 0"."""
        if not isinstance(value, int | float):
            return
        if self.least is not None and value < self.least:
            raise ValueError(f"must be at least {self.least}, not {value}")
        if self.most is not None and value > self.most:
            raise ValueError(f"must be at most {self.most}, not {value}")


def share(text: str) -> float:
    """A number from text. Raises ValueError with a sentence."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a share such as 0.9") from None


def options_of(struct: type[msgspec.Struct]) -> Iterator[tuple[FieldInfo, Option]]:
    """The fields of a Struct that are options, in their order."""
    for field in msgspec.structs.fields(struct):
        if get_origin(field.type) is Annotated:
            yield from ((field, note) for note in field.type.__metadata__ if isinstance(note, Option))


def check_bounds(config: msgspec.Struct) -> None:
    """Raise ValueError with a sentence for the first option that is out of its bounds."""
    for field, option in options_of(type(config)):
        try:
            option.check(getattr(config, field.name))
        except ValueError as error:
            raise ValueError(f"{field.name} {error}") from None


def gib(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / 2**30:.3g} GiB"


class Sizes(NamedTuple):
    """The sizes of an engine that are options, each decided: by its option, or for the device."""

    kv_cache_bytes: int
    adapter_bytes: int
    max_running: int
    max_batch_tokens: int


# A decoding request waits for the step's prefill. A prefill step of 256 tokens took 204 ms and one of 512 took
# 457 ms (SmolLM2-135M, bfloat16, 2 cores): the shorter step costs no throughput.
CPU_SIZES = Sizes(kv_cache_bytes=512 * MIB, adapter_bytes=1024 * MIB, max_running=64, max_batch_tokens=256)


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The configuration of an engine, frozen for the engine's life. Raises ValueError with a sentence for a bad value.

    Sizes are in bytes, tokens or requests, as the fields' names say.
    """

    # In an engine, always a directory with config.json and, unless load_format is "dummy", safetensors weights.
    model: Annotated[
        str,
        Option(
            "directory or Hugging Face id of the base model",
            "model",
            variables=("MODEL",),
            unset="the embedded SmolLM2",
        ),
    ]
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        Option(
            "dtype of the weights; auto: the one in the model's configuration, but float16 only with compiled kernels",
            "model",
        ),
    ] = "auto"
    quantization: Annotated[
        Quantization | None,
        Option(
            "the base's weights in int8, or its layers' in int4 or nf4; adapters stay exact (compiled)",
            "model",
            unset="none",
        ),
    ] = None
    load_format: Annotated[
        Literal["safetensors", "dummy"], Option("dummy: random weights, for measurements", "model")
    ] = "safetensors"
    max_model_len: Annotated[
        int | None,
        Option("tokens of prompt and answer together", "model", unset="the model's limit", unit="tokens", least=1),
    ] = None
    block_size: int = 16  # tokens in a block of K/V
    kv_cache_bytes: Annotated[
        int | None,
        Option(
            "device memory for K/V",
            "K/V cache",
            aliases=("kv-cache-memory-bytes",),
            unset="512M on a CPU, what is left on a GPU",
            least=1,
        ),
    ] = None
    host_kv_bytes: Annotated[
        int, Option("host memory for K/V that the device evicts; 0: none is kept", "K/V cache", least=0)
    ] = 0
    prefix_cache: Annotated[
        bool, Option("reuse the K/V of equal prefixes", "K/V cache", aliases=("enable-prefix-caching",))
    ] = True
    max_running: Annotated[
        int | None,
        Option(
            "requests computed in one step",
            "scheduling",
            aliases=("max-num-seqs",),
            unset="64 on a CPU, 16 to 256 on a GPU by its memory",
            unit="requests",
            least=1,
        ),
    ] = None
    max_waiting: Annotated[
        int, Option("requests queued before clients get status 429", "scheduling", unit="requests", least=0)
    ] = 1024
    max_batch_tokens: Annotated[
        int | None,
        Option(
            "tokens computed in one step",
            "scheduling",
            aliases=("max-num-batched-tokens",),
            unset="256 on a CPU, 2048 on a GPU",
            unit="tokens",
            least=1,
        ),
    ] = None
    adapter_bytes: Annotated[
        int | None,
        Option(
            "device memory for adapters",
            "adapters",
            unset="1G on a CPU, an eighth of what is left on a GPU",
            least=1,
        ),
    ] = None
    host_adapter_bytes: Annotated[int, Option("host memory for adapters", "adapters", least=1)] = 2048 * MIB
    max_lora_rank: Annotated[int, Option("highest rank of an adapter", "adapters", least=1)] = 256
    threads: Annotated[
        int | None, Option("threads of the engine on a CPU", "device", unset="one per core", unit="threads", least=1)
    ] = None
    device: Annotated[Literal["auto", "cpu", "cuda"], Option("auto: a CUDA device if there is one", "device")] = "auto"
    kernels: Annotated[
        Literal["auto", "compiled", "torch", "triton"],
        Option("auto: triton on a CUDA device, else compiled; without a C++ compiler torch", "device"),
    ] = "auto"
    gpu_memory_utilization: Annotated[
        float,
        Option(
            "share of a GPU's memory that the engine may take; weights and the largest step leave the rest to K/V and "
            "adapters",
            "device",
            unit="share",
            least=0.01,
            most=1,
            parse=share,
        ),
    ] = 0.9
    tensor_parallel_size: Annotated[
        int,
        Option(
            "processes that compute each layer together, one a GPU, on a CPU by kernels torch; sizes are of each",
            "device",
            unit="processes",
            least=1,
            most=64,
        ),
    ] = 1
    cuda_graphs: Annotated[bool, Option("replay steps as CUDA graphs", "device")] = True
    overlap: Annotated[bool, Option("prepare and launch a step while the previous one runs (triton)", "device")] = True
    log_level: Annotated[LogLevel, Option("lowest severity that is logged", "server")] = "info"
    log_format: Annotated[LogFormat, Option("a line of the log: words, or a JSON object", "server")] = "text"
    kv_changes: bool = False  # the engine says which blocks of K/V become known and unknown: KvChanges
    bars: bool = False  # progress is shown as bars, on a terminal that standard error ends at

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {self.block_size}")
        if self.max_batch_tokens and self.max_running and self.max_batch_tokens < self.max_running:
            raise ValueError(
                f"max_batch_tokens ({self.max_batch_tokens}) must be at least max_running ({self.max_running}): "
                "each running request decodes one token in a step"
            )
        if self.host_kv_bytes and not self.prefix_cache:
            raise ValueError("host_kv_bytes must be 0 without prefix_cache: no request could reuse K/V in host memory")

    def sizes(self, default: Sizes) -> Sizes:
        """The sizes that are set, and the rest from `default`; requests or tokens that are not set fit the other."""
        tokens = self.max_batch_tokens or max(default.max_batch_tokens, self.max_running or 1)
        return Sizes(
            kv_cache_bytes=self.kv_cache_bytes or default.kv_cache_bytes,
            adapter_bytes=self.adapter_bytes or default.adapter_bytes,
            max_running=self.max_running or min(default.max_running, tokens),
            max_batch_tokens=tokens,
        )
