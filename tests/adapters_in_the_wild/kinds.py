"""Sixty-three configurations, written after the kinds that training programs leave, and how their weights are kept.

A kind says which fields its program sets; the fields that its version of PEFT writes besides are added. Kinds of
families that are not served yet stand here too: they are tried once tests/runtime/models/families.py has their family.
"""

from typing import Any, NamedTuple

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
LINEAR = [*ATTENTION, *MLP]

# What each version of PEFT began to write for plain LoRA too, with a value that means nothing
WRITTEN: dict[str, dict[str, Any]] = {
    "0.3": {"fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "modules_to_save": None},
    "0.4": {"auto_mapping": None, "revision": None, "layers_pattern": None, "layers_to_transform": None},
    "0.6": {"alpha_pattern": {}, "rank_pattern": {}},
    "0.7": {"loftq_config": {}, "megatron_config": None, "megatron_core": "megatron.core"},
    "0.8": {"use_rslora": False},
    "0.9": {"use_dora": False},
    "0.10": {"layer_replication": None},
    "0.14": {"eva_config": None, "exclude_modules": None, "lora_bias": False},
    "0.15": {"corda_config": None, "trainable_token_indices": None},
    "0.17": {"qalora_group_size": 16, "use_qalora": False, "target_parameters": None},
    "0.18": {
        "alora_invocation_tokens": None,
        "arrow_config": None,
        "ensure_weight_tying": False,
        "peft_version": "0.18.1",
    },
    "0.21": {"use_bdlora": None, "kasa_config": None, "lora_ga_config": None, "velora_config": None},
}
ORDER = list(WRITTEN)


class Kind(NamedTuple):
    """One configuration as it is found."""

    name: str
    family: str  # of tests/runtime/models/families.py, if it is there
    config: dict[str, Any]
    dtype: str = "float32"  # of the weights in the file
    copies: bool = False  # of the base's embeddings, beside the adapter
    renamed: tuple[str, str] = ("", "")  # in the names of its tensors
    plain: bool = True  # LoRA that must be taken; else it may be refused, by name


def kind(name: str, family: str, version: str, **fields: Any) -> Kind:
    how = {key: fields.pop(key) for key in ("dtype", "copies", "renamed", "plain") if key in fields}
    written: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "lora_dropout": 0.0}
    for each in ORDER[: ORDER.index(version) + 1]:
        written |= WRITTEN[each]
    return Kind(name, family, written | {"r": 8, "lora_alpha": 16, "target_modules": LINEAR} | fields, **how)


UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:k_proj|v_proj|q_proj|"
    r"out_proj|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|"
    r"feed_forward|ffn|dense)\.(?:(?:k_proj|v_proj|q_proj|out_proj|o_proj|gate_proj|up_proj|down_proj)))"
)
SWIFT = r"^(model)(?!.*(lm_head|output|emb|wte|shared)).*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)$"

