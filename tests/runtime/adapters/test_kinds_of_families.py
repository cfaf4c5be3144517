"""What adapters change besides LoRA, on families with fused projections, other norms, caps or experts, against PEFT."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime.adapter_format.errors import InvalidAdapter
from runtime.config import MIB, EngineConfig
from runtime.engine import Engine
from runtime.messages import SamplingParams
from tests.oracle import logits_of_output
from tests.runtime.models.families import write_checkpoint
from tests.runtime.models.quantized_checkpoints import write_quantized
from tests.runtime.tiny_engine import prompt

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore:::peft")]

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
IDS = [40, 3, 71]
DORA = {"use_dora": True}
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
# By family: what PEFT trains, one adapter each
KINDS = {
    "phi3": {
        "dora": DORA | {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]},
        "whole gate and up": {"target_modules": ["qkv_proj"], "modules_to_save": ["gate_up_proj", "norm"]},
        "ia3": peft.IA3Config(target_modules=["qkv_proj", "gate_up_proj"], feedforward_modules="none"),
    },
    "glm4": {
        "dora, biases": DORA | {"target_modules": ["q_proj", "v_proj", "gate_up_proj"], "bias": "all"},
        "norms": {"target_modules": ["o_proj"], "modules_to_save": ["layernorm", "model.norm"]},
    },
    "olmo2": {
        "dora, norms": DORA | {"target_modules": [*ATTENTION, "up_proj"], "modules_to_save": ["layernorm"]},
        "tokens": {"target_modules": ["v_proj"], "trainable_token_indices": IDS},
    },
    "gemma2": {
        "norms": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
        "embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "tokens": {"target_modules": ["down_proj"], "trainable_token_indices": IDS},
        "ia3": peft.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    },
    "gemma3": {
        "dora, norms": DORA | {"target_modules": ATTENTION, "modules_to_save": ["layernorm", "model.norm"]},
    },
    "qwen3-moe": {
        "dora, norms": DORA | {"target_modules": ATTENTION, "modules_to_save": ["layernorm", "model.norm"]},
        "experts": {"target_modules": ["q_proj"], "target_parameters": PARAMETERS},
    },
    "mixtral-moe": {
        "modules that are parameters today": {"target_modules": ["v_proj", "w1", "w2", "w3"]},
        "down alone": {"target_modules": [], "target_parameters": ["experts.down_proj"]},
    },
    "qwen2-moe": {
        "dora of the shared expert": DORA | {"target_modules": ["up_proj", "down_proj", "shared_expert_gate"]},
        "experts and routers": {
            "target_modules": ["shared_expert.gate_proj", "shared_expert_gate", "v_proj"],
            "target_parameters": [*PARAMETERS, "mlp.gate.weight"],
            "rank_pattern": {"experts.gate_up_proj": 3, "shared_expert_gate": 1},
            "alpha_pattern": {"mlp.gate.weight": 11},
        },
        "ia3": peft.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    },
    "gpt-oss-moe": {
        "experts and routers": {"target_modules": ATTENTION, "target_parameters": [*PARAMETERS, "router.weight"]},
        "gates and ups": {"target_modules": None, "target_parameters": PARAMETERS[:1]},
        "biases": {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"},
    },
    "granite-moe": {
        "experts and routers": {"target_modules": ATTENTION, "target_parameters": [*PARAMETERS, "router.weight"]},
    },
    "granite-moe-shared": {
        "dora of the shared expert": DORA | {"target_modules": ["input_linear", "output_linear"], "bias": "all"},
        "experts": {"target_modules": ["output_linear"], "target_parameters": PARAMETERS, "use_rslora": True},
    },
}
SCORE = SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=5)
TOLERANCE = 1e-4


def adapted(base, options):
    """A base under an adapter whose trained weights are far from where they began."""
    config = options
    if not isinstance(config, peft.IA3Config):
        config = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(base, config).eval()
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def engine_of(directory, kernels, **options):
    sizes = {"kv_cache_bytes": 2 * MIB, "adapter_bytes": 4 * MIB, "host_adapter_bytes": 4 * MIB}
    limits = {"max_model_len": 64, "max_batch_tokens": 48, "max_running": 8, "threads": 1, **options}
    return Engine(EngineConfig(model=str(directory), device="cpu", kernels=kernels, dtype="float32", **sizes, **limits))


def add(engine, model):
    tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    return engine.add_adapter(tensors, model.peft_config["default"].to_dict())


def check(engine, models):
    """All adapters and the base in one batch, each as its model in PEFT."""
    digests = [None if name is None else add(engine, model) for name, model in models.items()]
    prompts = [[*(token % 131 for token in prompt(21 + seed, seed)), *IDS, 2] for seed, _ in enumerate(models)]
    found = engine.generate(prompts, SCORE, digests)
    for (name, model), tokens, completion in zip(models.items(), prompts, found, strict=True):
        judged = logits_of_output(model, tokens[:1], tokens[1:]).log_softmax(-1)
        for row, entry in zip(judged, completion.prompt_logprobs, strict=True):
            assert entry.top_logprobs == pytest.approx(row[entry.top_ids].tolist(), abs=TOLERANCE), name
            assert row.max() == pytest.approx(entry.top_logprobs[0], abs=TOLERANCE), name
    engine.check()
    engine.close()


@pytest.mark.parametrize("family", KINDS)
def test_adapters_of_a_family_are_exact_beside_each_other_and_the_base(tmp_path, family):
    models = {name: adapted(write_checkpoint(family, tmp_path), kind) for name, kind in KINDS[family].items()}
    models[None] = write_checkpoint(family, tmp_path)
    for kernels in ("compiled", "torch"):
        check(engine_of(tmp_path, kernels), models)


def test_triton_scales_a_fused_gate_and_up(tmp_path):
    models = {"dora": adapted(write_checkpoint("phi3", tmp_path), KINDS["phi3"]["dora"])}
    models[None] = write_checkpoint("phi3", tmp_path)
    check(engine_of(tmp_path, "triton"), models)


@pytest.mark.parametrize(
    ("name", "family"),
    [("gptq-order", "phi3"), ("packed-zeros", "glm4"), ("nf4-nested", "llama"), ("fp8-block", "gemma2")],
)
def test_dora_follows_the_dequantised_weights(tmp_path, name, family):
    """Its gains divide by the lengths of what is multiplied, also where the inputs of the weights are shuffled."""
    base = write_quantized(name, tmp_path, family)
    targets = ["qkv_proj", "q_proj", "gate_up_proj", "up_proj", "down_proj"]
    engine = engine_of(tmp_path, "compiled")
    model = adapted(base, DORA | {"target_modules": targets})
    tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    for module in {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in tensors}:
        a, b = (tensors[f"base_model.model.{module}.lora_{each}.weight"].detach() for each in "AB")
        weight = base.get_submodule(module).get_base_layer().weight.detach()
        exact = (weight + 1.5 * b @ a).norm(dim=1)
        lengths = torch.from_numpy(engine.runner.decoder.base.lengths(module, a.numpy(), b.numpy(), 1.5, lambda: None))
        torch.testing.assert_close(lengths, exact, atol=1e-5, rtol=1e-5)
    engine.close()


def test_a_factor_of_the_input_of_down_proj_is_refused_where_gate_and_up_are_one_module(tmp_path):
    config = peft.IA3Config(target_modules=["qkv_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = adapted(write_checkpoint("phi3", tmp_path), config)
    engine = engine_of(tmp_path, "compiled")
    with pytest.raises(InvalidAdapter, match=r"feedforward_modules: .*; train it without feedforward_modules"):
        add(engine, model)
    engine.close()


@pytest.mark.parametrize("kernels", ["compiled", "torch"])
@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral-moe"])
def test_dora_of_routers_and_experts_is_a_base_of_the_merged_weights(tmp_path, family, kernels):
    """transformers has experts in one tensor, which PEFT cannot give DoRA; older adapters have it module by module."""
    write_checkpoint(family, tmp_path)
    merged, tensors = load_file(tmp_path / "model.safetensors"), {}
    torch.manual_seed(6)
    modules = [name.removesuffix(".weight") for name in merged if "experts." in name or name.endswith(".gate.weight")]
    for module in modules:
        weight = merged[f"{module}.weight"]
        a, b = torch.randn(2, weight.shape[1]) * 0.3, torch.randn(len(weight), 2) * 0.3
        magnitude = weight.norm(dim=1) * (1 + 0.3 * torch.rand(len(weight)))
        changed = weight + 2 * b @ a
        merged[f"{module}.weight"] = changed * (magnitude / changed.norm(dim=1))[:, None]
        leaves = {"A.weight": a, "B.weight": b, "magnitude_vector": magnitude}
        tensors |= {f"base_model.model.{module}.lora_{leaf}": tensor for leaf, tensor in leaves.items()}
    twin = tmp_path / "merged"
    twin.mkdir()
    (twin / "config.json").write_text((tmp_path / "config.json").read_text())
    save_file(merged, twin / "model.safetensors")
    engine, other = engine_of(tmp_path, kernels), engine_of(twin, kernels)
    targets = sorted({module.rpartition(".")[2] for module in modules})
    digest = engine.add_adapter(tensors, DORA | {"r": 2, "lora_alpha": 4, "target_modules": targets})
    tokens = [token % 131 for token in prompt(21, 3)]
    found, base = engine.generate([tokens, tokens], SCORE, [digest, None])
    [wanted] = other.generate([tokens], SCORE)
    for one, plain, right in zip(found.prompt_logprobs, base.prompt_logprobs, wanted.prompt_logprobs, strict=True):
        assert one.top_ids == right.top_ids
        assert one.top_logprobs == pytest.approx(right.top_logprobs, abs=TOLERANCE)
        assert one.top_logprobs != pytest.approx(plain.top_logprobs, abs=1e-2)
    engine.close()
    other.close()


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral-moe"])
def test_lora_of_each_experts_modules_is_what_peft_makes_of_it(tmp_path, family):
    """Of models whose experts were modules once; PEFT puts them together for the parameters of today."""
    base, tensors = write_checkpoint(family, tmp_path), {}
    ends = [".w1", ".w2", ".w3"] if "mixtral" in family else [".gate_proj", ".up_proj", ".down_proj"]
    weights = load_file(tmp_path / "model.safetensors")
    torch.manual_seed(8)
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if ".experts." in name or module.endswith("q_proj"):
            for leaf, shape in (("A", (3, weight.shape[1])), ("B", (len(weight), 3))):
                tensors[f"base_model.model.{module}.lora_{leaf}.weight"] = torch.randn(shape) * 0.2
    targets = ["q_proj", *(end.removeprefix(".") for end in ends)]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 6, "target_modules": targets}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    model = peft.PeftModel.from_pretrained(base, adapter).eval()
    engine = engine_of(tmp_path, "compiled")
    digest, tokens = engine.add_adapter(tensors, config), [token % 131 for token in prompt(21, 3)]
    [found] = engine.generate([tokens], SCORE, [digest])
    engine.close()
    judged = logits_of_output(model, tokens[:1], tokens[1:]).log_softmax(-1)
    with model.disable_adapter():
        plain = logits_of_output(model, tokens[:1], tokens[1:]).log_softmax(-1)
    assert (judged - plain).abs().max() > 0.1
    for row, entry in zip(judged, found.prompt_logprobs, strict=True):
        assert entry.top_logprobs == pytest.approx(row[entry.top_ids].tolist(), abs=TOLERANCE)
