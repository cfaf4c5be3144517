"""The shape and the options of a decoder-only model, read from its `config.json`."""

from typing import NamedTuple

import msgspec


class UnsupportedModel(ValueError):
    """The model's configuration asks for something this engine does not do; the message names it."""


class Part(NamedTuple):
    """One projection of the checkpoint, as a part of a stacked site: `module` is its name there."""

    module: str
    out_features: int


class Site(NamedTuple):
    """A place where an adapter can act: one fused projection, its parts stacked along the output."""

    in_features: int
    parts: tuple[Part, ...]


SITES_PER_LAYER = 4  # qkv, o, gate_up, down
QKV, O, GATE_UP, DOWN = range(SITES_PER_LAYER)


class RopeConfig(msgspec.Struct, frozen=True, kw_only=True):
    theta: float
    type: str = "default"  # default | linear | llama3 | yarn
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder-only transformer by flags: Llama, Mistral, Qwen2, Qwen3 and Granite are settings of these."""

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
    dtype: str = "bfloat16"
    eos_token_ids: tuple[int, ...] = ()

    @property
    def embed_site(self) -> int:
        return SITES_PER_LAYER * self.num_layers

    @property
    def lm_head_site(self) -> int:
        return SITES_PER_LAYER * self.num_layers + 1

    def sites(self) -> list[Site]:
        """Every site in index order: four a layer (qkv, o, gate_up, down), then embed_tokens, then lm_head."""
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
