"""A config.json gives the model's shape and options, and unsupported values are refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from runtime.models.config import ModelConfig
from runtime.models.config_file import UnsupportedModel
from tests.runtime.models.families import FAMILIES, write_checkpoint

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "eos_token_id": 7,
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"]}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"]}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16}
GRANITE = LLAMA | {"architectures": ["GraniteForCausalLM"]}
SMOLLM3 = LLAMA | {"architectures": ["SmolLM3ForCausalLM"]}
PHI3 = LLAMA | {"architectures": ["Phi3ForCausalLM"]}
GEMMA2 = LLAMA | {"architectures": ["Gemma2ForCausalLM"], "hidden_act": "gelu_pytorch_tanh"}
GEMMA3 = GEMMA2 | {"architectures": ["Gemma3ForCausalLM"]}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


def read(directory: Path, config: dict[str, Any], **changes: Any) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(config | changes))
    return ModelConfig.from_directory(directory)


def test_the_fields_of_a_plain_model_are_read(tmp_path: Path) -> None:
    config = read(tmp_path, LLAMA)
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (100, 64, 96)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (2, 4, 2, 16)
    assert (config.max_position, config.rms_norm_eps, config.dtype) == (512, 1e-5, "bfloat16")
    assert (config.rope.type, config.rope.theta) == ("default", 10000.0)
    assert (config.tie_embeddings, config.qkv_bias, config.o_bias, config.mlp_bias) == (False,) * 4
    assert (config.qk_norm, config.fused, config.windows) == ("none", (), ())
    assert config.attention_multiplier is None


@pytest.mark.parametrize("name", [name for name in FAMILIES if name.startswith("llama-")])
def test_both_spellings_of_rope_mean_the_same(tmp_path: Path, name: str) -> None:
    write_checkpoint(name, tmp_path)
    new = ModelConfig.from_directory(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    scaling = raw.pop("rope_parameters")
    raw["rope_theta"] = scaling.pop("rope_theta")
    scaling["type"] = scaling.pop("rope_type")
    old = read(tmp_path, raw, rope_scaling=None if scaling == {"type": "default"} else scaling)
    assert old == new


def test_yarn_takes_its_reach_from_the_model_where_it_has_no_factor(tmp_path: Path) -> None:
    rope = read(tmp_path, LLAMA, rope_scaling=YARN | {"factor": None}).rope
    assert rope.factor == 512 / 128
    assert rope.attention_factor == pytest.approx(1.138629436)


def test_the_older_dtype_field_and_a_missing_one_are_understood(tmp_path: Path) -> None:
    assert read(tmp_path, LLAMA, torch_dtype="float32").dtype == "float32"
    assert read(tmp_path, LLAMA, dtype="float32").dtype == "float32"
    assert read(tmp_path, LLAMA, torch_dtype="float16").dtype == "float16"
    assert read(tmp_path, LLAMA, torch_dtype=None).dtype == "bfloat16"


def test_key_value_heads_follow_from_the_heads_where_llama_does_not_name_them(tmp_path: Path) -> None:
    assert read(tmp_path, LLAMA, num_key_value_heads=None).num_kv_heads == 4


def test_granite_scales_attention_by_one_where_it_names_no_multiplier(tmp_path: Path) -> None:
    assert read(tmp_path, GRANITE).attention_multiplier == 1.0


def test_a_multiplier_of_granite_means_nothing_to_llama(tmp_path: Path) -> None:
    config = read(tmp_path, LLAMA, residual_multiplier=0.5, logits_scaling=8.0, attention_multiplier=0.1)
    assert (config.residual_multiplier, config.logits_scaling, config.attention_multiplier) == (1.0, 1.0, None)


@pytest.mark.parametrize(
    ("config", "changes", "windows"),
    [
        (MISTRAL, {"sliding_window": 64}, (64, 64)),
        (MISTRAL, {"sliding_window": None}, ()),
        (MISTRAL, {"sliding_window": 512}, ()),
        (MISTRAL, {"max_position_embeddings": 9000}, (4096, 4096)),
        (QWEN2, {"sliding_window": 64, "use_sliding_window": False}, ()),
        (QWEN2, {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 2}, ()),
        (QWEN2, {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1}, (0, 64)),
        (QWEN3, {"sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"]}, (0, 64)),
        (QWEN3, {"sliding_window": 64, "layer_types": ["full_attention", "full_attention"]}, ()),
        (SMOLLM3, {"sliding_window": 64, "use_sliding_window": True, "no_rope_layers": [1, 0]}, (0, 64)),
        (GEMMA2, {"sliding_window": 64}, (64, 0)),
        (GEMMA3, {"sliding_window": 64, "num_hidden_layers": 7}, (64,) * 5 + (0, 64)),
        (LLAMA, {"sliding_window": 64}, ()),
    ],
)
def test_each_layer_has_its_window(
    tmp_path: Path, config: dict[str, Any], changes: dict[str, Any], windows: tuple[int, ...]
) -> None:
    assert read(tmp_path, config, **changes).windows == windows


def test_gpt_oss_has_the_defaults_of_transformers_and_the_older_spelling_of_its_rope(tmp_path: Path) -> None:
    """As it is published, and without what transformers has defaults for."""
    published = LLAMA | {
        "architectures": ["GptOssForCausalLM"],
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "max_position_embeddings": 131072,
        "rope_theta": 150000,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    }
    config = read(tmp_path, published)
    assert config.windows == (128, 0)
    assert (config.head_dim, config.qkv_bias, config.o_bias, config.sinks) == (64, True, True, True)
    assert (config.rope.theta, config.rope.factor, config.rope.truncate) == (150000.0, 32.0, False)
    assert config.experts is not None
    assert (config.experts.count, config.experts.chosen, config.experts.limit) == (32, 4, 7.0)
    assert config.experts.mxfp4
    for field in ("rope_theta", "rope_scaling", "sliding_window", "max_position_embeddings", "rms_norm_eps"):
        del published[field]
    assert read(tmp_path, published) == config


def test_a_quantised_checkpoint_of_another_family_has_no_mxfp4(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="quant_method is 'mxfp4', which is not supported"):
        read(tmp_path, LLAMA, quantization_config={"quant_method": "mxfp4"})


def test_end_tokens_come_from_the_generation_config_and_else_from_the_config(tmp_path: Path) -> None:
    assert read(tmp_path, LLAMA).eos_token_ids == (7,)
    assert read(tmp_path, LLAMA, eos_token_id=[7, 8]).eos_token_ids == (7, 8)
    assert read(tmp_path, LLAMA, eos_token_id=None).eos_token_ids == ()
    generation = tmp_path / "generation_config.json"
    generation.write_text('{"eos_token_id": [3, 4]}')
    assert read(tmp_path, LLAMA).eos_token_ids == (3, 4)
    generation.write_text('{"eos_token_id": 0}')
    assert read(tmp_path, LLAMA).eos_token_ids == (0,)
    generation.write_text('{"temperature": 0.5}')
    assert read(tmp_path, LLAMA).eos_token_ids == (7,)


def test_end_tokens_that_are_not_in_the_vocabulary_are_left_out(tmp_path: Path) -> None:
    assert read(tmp_path, LLAMA, eos_token_id=[-1, 99, 100]).eos_token_ids == (99,)


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        (LLAMA, {"architectures": ["GemmaForCausalLM"]}, ["architectures", "GemmaForCausalLM", "LlamaForCausalLM"]),
        (LLAMA, {"architectures": []}, ["architectures", "[]"]),
        (LLAMA, {"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        (LLAMA, {"hidden_size": "64"}, ["hidden_size", "'64'", "int"]),
        (LLAMA, {"num_hidden_layers": 0}, ["num_hidden_layers", "it is 0", ">= 1"]),
        (LLAMA, {"rms_norm_eps": None}, ["rms_norm_eps", "None", "float"]),
        (LLAMA, {"num_key_value_heads": 3}, ["num_key_value_heads", "3", "divisor", "(4)"]),
        (LLAMA, {"hidden_size": 63}, ["num_attention_heads", "4", "divisor", "(63)"]),
        (LLAMA, {"head_dim": 17}, ["head_dim", "17", "even"]),
        (LLAMA, {"dtype": "float8_e4m3fn"}, ["dtype", "float8_e4m3fn", "bfloat16, float16, float32"]),
        (LLAMA, {"quantization_config": {"quant_method": "hqq"}}, ["quantization_config", "hqq", "awq, bitsandbytes"]),
        (PHI3, {"partial_rotary_factor": 1.5}, ["partial_rotary_factor", "1.5", "an even part", "16"]),
        (PHI3, {"rope_parameters": {"partial_rotary_factor": 0.2}}, ["partial_rotary_factor", "0.2"]),
        (PHI3, {"rope_scaling": LONGROPE | {"long_factor": [2.0] * 7}}, ["long_factor", "8 numbers"]),
        (PHI3, {"rope_scaling": LONGROPE | {"short_factor": None}}, ["short_factor"]),
        (GEMMA2, {"hidden_act": "silu"}, ["hidden_act", "silu", "gelu_pytorch_tanh"]),
        (GEMMA3, {"use_bidirectional_attention": True}, ["use_bidirectional_attention", "false"]),
        (SMOLLM3, {"no_rope_layers": [1]}, ["no_rope_layers", "[1]", "num_hidden_layers (2)"]),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["rope_type", "dynamic", "yarn"]),
        (LLAMA, {"rope_scaling": {"rope_type": "longrope"}}, ["longrope", "short_factor"]),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, ["linear", "factor"]),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 0.5}}, ["rope_scaling.factor", "0.5", ">= 1"]),
        (LLAMA, {"rope_scaling": {"type": "llama3", "factor": 2.0}}, ["llama3", "low_freq_factor"]),
        (
            LLAMA,
            {"rope_scaling": {"type": "llama3", "factor": 2.0, "low_freq_factor": 4, "high_freq_factor": 4}},
            ["high_freq_factor", "4.0", "low_freq_factor"],
        ),
        (QWEN2, {"rope_scaling": {"type": "default", "mrope_section": [4, 2, 2]}}, ["mrope_section", "[4, 2, 2]"]),
        (QWEN2, {"num_key_value_heads": None}, ["num_key_value_heads", "Qwen2ForCausalLM"]),
        (QWEN3, {"head_dim": None}, ["head_dim", "Qwen3ForCausalLM"]),
        (QWEN3, {"layer_types": ["chunked_attention"]}, ["layer_types", "chunked_attention", "full_attention"]),
        (GRANITE, {"logits_scaling": 0}, ["logits_scaling", "it is 0"]),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UnsupportedModel) as refusal:
        read(tmp_path, config, **changes)
    assert [word for word in words if word not in str(refusal.value)] == [], str(refusal.value)


REQUIRED = [field for field in LLAMA if field not in ("num_key_value_heads", "torch_dtype", "eos_token_id")]


@pytest.mark.parametrize("field", REQUIRED)
def test_a_missing_field_is_named(tmp_path: Path, field: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"missing required field `{field}`"):
        read(tmp_path, {name: value for name, value in LLAMA.items() if name != field})


@pytest.mark.parametrize("content", [b"", b'{"architectures": [', b"\xff\xfe", b"{]"])
def test_a_file_that_is_not_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UnsupportedModel, match=r"config\.json is not valid JSON: "):
        ModelConfig.from_directory(tmp_path)


@pytest.mark.parametrize("content", ["[]", "null", '"llama"', "3"])
def test_json_that_is_not_an_object_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UnsupportedModel, match=r"config\.json: Expected `object`"):
        ModelConfig.from_directory(tmp_path)


def test_a_directory_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"config\.json cannot be read: No such file"):
        ModelConfig.from_directory(tmp_path / "nowhere")


def test_a_broken_generation_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(UnsupportedModel, match=r"generation_config\.json: .*eos_token_id.*it is '</s>'"):
        read(tmp_path, LLAMA)


def test_the_sites_of_a_model_are_its_projections_in_order(tmp_path: Path) -> None:
    config = read(tmp_path, LLAMA)
    sites = config.sites()
    assert len(sites) == 2 * 4 + 2
    assert [part.module for part in sites[4].parts] == [f"model.layers.1.self_attn.{name}_proj" for name in "qkv"]
    assert [part.out_features for part in sites[4].parts] == [64, 32, 32]
    assert [site.parts[0].module for site in sites[5:8]] == [
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert sites[config.embed_site].parts[0].module == "model.embed_tokens"
    assert sites[config.lm_head_site].parts[0].module == "lm_head"
