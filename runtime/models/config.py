"""The shape and the options of a decoder-only model, read from its `config.json`.

To add a model family:

1. `families.py`: add it to FAMILIES, with what its name says of a model.
2. `config_file.py`: add its fields to ConfigFile, and refuse values that are not supported.
3. `config.py` (and `experts.py`): map those fields to flags; add a flag only for an operation that no family here has.
   `sites`, `norm_modules` and `biased` say what an adapter may change.
4. `weights.py`: add its tensors to `tensor_shapes` and to the layer's weights, if the flags do not say it.
5. `decoder.py`, `runtime/cpu/compiled_decoder.py` and `runtime/gpu/fused_decoder.py`: do what a new flag says.

Then add a tiny model of it to `tests/runtime/models/families.py`: the decoders' tests compare it with transformers.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from runtime.models.config_file import (
    ConfigFile,
    RopeFile,
    read_config,
    read_eos_token_ids,
    refuse,
)
from runtime.models.experts import ExpertsConfig, experts_config
from runtime.models.families import Bias, Family, Fused, NormKind, NormNames, QkNorm
from runtime.models.sites import Part, Site
from runtime.quantization.scheme import Scheme

MOST_PARTS = 3  # of a site: q, k and v
SITES_PER_LAYER = 4  # qkv, o, gate_up, down
QKV, OUT, GATE_UP, DOWN = range(SITES_PER_LAYER)
ROUTER = GATE_UP  # of a layer with experts, whose DOWN has no part: the sites of experts come last


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
    short_factor: tuple[float, ...] = ()  # longrope: of each pair, for contexts up to original_max_position
    long_factor: tuple[float, ...] = ()  # longrope: of each pair, for longer ones
    long: bool = False  # longrope: which of them count
    rotary_fraction: float = 1.0  # of a head's dimensions, which turn; the others stay
    interleaved: bool = False  # neighbouring dimensions are a pair, and not those half the turned ones apart

    def rotary_dim(self, head_dim: int) -> int:
        """Return how many of a head's first dimensions turn."""
        return int(head_dim * self.rotary_fraction)


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder-only transformer, described by flags; the families of `families.py` are settings of them."""

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
    qk_norm: QkNorm = "none"
    norms: NormNames = NormNames()
    fused: tuple[Fused, ...] = ()
    unrotated: tuple[int, ...] = ()  # layers without rotation
    windows: tuple[int, ...] = ()  # by layer, the last tokens that attention sees, 0 for all; empty: all see all
    local_rope: RopeConfig | None = None  # of layers with a window, where it is another
    gelu: bool = False  # the gate's activation: GELU by tanh, and not SiLU
    norm_offset: float = 0.0  # added to the weights of norms
    attention_cap: float = 0.0  # of scores, cap · tanh(score / cap); 0: none
    logits_cap: float = 0.0
    experts: ExpertsConfig | None = None
    sinks: bool = False  # each head's attention has a score of its own, beside those of tokens
    vision: bool = False  # whether the checkpoint has a part that sees images, which is not loaded
    rounds_embedding_multiplier: bool = False  # to the dtype of the weights, before the product
    embedding_multiplier: float = 1.0
    attention_multiplier: float | None = None  # None: 1/sqrt(head_dim)
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    head_outputs: int | None = None  # of the part of the head that one rank has; None: vocab_size
    dtype: str = "bfloat16"  # of the checkpoint's weights; bfloat16 if its configuration does not say
    eos_token_ids: tuple[int, ...] = ()
    quantization: Scheme | None = None  # how the checkpoint holds its weights; None: as floats of `dtype`

    @classmethod
    def from_directory(cls, directory: Path | str) -> "ModelConfig":
        """Read `config.json`, and the end tokens from `generation_config.json` if there is one.

        Raises UnsupportedModel, naming the field, its value and the supported ones.
        """
        directory = Path(directory)
        file, family = read_config(directory)
        return cls(
            architecture=file.architecture,
            vocab_size=file.vocab_size,
            hidden_size=file.hidden_size,
            intermediate_size=file.intermediate_size,
            num_layers=file.num_hidden_layers,
            num_heads=file.num_attention_heads,
            num_kv_heads=_kv_heads(file),
            head_dim=_head_dim(file),
            max_position=file.max_position_embeddings,
            rms_norm_eps=file.rms_norm_eps,
            rope=_rope(file, file.rope, family),
            tie_embeddings=file.tie_word_embeddings,
            qkv_bias=_has(family.qkv_bias, file.attention_bias),
            o_bias=_has(family.o_bias, file.attention_bias),
            mlp_bias=_has(family.mlp_bias, file.mlp_bias),
            qk_norm=family.qk_norm,
            norms=family.norms,
            fused=tuple(sorted(family.fused)),
            unrotated=_unrotated(file, family),
            windows=_windows(file, family),
            sinks=family.sinks,
            vision=family.vision,
            experts=None if family.experts is None else experts_config(file, family.experts),
            local_rope=_rope(file, file.local_rope, family) if family.local_rope else None,
            **(_granite(file) if family.multipliers else {}),
            **(_gemma(file, family) if family.gemma else {}),
            dtype=file.stored_dtype or "bfloat16",
            eos_token_ids=read_eos_token_ids(directory, file),
            quantization=Scheme(method="mxfp4") if family.has_mxfp4 and file.is_mxfp4 else file.quantization,
        )

    @property
    def default_length(self) -> int:
        """The tokens of a context where no limit is asked for: longrope computes others for longer ones."""
        return self.rope.original_max_position if self.rope.type == "longrope" else self.max_position

    def up_to(self, length: int) -> "ModelConfig":
        """Return the model for contexts of up to `length` tokens.

        With longrope all of them turn by the long factors if `length` is over the original one: K and V that contexts
        of different lengths share cannot follow the length of each.
        """
        if self.rope.type != "longrope":
            return self
        rope = msgspec.structs.replace(self.rope, long=length > self.rope.original_max_position)
        return msgspec.structs.replace(self, rope=rope)

    def window(self, layer: int) -> int:
        """Return how many of the last tokens a layer's attention sees; 0: all of the context."""
        return self.windows[layer] if self.windows else 0

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The distinct rotations of the model's layers."""
        return (self.rope,) if self.local_rope is None else (self.rope, self.local_rope)

    def rope_of(self, layer: int) -> int:
        """Return the index into `ropes` of a layer's rotation."""
        return int(self.local_rope is not None and self.window(layer) > 0)

    def turned(self, layer: int) -> int:
        """Return how many of a head's first dimensions a layer turns."""
        return 0 if layer in self.unrotated else self.rope.rotary_dim(self.head_dim)

    @property
    def attention_scale(self) -> float:
        """What attention multiplies the products of queries and keys by."""
        return self.head_dim**-0.5 if self.attention_multiplier is None else self.attention_multiplier

    def embedding_scale(self, rounded: Callable[[float], float]) -> float:
        """Return what embeddings are multiplied by; `rounded` rounds to the dtype of the weights."""
        return rounded(self.embedding_multiplier) if self.rounds_embedding_multiplier else self.embedding_multiplier

    @property
    def embed_site(self) -> int:
        return SITES_PER_LAYER * self.num_layers

    @property
    def head_width(self) -> int:
        """Return how many logits the head computes here."""
        return self.vocab_size if self.head_outputs is None else self.head_outputs

    @property
    def lm_head_site(self) -> int:
        return SITES_PER_LAYER * self.num_layers + 1

    def has_experts(self, layer: int) -> bool:
        """Return whether a layer's MLP is routed experts."""
        return self.experts is not None and layer in self.experts.layers

    def expert_site(self, layer: int, expert: int) -> int:
        """Return the first of the sites of an expert: gate_up, and then down."""
        assert self.experts is not None
        return self._experts_site + self.experts.site(layer, expert)

    def shared_site(self, layer: int) -> int:
        """Return the first of the sites of a layer's shared expert: gate_up, down, and then the gate of it."""
        assert self.experts is not None
        return self._experts_site + self.experts.shared_site(layer)

    @property
    def gate_up_is_fused(self) -> bool:
        """Whether gate and up are one module, whose output is the gate and then up."""
        return "gate_up_proj" in self.fused

    def fused_width(self, site: int) -> int | None:
        """Return the width of the gate, and of up, at a site where one module is both; None at the others."""
        if site >= self._experts_site:
            return None if self.experts is None else self.experts.fused_width(site - self._experts_site)
        fused = self.gate_up_is_fused and site < self.embed_site and site % SITES_PER_LAYER == GATE_UP
        return self.intermediate_size if fused else None

    def norm_modules(self) -> list[str]:
        """Return every norm of the hidden state: those of each layer, then the last.

        An adapter may have its own weights of them. Norms of queries and keys are none of these.
        """
        layers = (f"model.layers.{layer}" for layer in range(self.num_layers))
        return [*(f"{layer}.{name}" for layer in layers for name in self.norms if name is not None), "model.norm"]

    def norm_site(self, layer: int, kind: NormKind) -> int:
        """Return the site of a layer's norm; those of norms follow the ones of `sites`."""
        kinds = [kind for kind, name in zip(NormNames._fields, self.norms, strict=True) if name is not None]
        return self._first_norm_site + layer * len(kinds) + kinds.index(kind)

    @property
    def last_norm_site(self) -> int:
        return self._first_norm_site + self.num_layers * sum(name is not None for name in self.norms)

    @property
    def _experts_site(self) -> int:
        return self.lm_head_site + 1

    @property
    def _first_norm_site(self) -> int:
        return self._experts_site + (0 if self.experts is None else self.experts.site_count)

    def biased(self) -> set[str]:
        """Return the projections to which the base adds a bias."""
        flags = self.qkv_bias, self.o_bias, self.mlp_bias, self.mlp_bias
        in_layers = self.sites()[: self.embed_site]
        return {
            part.module for index, site in enumerate(in_layers) if flags[index % SITES_PER_LAYER] for part in site.parts
        }

    def sites(self) -> list[Site]:
        """Return every site in index order.

        There are four a layer (qkv, o, gate_up, down), then embed_tokens, then lm_head, then those of experts.
        """
        hidden, inner = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        qkv = {"qkv_proj": q + 2 * kv} if "qkv_proj" in self.fused else {"q_proj": q, "k_proj": kv, "v_proj": kv}
        gate_up = {"gate_up_proj": 2 * inner} if self.gate_up_is_fused else {"gate_proj": inner, "up_proj": inner}
        sites = []
        for layer in range(self.num_layers):
            attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
            experts = self.experts
            sites += [
                Site(hidden, tuple(Part(f"{attention}.{name}", width) for name, width in qkv.items())),
                Site(q, (Part(f"{attention}.o_proj", hidden),)),
            ]
            if experts is not None and layer in experts.layers:
                sites += [Site(hidden, (experts.router(layer),)), Site(0, ())]
                continue
            sites += [
                Site(hidden, tuple(Part(f"{mlp}.{name}", width) for name, width in gate_up.items())),
                Site(inner, (Part(f"{mlp}.down_proj", hidden),)),
            ]
        sites.append(Site(self.vocab_size, (Part("model.embed_tokens", hidden),)))
        sites.append(Site(hidden, (Part("lm_head", self.head_width),)))
        return sites if self.experts is None else sites + self.experts.sites(hidden)


