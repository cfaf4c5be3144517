"""Reads the fields of a checkpoint's `config.json` that this engine uses, and refuses unsupported values."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, NoReturn, TypeVar

import msgspec

from runtime.models.families import FAMILIES, Family
from runtime.quantization.scheme import Scheme, UnsupportedQuantization, read_scheme

T = TypeVar("T")
PositiveInt = Annotated[int, msgspec.Meta(gt=0)]
PositiveFloat = Annotated[float, msgspec.Meta(gt=0)]
TokenIds = int | list[int] | None

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
OLDER_ROPE_TYPES = {"su": "longrope"}
TEXT_MODELS = ("gemma3_text", "mistral", "qwen2_5_vl_text")  # of models that see images
OTHER_NAMES = {
    "num_local_experts": "num_experts",
    "shared_intermediate_size": "shared_expert_intermediate_size",
    "qkv_bias": "attention_bias",
}
LAYER_TYPES = ("full_attention", "sliding_attention")
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
    short_factor: tuple[PositiveFloat, ...] = ()
    long_factor: tuple[PositiveFloat, ...] = ()
    full_attention: "RopeFile | None" = None  # of the layers of each kind, where they differ
    sliding_attention: "RopeFile | None" = None

    @property
    def kind(self) -> str:
        kind = self.rope_type or self.type or "default"
        if self.mrope_section is not None and kind == "mrope":
            return "default"
        return OLDER_ROPE_TYPES.get(kind, kind)


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
    hidden_activation: str | None = None  # Gemma's name of it, which counts
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_theta: PositiveFloat | None = None
    rope_parameters: RopeFile | None = None
    rope_scaling: RopeFile | None = None
    partial_rotary_factor: float | None = None
    no_rope_layers: list[int] | None = None  # 0 for each layer without rotation, 1 for the others
    no_rope_layer_interval: int = 0
    sliding_window: Annotated[int, msgspec.Meta(ge=0)] | None = None  # 0: there is none
    use_sliding_window: bool = False
    max_window_layers: int = 28
    sliding_window_pattern: PositiveInt | None = None  # of so many layers one does not slide
    rope_local_base_freq: PositiveFloat | None = None
    query_pre_attn_scalar: PositiveFloat | None = None
    attn_logit_softcapping: PositiveFloat | None = None
    final_logit_softcapping: PositiveFloat | None = None
    use_bidirectional_attention: bool | None = None
    layer_types: list[str] | None = None
    num_experts: PositiveInt | None = None
    num_experts_per_tok: PositiveInt | None = None
    moe_intermediate_size: PositiveInt | None = None
    shared_expert_intermediate_size: Annotated[int, msgspec.Meta(ge=0)] | None = None  # 0: there is none
    norm_topk_prob: bool = False
    swiglu_alpha: PositiveFloat | None = None
    swiglu_limit: PositiveFloat | None = None
    decoder_sparse_step: PositiveInt = 1  # of so many layers one has experts
    mlp_only_layers: list[int] | None = None  # which have none nevertheless
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
        """Of the layers that see the whole context, where those that slide have another."""
        rope = self.rope_scaling or self.rope_parameters or RopeFile()
        return rope.full_attention or rope

    @property
    def local_rope(self) -> RopeFile:
        rope = self.rope_parameters and self.rope_parameters.sliding_attention
        return rope or RopeFile(rope_theta=self.rope_local_base_freq)

    @property
    def is_mxfp4(self) -> bool:
        """Whether experts are in blocks of 32 numbers of four bits with one scale, and all else in floats."""
        return self.quantization_config is not None and self.quantization_config.get("quant_method") == "mxfp4"

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


class _Named(msgspec.Struct, frozen=True):
    architectures: Annotated[list[str], msgspec.Meta(min_length=1, max_length=1)]


def read_config(directory: Path) -> tuple[ConfigFile, Family]:
    """Read `config.json` and check each value by itself. Raises UnsupportedModel."""
    path = directory / "config.json"
    [architecture] = _read(path, _Named).architectures
    if architecture not in FAMILIES:
        refuse("architectures", architecture, ", ".join(FAMILIES))
    family = FAMILIES[architecture]
    config = _read(path, ConfigFile, family.defaults, text_part=family.vision)
    for field in family.needs:
        if getattr(config, field) is None:
            raise UnsupportedModel(f"config.json lacks {field}, which {architecture} needs")
    _check(config, family)
    _check_rope(config.rope, family)
    if family.local_rope:
        _check_rope(config.local_rope, family)
    return config, family


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


def _check(config: ConfigFile, family: Family) -> None:
    activation = config.hidden_activation or config.hidden_act
    if activation != family.activation:
        refuse("hidden_act", activation, family.activation)
    if family.experts and config.use_sliding_window:
        refuse("use_sliding_window", True, f"false for {config.architecture}")
    if config.use_bidirectional_attention:
        refuse("use_bidirectional_attention", True, "false")
    if config.stored_dtype not in (None, *DTYPES):
        refuse("dtype", config.stored_dtype, ", ".join(DTYPES))
    kinds = set(config.layer_types or ()).difference(LAYER_TYPES)
    if kinds:
        refuse("layer_types", sorted(kinds), ", ".join(LAYER_TYPES))
    for field in ("layer_types", "no_rope_layers"):
        named = getattr(config, field)
        if named is not None and len(named) < config.num_hidden_layers:
            refuse(field, named, f"a list with an entry for each of num_hidden_layers ({config.num_hidden_layers})")


def _check_rope(rope: RopeFile, family: Family) -> None:
    kind = rope.kind
    if kind not in ROPE_TYPES:
        refuse("rope_type", kind, ", ".join(ROPE_TYPES))
    if rope.mrope_section is not None and not family.vision:
        refuse("mrope_section", rope.mrope_section, "null")
    needed = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}.get(kind, ())
    for field in needed:
        if getattr(rope, field) is None:
            raise UnsupportedModel(f"config.json: rope_type {kind} needs the field {field}")
    for field in ("short_factor", "long_factor") if kind == "longrope" else ():
        if not getattr(rope, field):
            raise UnsupportedModel(f"config.json: rope_type longrope needs the field {field}")
    if kind == "llama3" and rope.high_freq_factor == rope.low_freq_factor:
        refuse("high_freq_factor", rope.high_freq_factor, "a number other than low_freq_factor")


def _read(
    path: Path, kind: type[T], defaults: Mapping[str, Any] = MappingProxyType({}), *, text_part: bool = False
) -> T:
    """Read an object from a JSON file; `defaults` are the values of fields that it lacks.

    With `text_part`, the fields of its `text_config`, if it has one, stand for those of the object.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UnsupportedModel(f"{path} cannot be read: {error.strerror}") from error
    values: dict[str, Any] = {}
    try:
        values = msgspec.json.decode(content, type=dict[str, Any])
        if text_part:
            values = _text_part(values)
        values = dict(defaults) | {OTHER_NAMES.get(name, name): value for name, value in values.items()}
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise UnsupportedModel(f"{path.name}: {error}{_found(values, str(error))}") from error
    except msgspec.DecodeError as error:
        raise UnsupportedModel(f"{path} is not valid JSON: {error}") from error


def _text_part(values: dict[str, Any]) -> dict[str, Any]:
    """Merge the text part's fields into the whole model's, which alone says whether the head is tied."""
    text = values.get("text_config", {})
    if not isinstance(text, dict):
        refuse("text_config", text, "an object")
    if text.get("model_type", TEXT_MODELS[0]) not in TEXT_MODELS:
        refuse("text_config.model_type", text["model_type"], ", ".join(TEXT_MODELS))
    whole = {name: values[name] for name in ("architectures", "tie_word_embeddings") if name in values}
    return values | text | whole


def _found(values: Any, complaint: str) -> str:
    """Return the value at the path in a validation error, such as "at `$.rope_scaling.factor`", for its message."""
    fields = re.findall(r"\.(\w+)", complaint.partition(" - at ")[2])
    for field in fields:
        values = values[field]
    return f"; it is {values!r}" if fields and "missing required" not in complaint else ""
