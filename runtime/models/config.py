"""The shape and the options of a decoder-only model, read from its `config.json`.

To add a model family:

1. `config_file.py`: add its name to ARCHITECTURES, its fields to ConfigFile, and refuse values that are not supported.
2. `config.py`: map those fields to flags of ModelConfig; add a flag only for an operation that no family here has.
   `sites`, `norms` and `biased` say what an adapter may change.
3. `weights.py`: add its tensors to `tensor_shapes` and to the layer's weights, if the flags do not say it.
4. `decoder.py` for the CPU and `runtime/gpu/fused_decoder.py` for the GPU: do what a new flag says.

Then add a tiny model of it to `tests/runtime/models/families.py`: the decoders' tests compare it with transformers.
"""

import math
from pathlib import Path
from typing import NamedTuple

import msgspec

from runtime.models.config_file import (
    GRANITE,
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    ConfigFile,
    RopeFile,
    UnsupportedModel,
    read_config,
    read_eos_token_ids,
    refuse,
)

DEFAULT_WINDOW = 4096  # of transformers, for a config.json without sliding_window; null means no window


class Part(NamedTuple):
    """One projection of the checkpoint, as a part of a stacked site."""

    module: str  # its name in the checkpoint
    out_features: int


class Site(NamedTuple):
    """One fused projection, to which an adapter can add."""

    in_features: int
    parts: tuple[Part, ...]  # stacked along the output


MOST_PARTS = 3  # of a site: q, k and v
SITES_PER_LAYER = 4  # qkv, o, gate_up, down
QKV, OUT, GATE_UP, DOWN = range(SITES_PER_LAYER)


class RopeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary frequencies and their scaling, under the names of transformers."""

    theta: float
    type: str = "default"  # one of config_file.ROPE_TYPES
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # multiplies cosines and sines; None: 1
    truncate: bool = True  # yarn: round the ramp's ends to whole pairs


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder-only transformer, described by flags: Llama, Mistral, Qwen2, Qwen3 and Granite are settings of them."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_embeddings: bool
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    embedding_multiplier: float = 1.0
    attention_multiplier: float | None = None  # None: 1/sqrt(head_dim)
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    dtype: str = "bfloat16"  # of the checkpoint's weights; bfloat16 if its configuration does not say
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_directory(cls, directory: Path | str) -> "ModelConfig":
        """Read `config.json`, and the end tokens from `generation_config.json` if there is one.

        Raises UnsupportedModel, naming the field, its value and the supported ones.
        """
        directory = Path(directory)
        file = read_config(directory)
        attention_bias = file.attention_bias and file.architecture in (LLAMA, QWEN3, GRANITE)
        granite = file.architecture == GRANITE
        return cls(
            architecture=file.architecture,
            vocab_size=file.vocab_size,
            hidden_size=file.hidden_size,
            intermediate_size=file.intermediate_size,
            num_layers=file.num_hidden_layers,
            num_heads=file.num_attention_heads,
            num_kv_heads=_kv_heads(file),
            head_dim=_head_dim(file),
            max_position=_max_position(file),
            rms_norm_eps=file.rms_norm_eps,
            rope=_rope(file),
            tie_embeddings=file.tie_word_embeddings,
            qkv_bias=attention_bias or file.architecture == QWEN2,
            o_bias=attention_bias,
            mlp_bias=file.mlp_bias and file.architecture in (LLAMA, GRANITE),
            qk_norm=file.architecture == QWEN3,
            embedding_multiplier=file.embedding_multiplier if granite else 1.0,
            attention_multiplier=file.attention_multiplier if granite else None,
            residual_multiplier=file.residual_multiplier if granite else 1.0,
            logits_scaling=file.logits_scaling if granite else 1.0,
            dtype=file.stored_dtype or "bfloat16",
            eos_token_ids=read_eos_token_ids(directory, file),
        )

    @property
    def embed_site(self) -> int:
        return SITES_PER_LAYER * self.num_layers

    @property
    def lm_head_site(self) -> int:
        return SITES_PER_LAYER * self.num_layers + 1

    def norms(self) -> list[str]:
        """Return every norm of the hidden state: two a layer, then the last. An adapter may have its own weights."""
        layers = (f"model.layers.{layer}" for layer in range(self.num_layers))
        each = [f"{layer}.{name}" for layer in layers for name in ("input_layernorm", "post_attention_layernorm")]
        return [*each, "model.norm"]

    def norm_site(self, index: int) -> int:
        """Return the site of a norm, by its place in `norms`: they follow those of `sites`."""
        return self.lm_head_site + 1 + index

    def biased(self) -> set[str]:
        """Return the projections to which the base adds a bias."""
        flags = self.qkv_bias, self.o_bias, self.mlp_bias, self.mlp_bias
        in_layers = self.sites()[: self.embed_site]
        return {
            part.module for index, site in enumerate(in_layers) if flags[index % SITES_PER_LAYER] for part in site.parts
        }

    def sites(self) -> list[Site]:
        """Return every site in index order: four a layer (qkv, o, gate_up, down), then embed_tokens, then lm_head."""
        hidden, inner = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        sites = []
        for layer in range(self.num_layers):
            attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
            sites += [
                Site(hidden, tuple(Part(f"{attention}.{n}_proj", w) for n, w in (("q", q), ("k", kv), ("v", kv)))),
                Site(q, (Part(f"{attention}.o_proj", hidden),)),
                Site(hidden, (Part(f"{mlp}.gate_proj", inner), Part(f"{mlp}.up_proj", inner))),
                Site(inner, (Part(f"{mlp}.down_proj", hidden),)),
            ]
        sites.append(Site(self.vocab_size, (Part("model.embed_tokens", hidden),)))
        sites.append(Site(hidden, (Part("lm_head", self.vocab_size),)))
        return sites


def _kv_heads(file: ConfigFile) -> int:
    if file.num_key_value_heads is None and file.architecture not in (LLAMA, GRANITE):
        raise UnsupportedModel(f"config.json lacks num_key_value_heads, which {file.architecture} needs")
    kv_heads = file.num_key_value_heads or file.num_attention_heads
    if file.num_attention_heads % kv_heads:
        refuse("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads ({file.num_attention_heads})")
    return kv_heads


def _head_dim(file: ConfigFile) -> int:
    if file.head_dim is None and file.architecture == QWEN3:
        raise UnsupportedModel(f"config.json lacks head_dim, which {QWEN3} needs")
    if file.head_dim is None and file.hidden_size % file.num_attention_heads:
        refuse("num_attention_heads", file.num_attention_heads, f"a divisor of hidden_size ({file.hidden_size})")
    head_dim = file.head_dim or file.hidden_size // file.num_attention_heads
    if head_dim % 2:
        refuse("head_dim", head_dim, "an even number")
    return head_dim


def _max_position(file: ConfigFile) -> int:
    """Return the model's limit, or its sliding window if that is shorter: within the window, attention is full."""
    window = DEFAULT_WINDOW if file.sliding_window is msgspec.UNSET else file.sliding_window
    slides = file.architecture == MISTRAL or (file.architecture in (QWEN2, QWEN3) and _has_sliding_layers(file))
    return min(file.max_position_embeddings, window) if slides and window else file.max_position_embeddings


def _has_sliding_layers(file: ConfigFile) -> bool:
    if file.layer_types is not None:
        return "sliding_attention" in file.layer_types
    return file.use_sliding_window and file.max_window_layers < file.num_hidden_layers


def _rope(file: ConfigFile) -> RopeConfig:
    rope = file.rope
    kind = rope.rope_type or rope.type or "default"
    original = file.original_max_position_embeddings or rope.original_max_position_embeddings
    original = original or file.max_position_embeddings
    factor = rope.factor or file.max_position_embeddings / original
    return RopeConfig(
        theta=rope.rope_theta or file.rope_theta or 10000.0,
        type=kind,
        factor=factor,
        low_freq_factor=rope.low_freq_factor or 1.0,
        high_freq_factor=rope.high_freq_factor or 4.0,
        original_max_position=original,
        beta_fast=rope.beta_fast or 32.0,
        beta_slow=rope.beta_slow or 1.0,
        attention_factor=_yarn_attention_factor(rope, factor) if kind == "yarn" else None,
        truncate=rope.truncate,
    )


def _yarn_attention_factor(rope: RopeFile, factor: float) -> float:
    """YaRN's temperature, 0.1 · ln(factor) + 1; DeepSeek's two `mscale` fields make it a ratio of such terms."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    term = 0.1 * math.log(factor) if factor > 1 else 0.0
    if rope.mscale and rope.mscale_all_dim:
        return (term * rope.mscale + 1) / (term * rope.mscale_all_dim + 1)
    return term + 1