def _has(bias: Bias, field: bool) -> bool:
    return bias == "always" or (bias == "field" and field)


def _kv_heads(file: ConfigFile) -> int:
    kv_heads = file.num_key_value_heads or file.num_attention_heads
    if file.num_attention_heads % kv_heads:
        refuse("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads ({file.num_attention_heads})")
    return kv_heads


def _head_dim(file: ConfigFile) -> int:
    if file.head_dim is None and file.hidden_size % file.num_attention_heads:
        refuse("num_attention_heads", file.num_attention_heads, f"a divisor of hidden_size ({file.hidden_size})")
    head_dim = file.head_dim or file.hidden_size // file.num_attention_heads
    if head_dim % 2:
        refuse("head_dim", head_dim, "an even number")
    return head_dim


def _unrotated(file: ConfigFile, family: Family) -> tuple[int, ...]:
    if not family.nope:
        return ()
    layers, interval = range(file.num_hidden_layers), file.no_rope_layer_interval
    if file.no_rope_layers is None:
        return tuple(layer for layer in layers if interval and (layer + 1) % interval == 0)
    return tuple(layer for layer in layers if not file.no_rope_layers[layer])


def _windows(file: ConfigFile, family: Family) -> tuple[int, ...]:
    window = file.sliding_window
    if family.windows == "none" or not window or window >= file.max_position_embeddings:
        return ()
    sliding = [family.windows == "all" or _slides(file, family, layer) for layer in range(file.num_hidden_layers)]
    return tuple(window if slides else 0 for slides in sliding) if any(sliding) else ()


