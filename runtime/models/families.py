"""The model families that are supported, as data: what a family's name says of a model beside its `config.json`."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

Bias = Literal["none", "always", "field"]  # "field": as `attention_bias` or `mlp_bias` of config.json says
QkNorm = Literal["none", "heads", "projections"]  # of each head by itself, or of all heads of q, and of k, together
NormKind = Literal["attention", "mlp", "after_attention", "after_mlp"]  # the fields of NormNames
Fused = Literal["qkv_proj", "gate_up_proj"]


class NormNames(NamedTuple):
    """A layer's RMSNorms as a checkpoint names them; None where the family has none."""

    attention: str | None = "input_layernorm"
    mlp: str | None = "post_attention_layernorm"
    after_attention: str | None = None  # of the output, before it is added to the residual stream
    after_mlp: str | None = None


class StackedNames(NamedTuple):
    """The tensors that hold all experts of a layer, (experts, out, in), where those are no modules."""

    gate_up: str  # the gate's outputs and then up's
    down: str
    alternating: bool = False  # (experts, in, out), and in gate_up the outputs of both take turns


class SharedNames(NamedTuple):
    """The modules of an MLP that every row goes through beside the experts that it chooses."""

    gate_up: tuple[str, ...]  # the gate and up, or one module that is both
    down: str
    gate: str | None = None  # whose sigmoid its outputs are multiplied by; None: they are added as they are


class ExpertNames(NamedTuple):
    """How a checkpoint names a layer's experts: `mlp.gate` is the router, and `mlp.experts.0.gate_proj` a gate."""

    block: str = "mlp"
    router: str = "gate"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    stacked: StackedNames | None = None  # None: each projection is a module
    shared: SharedNames | None = None
    router_bias: bool = False
    linear_router: bool = True  # whether transformers has, or once had, a linear module as the router
    clamped: bool = False  # gates and ups are clamped to `swiglu_limit`, and the gate's activation is GPT-OSS's
    holder: str = "mlp.experts"  # the module of transformers that has gate_up_proj and down_proj of all experts
    parameter_router: str = "mlp.gate"  # and the one that has the router's weight

    @property
    def blocks(self) -> tuple[str, ...]:
        """The beginnings of the names of all these modules."""
        shared = () if self.shared is None else (self.shared.down.partition(".")[0],)
        return tuple(f"{block}." for block in (self.block, *shared))


class Family(NamedTuple):
    """What all models of one family have in common."""

    defaults: Mapping[str, Any] = {}  # of fields that config.json may lack, as transformers has them
    needs: tuple[str, ...] = ("num_key_value_heads",)  # fields that may be null in other families
    qkv_bias: Bias = "none"
    o_bias: Bias = "none"
    mlp_bias: Bias = "none"
    qk_norm: QkNorm = "none"
    norms: NormNames = NormNames()
    fused: frozenset[Fused] = frozenset()  # projections that are one module of the checkpoint
    interleaved: bool = False  # rotation turns neighbouring dimensions, and not those half a head apart
    multipliers: bool = False  # whether the four multipliers of config.json are Granite's
    nope: bool = False  # whether layers without rotation are named by `no_rope_layers`
    windows: Literal["none", "all", "layers"] = "none"  # which layers slide if there is a sliding_window
    gemma: bool = False  # norms of (1 + weight), scaled embeddings, GELU, and scores by query_pre_attn_scalar
    sinks: bool = False  # whether each head's attention has a score of its own that no token has
    local_rope: bool = False  # whether sliding layers turn by a rope of their own
    experts: ExpertNames | None = None  # of the routed experts that MLPs are, as `num_experts` and its neighbours say
    vision: bool = False  # whether the model has a part that sees images too, which is left out

    @property
    def has_mxfp4(self) -> bool:
        """Whether checkpoints may hold experts in MXFP4."""
        return self.experts is not None and self.experts.clamped

    @property
    def activation(self) -> str:
        """The gate's, as `hidden_act` names it."""
        return "gelu_pytorch_tanh" if self.gemma else "silu"