KINDS = [
    # PEFT by hand, in the order of its versions
    kind("the first examples", "llama", "0.3", target_modules=["q_proj", "v_proj"]),
    kind(
        "with dropout and another alpha",
        "llama",
        "0.3",
        target_modules=["q_proj", "v_proj"],
        lora_alpha=32,
        r=4,
        lora_dropout=0.05,
    ),
    kind(
        "a mapping in place of a task",
        "llama",
        "0.4",
        task_type=None,
        auto_mapping={
            "base_model_class": "LlamaForCausalLM",
            "parent_library": "transformers.models.llama.modeling_llama",
        },
    ),
    kind("of a quantised base, in half precision", "llama", "0.4", dtype="float16", target_modules=ATTENTION),
    kind("only some layers", "llama", "0.6", target_modules=ATTENTION, layers_to_transform=[1, 2]),
    kind("one layer", "qwen2", "0.6", target_modules=MLP, layers_to_transform=2, layers_pattern="layers"),
    kind(
        "layers by a list of patterns",
        "mistral",
        "0.7",
        target_modules=["up_proj"],
        layers_to_transform=[0],
        layers_pattern=["h", "layers"],
    ),
    kind("a rank for a module", "llama", "0.7", rank_pattern={"down_proj": 3}, alpha_pattern={"down_proj": 6}),
    kind(
        "ranks by whole names",
        "mistral",
        "0.8",
        rank_pattern={"model.layers.0.mlp.up_proj": 5, "model.layers.1.self_attn.q_proj": 2},
    ),
    kind(
        "ranks by a pattern",
        "qwen3",
        "0.9",
        rank_pattern={r"^model\.layers\.(?:0|2)\..*": 4},
        alpha_pattern={r".*?\.self_attn\.[qk]_proj": 9},
    ),
    kind("rsLoRA", "llama", "0.8", use_rslora=True, r=6),
    kind("rsLoRA by pattern", "granite", "0.10", use_rslora=True, rank_pattern={"mlp": 2, "o_proj": 3}),
    kind("all linears", "mistral", "0.9", target_modules="all-linear"),
    kind("all linears, already listed", "qwen2", "0.10", target_modules=sorted(LINEAR)),
    kind("gaussian", "llama", "0.10", init_lora_weights="gaussian", target_modules=ATTENTION),
    kind("orthogonal", "qwen3", "0.17", init_lora_weights="orthogonal", target_modules=ATTENTION),
    kind(
        "EVA with its ranks",
        "llama",
        "0.14",
        init_lora_weights="eva",
        target_modules=["q_proj", "v_proj"],
        eva_config={"rho": 2.0, "tau": 0.99},
        rank_pattern={"model.layers.0.self_attn.q_proj": 12, "model.layers.2.self_attn.v_proj": 4},
    ),
    kind("without an initialisation", "llama", "0.14", init_lora_weights=False),
    kind("exclusions by name", "llama", "0.14", exclude_modules=["down_proj"], target_modules="all-linear"),
    kind("exclusions by a pattern", "qwen2", "0.15", exclude_modules=r".*\.(?:0|1)\.mlp\..*"),
    kind("biases of LoRA", "llama", "0.14", lora_bias=True, target_modules=ATTENTION),
    kind(
        "an aLoRA",
        "granite",
        "0.18",
        alora_invocation_tokens=[5, 9, 7],
        target_modules=["q_proj", "k_proj", "v_proj"],
        r=12,
    ),
    kind("the head", "llama", "0.15", target_modules=["lm_head", *ATTENTION]),
    kind("the head and its copy", "llama", "0.15", target_modules=["lm_head", "q_proj"], copies=True),
    kind("the embedding and its copy", "mistral", "0.17", target_modules=["embed_tokens", "v_proj"], copies=True),
    kind(
        "embeddings and copies of a tied base",
        "qwen2-tied",
        "0.18",
        target_modules=["embed_tokens", "o_proj"],
        copies=True,
    ),
    kind("names with the adapter's", "llama", "0.21", renamed=(".weight", ".default.weight")),
    kind("a runtime's field of tomorrow", "qwen3", "0.21", a_field_of_tomorrow={"on": True}),
    # Unsloth
    kind(
        "Unsloth, four bits",
        "llama",
        "0.10",
        base_model_name_or_path="unsloth/tiny-unsloth-bnb-4bit",
        r=16,
        revision="unsloth",
    ),
    kind(
        "Unsloth with rsLoRA",
        "mistral",
        "0.10",
        use_rslora=True,
        r=16,
        target_modules=["o_proj", "v_proj", "k_proj", "q_proj"],
    ),
    kind("Unsloth's pattern", "llama", "0.15", target_modules=UNSLOTH, dtype="bfloat16"),
    kind(
        "Unsloth's pattern for Qwen",
        "qwen2",
        "0.18",
        target_modules=UNSLOTH,
        auto_mapping={
            "base_model_class": "Qwen2ForCausalLM",
            "parent_library": "transformers.models.qwen2.modeling_qwen2",
            "unsloth_fixed": True,
        },
    ),
    # axolotl
    kind("axolotl's QLoRA", "mistral", "0.7", r=32, lora_alpha=16, lora_dropout=0.05, fan_in_fan_out=None),
    kind("axolotl with layers", "llama", "0.9", layers_to_transform=[0, 1], target_modules=LINEAR),
    kind(
        "axolotl's pattern of layers",
        "qwen2",
        "0.14",
        target_modules=r"model\.layers\.[\d]+\.(mlp|cross_attn|self_attn)\.(up|down|gate|q|k|v|o)_proj",
    ),
    kind("axolotl with trained embeddings", "llama", "0.10", modules_to_save=["embed_tokens", "lm_head"], plain=False),
    # LLaMA-Factory
    kind(
        "LLaMA-Factory",
        "qwen2",
        "0.10",
        target_modules=["k_proj", "up_proj", "o_proj", "down_proj", "q_proj", "gate_proj", "v_proj"],
    ),
    kind(
        "LLaMA-Factory's freeze of names",
        "qwen3",
        "0.15",
        target_modules=r"^(?!.*visual).*(?:k_proj|up_proj|o_proj|down_proj|q_proj|gate_proj|v_proj).*",
    ),
    kind("LLaMA-Factory with rsLoRA and alpha 256", "mistral", "0.15", use_rslora=True, r=64, lora_alpha=256),
    # ms-swift
    kind("ms-swift's pattern", "qwen2", "0.14", target_modules=SWIFT, lora_dropout=0.05),
    kind("ms-swift's pattern, half precision", "qwen3", "0.17", target_modules=SWIFT, dtype="bfloat16", r=4),
    kind(
        "ms-swift's list",
        "llama",
        "0.10",
        target_modules=["q_proj", "k_proj", "v_proj"],
        lora_dtype=None,
        lorap_lr_ratio=None,
    ),
    # trl, torchtune, mergekit, mlx converted, aLoRA of Granite
    kind("trl's SFT", "qwen3", "0.17", target_modules=["q_proj", "v_proj"], lora_alpha=32, r=16),
    kind("trl's GRPO", "qwen2", "0.15", target_modules="all-linear", r=32, lora_alpha=64),
    kind("torchtune's export", "llama", "0.3", target_modules=["q_proj", "v_proj", "o_proj"], dtype="bfloat16"),
    kind(
        "mergekit's extraction",
        "mistral",
        "0.14",
        r=16,
        lora_alpha=16,
        rank_pattern={"lm_head": 4},
        target_modules=[*LINEAR, "lm_head"],
    ),
    kind(
        "mlx, converted",
        "llama",
        "0.4",
        r=8,
        lora_alpha=160.0,
        target_modules=[f"model.layers.{layer}.self_attn.{end}" for layer in (1, 2) for end in ("q_proj", "v_proj")],
    ),
    kind("an aLoRA of one word", "qwen2", "0.18", alora_invocation_tokens=[11], target_modules=["k_proj", "q_proj"]),
    kind("one module alone", "granite", "0.17", target_modules=["down_proj"], r=1, lora_alpha=1),
    # what is more than LoRA
    kind("DoRA", "llama", "0.9", use_dora=True, plain=False),
    kind(
        "PiSSA, not converted",
        "llama",
        "0.10",
        init_lora_weights="pissa_niter_4",
        target_modules=ATTENTION,
        plain=False,
    ),
    kind("added tokens", "qwen2", "0.15", trainable_token_indices=[3, 4], target_modules=ATTENTION, plain=False),
    kind("biases of the base", "qwen2", "0.7", bias="lora_only", plain=False),
    # families
    kind("Gemma 2", "gemma2", "0.14"),
    kind("Gemma 3 by Unsloth", "gemma3", "0.15", target_modules=UNSLOTH),
    kind("Phi-3", "phi3", "0.10", target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    kind("SmolLM3", "smollm3", "0.17", target_modules=ATTENTION),
    kind("OLMo 2", "olmo2", "0.14", target_modules="all-linear"),
    kind("Mixtral's attention", "mixtral-moe", "0.7", target_modules=ATTENTION),
    # Asked for gate_proj, up_proj and down_proj, PEFT adapts the parameters that transformers 5 has all experts in
    kind(
        "Qwen3-MoE's experts",
        "qwen3-moe",
        "0.21",
        peft_version="0.21.0",
        target_modules=["q_proj"],
        target_parameters=["gate_up_proj", "down_proj"],
        rank_pattern={r".*\.gate_up_proj": 16},
        alpha_pattern={r".*\.gate_up_proj": 32},
    ),
    kind("Qwen3-MoE's attention", "qwen3-moe", "0.18", target_modules=ATTENTION),
    kind(
        "GPT-OSS's attention and the experts of a layer",
        "gpt-oss-moe",
        "0.18",
        target_modules="all-linear",
        target_parameters=["1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"],
    ),
    kind(
        "Granite-MoE's attention and experts",
        "granite-moe",
        "0.21",
        peft_version="0.21.0",
        target_modules=ATTENTION,
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    ),
]
