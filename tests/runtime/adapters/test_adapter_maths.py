"""What PEFT saves, applied exactly as PEFT applies it."""

import peft
import pytest
import torch
import transformers

from runtime.adapter_format.base_tensors import StoredTensor
from runtime.adapter_format.canonical import canonicalise
from runtime.adapters.pool import AdapterPool
from tests.runtime.adapter_format.adapter_files import MODEL

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]

ACCEPTED = {
    "attention only": {"target_modules": ATTENTION},
    "mlp only": {"target_modules": MLP},
    "all linear": {"target_modules": "all-linear"},
    "a regular expression": {"target_modules": r".*\.self_attn\.(q|v)_proj"},
    "a lookahead": {"target_modules": r"^(?!.*\.0\.).*\.(?:q|v|up)_proj$"},
    "classes and lazy repeats": {"target_modules": r".*?\.[0-9]{1,3}\.[^.]+\.(?:[qkv]|down)_proj"},
    "partial groups": {"target_modules": ["v_proj", "up_proj"]},
    "rslora": {"target_modules": ATTENTION, "use_rslora": True, "r": 6},
    "patterns": {
        "target_modules": ATTENTION + MLP,
        "rank_pattern": {"q_proj": 2, r"^model\.layers\.1\.mlp.up_proj": 3, "layers.0.mlp.down_proj": 7, "up_proj": 5},
        "alpha_pattern": {"v_proj": 3, "layers.1.self_attn.q_proj": 32, r"model.layers.\d.mlp.gate_proj": 1},
    },
    "groups in patterns": {
        "target_modules": ATTENTION + MLP,
        "rank_pattern": {r"(?!gate)(up|down)_proj": 6, r"layers\.(?:0|[2-9])\..*(q|k)_proj": 2},  # saved in this order
        "alpha_pattern": {r"\w+?\.1\.mlp\.(up|down)_proj": 3},
    },
    "patterns and rslora": {"target_modules": MLP, "use_rslora": True, "rank_pattern": {".*down_proj": 9}},
    "lora_bias": {"target_modules": ATTENTION + MLP, "lora_bias": True},
    "lm_head": {"target_modules": ["lm_head", "q_proj"]},
    "embed_tokens": {"target_modules": ["embed_tokens", "v_proj"]},
    "some layers": {"target_modules": ATTENTION, "layers_to_transform": [1]},
    "gaussian": {"target_modules": ATTENTION, "init_lora_weights": "gaussian"},
    "eva": {"target_modules": MLP, "init_lora_weights": "eva", "rank_pattern": {"model.layers.0.mlp.up_proj": 6}},
    "orthogonal": {"target_modules": ATTENTION, "init_lora_weights": "orthogonal"},
    "mica": {"target_modules": ATTENTION, "init_lora_weights": "mica"},
    "alora": {"target_modules": ATTENTION, "alora_invocation_tokens": [5, 6]},
    "converted from loftq": {"target_modules": ATTENTION, "init_lora_weights": False},
}


def base_model(tie=False):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=MODEL.vocab_size,
        hidden_size=MODEL.hidden_size,
        intermediate_size=MODEL.intermediate_size,
        num_hidden_layers=MODEL.num_layers,
        num_attention_heads=MODEL.num_heads,
        num_key_value_heads=MODEL.num_kv_heads,
        tie_word_embeddings=tie,
    )
    return transformers.LlamaForCausalLM(config).eval()


def randomised(model):
    """Random weights for every adapter tensor, B and biases included."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    return model


def stored(model):
    """The base's own tensors, as its checkpoint has them."""
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return lambda name: StoredTensor("F32", tuple(tensors[name].shape), tensors[name].numpy().tobytes())


def saved(tmp_path, options):
    """A PEFT model, and the directory that PEFT saved its adapter to."""
    base = base_model()
    base_tensor = stored(base_model())
    model = randomised(peft.get_peft_model(base, peft.LoraConfig(**{"r": 4, "lora_alpha": 10, **options})))
    model.save_pretrained(tmp_path / "saved")
    return model, tmp_path / "saved", base_tensor


def resident(digest, path):
    pool = AdapterPool(MODEL, 8 << 20, 8 << 20, torch.float32, "cpu")
    pool.register(digest, path)
    while not pool.acquire(digest):
        pool.wait()
        pool.poll()
        pool.check()
    pool.close()
    return pool.lookup(digest)


def delta(weights, part):
    return part.b.t() @ weights.a[:, part.ranks].t()


@pytest.mark.filterwarnings("ignore:::peft", "ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("options", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_every_module_gets_the_delta_that_peft_gives_it(tmp_path, options):
    model, directory, base_tensor = saved(tmp_path, options)
    summary = canonicalise(
        directory / "adapter_model.safetensors",
        (directory / "adapter_config.json").read_bytes(),
        MODEL,
        tmp_path / "canonical",
        max_rank=16,
        base_tensor=base_tensor,
    )
    assert summary.warnings == []
    assert summary.kind == ("alora" if "alora_invocation_tokens" in options else "lora")
    sites = resident(summary.digest, tmp_path / "canonical")
    layers = {name: layer for name, layer in model.base_model.model.named_modules() if hasattr(layer, "lora_A")}
    adapted = {}
    for site, weights in zip(MODEL.sites(), sites, strict=False):  # those of norms follow
        column = 0
        for part in site.parts:
            columns = slice(column, column := column + part.out_features)
            for ours in () if weights is None else weights.parts:
                if ours.columns == columns:
                    adapted[part.module] = (weights, ours)
    assert adapted.keys() == layers.keys()
    for name, (weights, part) in adapted.items():
        layer = layers[name]
        expected = layer.get_delta_weight("default")
        got = delta(weights, part).t() if name.endswith("embed_tokens") else delta(weights, part)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
        bias = layer.lora_B["default"].bias if options.get("lora_bias") else None
        assert (part.bias is None) == (bias is None)
        if bias is not None:
            torch.testing.assert_close(part.bias, bias.detach() * layer.scaling["default"], rtol=0, atol=1e-6)