def _slides(file: ConfigFile, family: Family, layer: int) -> bool:
    if file.layer_types is not None:
        return file.layer_types[layer] == "sliding_attention"
    if file.sliding_window_pattern is not None:
        return (layer + 1) % file.sliding_window_pattern != 0
    return file.use_sliding_window and (
        layer in _unrotated(file, family) if family.nope else layer >= file.max_window_layers
    )


def _granite(file: ConfigFile) -> dict[str, Any]:
    return {
        "embedding_multiplier": file.embedding_multiplier,
        "attention_multiplier": file.attention_multiplier,
        "residual_multiplier": file.residual_multiplier,
        "logits_scaling": file.logits_scaling,
    }


def _gemma(file: ConfigFile, family: Family) -> dict[str, Any]:
    assert file.query_pre_attn_scalar is not None
    return {
        "embedding_multiplier": file.hidden_size**0.5,
        "rounds_embedding_multiplier": True,
        "attention_multiplier": file.query_pre_attn_scalar**-0.5,
        "norm_offset": 1.0,
        "gelu": True,
        # transformers caps no scores of Gemma 3, and no logits of one that sees images, whatever config.json says
        "attention_cap": 0.0 if family.local_rope else file.attn_logit_softcapping or 0.0,
        "logits_cap": 0.0 if family.vision else file.final_logit_softcapping or 0.0,
    }


