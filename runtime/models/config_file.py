"""Reads the fields of a checkpoint's `config.json` that this engine uses, and refuses unsupported values."""

import re
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import msgspec

from runtime.quantization.scheme import Scheme, UnsupportedQuantization, read_scheme

T = TypeVar("T")
PositiveInt = Annotated[int, msgspec.Meta(gt=0)]
PositiveFloat = Annotated[float, msgspec.Meta(gt=0)]
TokenIds = int | list[int] | None

LLAMA, MISTRAL, GRANITE = "LlamaForCausalLM", "MistralForCausalLM", "GraniteForCausalLM"
QWEN2, QWEN3 = "Qwen2ForCausalLM", "Qwen3ForCausalLM"
ARCHITECTURES = (LLAMA, MISTRAL, QWEN2, QWEN3, GRANITE)
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
DTYPES = ("bfloat16", "float16", "float32")


class UnsupportedModel(ValueError):
    """The model's configuration has a value that this engine does not support; the message names the field."""


class RopeFile(msgspec.Struct, frozen=True, kw_only=True):
    """`rope_parameters`, or the older `rope_scaling`."""

    rope_type: str | None = None
    type: str | None = None  # the older name of rope_type
    rope_theta: PositiveFloat | None = None
    partial_rotary_factor: float | None = None
    mrope_section: list[int] | None = None
    factor: Annotated[float, msgspec.Meta(ge=1)] | None = None
    original_max_position_embeddings: PositiveInt | None = None
    low_freq_factor: PositiveFloat | None = None
    high_freq_factor: PositiveFloat | None = None
    attention_factor: PositiveFloat | None = None
    beta_fast: PositiveFloat | None = None
    beta_slow: PositiveFloat | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


class ConfigFile(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of `config.json`, with the names and the defaults of transformers."""

    architectures: Annotated[list[str], msgspec.Meta(min_length=1, max_length=1)]
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    max_position_embeddings: PositiveInt
    original_max_position_embeddings: PositiveInt | None = None
    rms_norm_eps: PositiveFloat
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_theta: PositiveFloat | None = None
    rope_parameters: RopeFile | None = None
    rope_scaling: RopeFile | None = None
    partial_rotary_factor: float | None = None
    sliding_window: PositiveInt | msgspec.UnsetType | None = msgspec.UNSET
    use_sliding_window: bool = False
    max_window_layers: int = 28
    layer_types: list[str] | None = None
    quantization_config: dict[str, Any] | None = None
    embedding_multiplier: float = 1.0
    attention_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: PositiveFloat = 1.0
    dtype: str | None = None
    torch_dtype: str | None = None  # the older name of dtype
    eos_token_id: TokenIds = None

    @property
    def architecture(self) -> str:
        return self.architectures[0]

    @property
    def rope(self) -> RopeFile:
        return self.rope_scaling or self.rope_parameters or RopeFile()

    @property
    def quantization(self) -> Scheme | None:
        """How the checkpoint's weights are quantised. Raises UnsupportedModel."""
        try:
            return None if self.quantization_config is None else read_scheme(self.quantization_config)
        except UnsupportedQuantization as error:
            raise UnsupportedModel(f"config.json: {error}") from None

    @property
    def stored_dtype(self) -> str | None:
        return self.dtype or self.torch_dtype


class GenerationFile(msgspec.Struct, frozen=True, kw_only=True):
    eos_token_id: TokenIds = None


def read_config(directory: Path) -> ConfigFile:
    """Read `config.json` and check each value by itself. Raises UnsupportedModel."""
    config = _read(directory / "config.json", ConfigFile)
    _check(config)
    _check_rope(config)
    return config


def read_eos_token_ids(directory: Path, config: ConfigFile) -> tuple[int, ...]:
    """Return the tokens that end a generation, from `generation_config.json` if it names any, else from `config`.

    Ids outside the vocabulary are left out: they are never generated, and have no logit to mask.
    """
    path = directory / "generation_config.json"
    ids = _read(path, GenerationFile).eos_token_id if path.exists() else None
    if ids is None:
        ids = config.eos_token_id
    each = () if ids is None else (ids,) if isinstance(ids, int) else ids
    return tuple(token_id for token_id in each if 0 <= token_id < config.vocab_size)


def refuse(field: str, value: object, supported: str) -> NoReturn:
    raise UnsupportedModel(f"config.json: {field} is {value!r}, which is not supported; supported: {supported}")


def _check(config: ConfigFile) -> None:
    if config.architecture not in ARCHITECTURES:
        refuse("architectures", config.architecture, ", ".join(ARCHITECTURES))
    if config.hidden_act != "silu":
        refuse("hidden_act", config.hidden_act, "silu")
    if config.stored_dtype not in (None, *DTYPES):
        refuse("dtype", config.stored_dtype, ", ".join(DTYPES))
    kinds = set(config.layer_types or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        refuse("layer_types", sorted(kinds), "full_attention, sliding_attention")


def _check_rope(config: ConfigFile) -> None:
    rope = config.rope
    kind = rope.rope_type or rope.type or "default"
    if kind not in ROPE_TYPES:
        refuse("rope_type", kind, ", ".join(ROPE_TYPES))
    for partial in (config.partial_rotary_factor, rope.partial_rotary_factor):
        if partial not in (None, 1.0):
            refuse("partial_rotary_factor", partial, "1.0")
    if rope.mrope_section is not None:
        refuse("mrope_section", rope.mrope_section, "null")
    needed = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}.get(kind, ())
    for field in needed:
        if getattr(rope, field) is None:
            raise UnsupportedModel(f"config.json: rope_type {kind} needs the field {field}")
    if kind == "llama3" and rope.high_freq_factor == rope.low_freq_factor:
        refuse("high_freq_factor", rope.high_freq_factor, "a number other than low_freq_factor")


def _read(path: Path, kind: type[T]) -> T:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UnsupportedModel(f"{path} cannot be read: {error.strerror}") from error
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError as error:
        raise UnsupportedModel(f"{path.name}: {error}{_found(content, str(error))}") from error
    except msgspec.DecodeError as error:
        raise UnsupportedModel(f"{path} is not valid JSON: {error}") from error


def _found(content: bytes, complaint: str) -> str:
    """Return the value at the path in a validation error, such as "at `$.rope_scaling.factor`", for its message."""
    fields = re.findall(r"\.(\w+)", complaint.partition(" - at ")[2])
    value = msgspec.json.decode(content)
    for field in fields:
        value = value[field]
    return f"; it is {value!r}" if fields and "missing required" not in complaint else ""