GEMMA: Mapping[str, Any] = {
    "tie_word_embeddings": True,
    "hidden_act": "gelu_pytorch_tanh",
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
GEMMA_NORMS = NormNames(
    "input_layernorm", "pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"
)

GPT_OSS: Mapping[str, Any] = {
    "num_key_value_heads": 8,
    "head_dim": 64,
    "attention_bias": True,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "sliding_window": 128,
    "sliding_window_pattern": 2,
    "rope_theta": 150000.0,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "num_experts": 128,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
}
GRANITE_EXPERTS = ExpertNames(
    "block_sparse_moe",
    "router.layer",
    stacked=StackedNames("input_linear.weight", "output_linear.weight"),
    holder="block_sparse_moe.experts",
    parameter_router="block_sparse_moe.router",
)
GRANITE_MOE = Family(
    defaults={"norm_topk_prob": True, "num_experts": 8, "num_experts_per_tok": 2},
    needs=(),
    qkv_bias="field",
    o_bias="field",
    multipliers=True,
    experts=GRANITE_EXPERTS,
)

_TEXT: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(needs=(), qkv_bias="field", o_bias="field", mlp_bias="field"),
    "MistralForCausalLM": Family(defaults={"sliding_window": 4096}, windows="all"),
    "Qwen2ForCausalLM": Family(qkv_bias="always", windows="layers"),
    "Qwen3ForCausalLM": Family(
        needs=("num_key_value_heads", "head_dim"),
        qkv_bias="field",
        o_bias="field",
        qk_norm="heads",
        windows="layers",
    ),
    "Qwen3MoeForCausalLM": Family(
        defaults={"decoder_sparse_step": 1, "norm_topk_prob": False},
        needs=("num_key_value_heads", "num_experts", "num_experts_per_tok", "moe_intermediate_size"),
        qkv_bias="field",
        o_bias="field",
        qk_norm="heads",
        experts=ExpertNames(),
    ),
    "MixtralForCausalLM": Family(
        defaults={"norm_topk_prob": True, "num_experts": 8, "num_experts_per_tok": 2},
        experts=ExpertNames("block_sparse_moe", "gate", "w1", "w3", "w2"),
        windows="all",
    ),
    "Qwen2MoeForCausalLM": Family(
        defaults={"decoder_sparse_step": 1, "norm_topk_prob": False, "attention_bias": True},
        needs=(
            "num_key_value_heads",
            "num_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
        ),
        qkv_bias="field",
        experts=ExpertNames(
            shared=SharedNames(
                ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
                "mlp.shared_expert.down_proj",
                "mlp.shared_expert_gate",
            )
        ),
    ),
    "GraniteForCausalLM": Family(needs=(), qkv_bias="field", o_bias="field", mlp_bias="field", multipliers=True),
    "GraniteMoeForCausalLM": GRANITE_MOE,
    "GraniteMoeSharedForCausalLM": GRANITE_MOE._replace(
        experts=GRANITE_EXPERTS._replace(
            shared=SharedNames(("shared_mlp.input_linear",), "shared_mlp.output_linear"),
        )
    ),
    "GptOssForCausalLM": Family(
        defaults=GPT_OSS,
        qkv_bias="field",
        o_bias="field",
        windows="layers",
        sinks=True,
        experts=ExpertNames(
            router="router",
            stacked=StackedNames("experts.gate_up_proj", "experts.down_proj", alternating=True),
            router_bias=True,
            linear_router=False,
            clamped=True,
            parameter_router="mlp.router",
        ),
    ),
    "Phi3ForCausalLM": Family(
        defaults={"original_max_position_embeddings": 4096},
        needs=(),
        fused=frozenset({"qkv_proj", "gate_up_proj"}),
        windows="all",
    ),
    "SmolLM3ForCausalLM": Family(
        defaults={"tie_word_embeddings": True, "rope_theta": 2000000.0, "no_rope_layer_interval": 4},
        qkv_bias="field",
        o_bias="field",
        mlp_bias="field",
        nope=True,
        windows="layers",
    ),
    "Olmo2ForCausalLM": Family(
        needs=(),
        qkv_bias="field",
        o_bias="field",
        qk_norm="projections",
        norms=NormNames(None, None, "post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    "Glm4ForCausalLM": Family(
        defaults={"attention_bias": True, "partial_rotary_factor": 0.5, "head_dim": 128},
        qkv_bias="field",
        norms=NormNames(
            "input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm"
        ),
        fused=frozenset({"gate_up_proj"}),
        interleaved=True,
    ),
    "Gemma2ForCausalLM": Family(
        defaults={
            **GEMMA,
            "max_position_embeddings": 8192,
            "sliding_window_pattern": 2,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        },
        qkv_bias="field",
        o_bias="field",
        norms=GEMMA_NORMS,
        windows="layers",
        gemma=True,
    ),
    "Gemma3ForCausalLM": Family(
        defaults={
            **GEMMA,
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
            "sliding_window_pattern": 6,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
        },
        qkv_bias="field",
        o_bias="field",
        qk_norm="heads",
        norms=GEMMA_NORMS,
        windows="layers",
        gemma=True,
        local_rope=True,
    ),
}

# The text part of models that see images; of text alone, their positions of three kinds are all the same
_VISION = {
    "Gemma3ForConditionalGeneration": "Gemma3ForCausalLM",
    "Mistral3ForConditionalGeneration": "MistralForCausalLM",
    "Qwen2_5_VLForConditionalGeneration": "Qwen2ForCausalLM",
}

FAMILIES: Mapping[str, Family] = {
    **_TEXT,
    **{name: _TEXT[text]._replace(vision=True) for name, text in _VISION.items()},
}