def _rope(file: ConfigFile, rope: RopeFile, family: Family) -> RopeConfig:
    kind = rope.kind
    original = file.original_max_position_embeddings or rope.original_max_position_embeddings
    original = original or file.max_position_embeddings
    factor = rope.factor or file.max_position_embeddings / original
    scaling = {"yarn": _yarn_attention_factor, "longrope": _longrope_attention_factor}.get(kind)
    config = RopeConfig(
        theta=rope.rope_theta or file.rope_theta or 10000.0,
        type=kind,
        factor=factor,
        low_freq_factor=rope.low_freq_factor or 1.0,
        high_freq_factor=rope.high_freq_factor or 4.0,
        original_max_position=original,
        beta_fast=rope.beta_fast or 32.0,
        beta_slow=rope.beta_slow or 1.0,
        attention_factor=None if scaling is None else scaling(rope, factor, original),
        truncate=rope.truncate,
        short_factor=rope.short_factor,
        long_factor=rope.long_factor,
        rotary_fraction=rope.partial_rotary_factor or file.partial_rotary_factor or 1.0,
        interleaved=family.interleaved,
    )
    _check_turned(config, _head_dim(file))
    return config


def _check_turned(rope: RopeConfig, head_dim: int) -> None:
    turned = rope.rotary_dim(head_dim)
    if not 0 < turned <= head_dim or turned % 2:
        refuse("partial_rotary_factor", rope.rotary_fraction, f"an even part of the {head_dim} dimensions of a head")
    for field in ("short_factor", "long_factor") if rope.type == "longrope" else ():
        if len(getattr(rope, field)) != turned // 2:
            refuse(field, getattr(rope, field), f"{turned // 2} numbers, one for each pair of dimensions that turns")


def _longrope_attention_factor(rope: RopeFile, factor: float, original: int) -> float:
    """LongRoPE's temperature, sqrt(1 + ln(factor) / ln(original length))."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _yarn_attention_factor(rope: RopeFile, factor: float, _: int) -> float:
    """YaRN's temperature, 0.1 · ln(factor) + 1; DeepSeek's two `mscale` fields make it a ratio of such terms."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    term = 0.1 * math.log(factor) if factor > 1 else 0.0
    if rope.mscale and rope.mscale_all_dim:
        return (term * rope.mscale + 1) / (term * rope.mscale_all_dim + 1)
    return term + 1
