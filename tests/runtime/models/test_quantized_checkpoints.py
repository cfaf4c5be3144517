"""Published quantised checkpoints give the logits of their dequantised model, and others are refused by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime.models.config import ModelConfig
from runtime.models.config_file import UnsupportedModel
from runtime.models.decoder import Decoder
from runtime.models.stored_tensors import InvalidCheckpoint
from runtime.models.weights import load_weights
from tests.runtime.models.paged_driver import PagedDriver
from tests.runtime.models.quantized_checkpoints import CASES, write_quantized

FILE = "model.safetensors"
TOKENS = [5, 80, 33, 2, 9]
TOLERANCE = 1e-4


def logits_of(directory: Path) -> torch.Tensor:
    config = ModelConfig.from_directory(directory)
    decoder = Decoder(config, load_weights(config, directory, torch.float32, "safetensors"))
    return PagedDriver(config, decoder, torch.float32).step([(0, TOKENS, 0)])[0]


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_dequantised_model(tmp_path: Path, name: str) -> None:
    model = write_quantized(name, tmp_path)
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(logits_of(tmp_path), expected, rtol=0, atol=TOLERANCE)


def change(directory: Path, drop: tuple[str, ...] = (), **tensors: torch.Tensor) -> None:
    kept = {name: tensor for name, tensor in load_file(directory / FILE).items() if name not in drop}
    save_file(kept | tensors, directory / FILE)


LAYER = "model.layers.1"


def test_a_module_may_stay_unquantised_and_a_head_may_be_quantised(tmp_path: Path) -> None:
    model = write_quantized("packed", tmp_path)
    module = model.get_submodule(f"{LAYER}.mlp.up_proj")
    packed = [f"{LAYER}.mlp.up_proj{suffix}" for suffix in (".weight_packed", ".weight_scale", ".weight_shape")]
    head, exact = CASES["packed"].pack(model.lm_head.weight.detach())
    change(
        tmp_path,
        (*packed, "lm_head.weight"),
        **{f"{LAYER}.mlp.up_proj.weight": module.weight.detach()},
        **{"lm_head" + suffix: tensor.contiguous() for suffix, tensor in head.items()},
    )
    model.load_state_dict({"lm_head.weight": exact}, strict=False)
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(logits_of(tmp_path), expected, rtol=0, atol=TOLERANCE)


def test_scales_of_activations_and_of_k_and_v_and_biases_of_zeros_are_ignored(tmp_path: Path) -> None:
    write_quantized("gptq", tmp_path)
    expected = logits_of(tmp_path)
    names = ("self_attn.q_proj.input_scale", "self_attn.k_scale", "self_attn.v_proj.output_scale")
    more = {f"{LAYER}.{name}": torch.ones(1) for name in names}
    change(tmp_path, **more, **{f"{LAYER}.mlp.down_proj.bias": torch.zeros(64)})
    assert torch.equal(logits_of(tmp_path), expected)
    change(tmp_path, **{f"{LAYER}.mlp.down_proj.bias": torch.ones(64)})
    with pytest.raises(InvalidCheckpoint, match=f"holds tensors that nothing uses: {LAYER}.mlp.down_proj.bias"):
        logits_of(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("awq", "qzeros"),
        ("gptq", "scales"),
        ("packed", "weight_scale"),
        ("nf4", "weight.quant_map"),
        ("deepseek", "weight"),
        ("llm-int8", "weight"),
    ],
)
def test_a_missing_part_of_a_quantised_weight_is_named(tmp_path: Path, name: str, tensor: str) -> None:
    write_quantized(name, tmp_path)
    change(tmp_path, (f"{LAYER}.mlp.up_proj.{tensor}",))
    with pytest.raises(InvalidCheckpoint, match=f"the checkpoint lacks {LAYER}.mlp.up_proj.{tensor}$"):
        logits_of(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "value", "words"),
    [
        ("awq", "qweight", torch.zeros(64, 31, dtype=torch.int32), r"awq\): .qweight has shape \(64, 31\)"),
        ("gptq", "scales", torch.ones(3, 256), r"gptq\): .scales has shape \(3, 256\) .* not \(2, 256\)"),
        ("gptq-order", "g_idx", torch.full((64,), 2), r".g_idx has groups 2 to 2 of 2"),
        ("packed", "weight_packed", torch.zeros(256, 7, dtype=torch.int32), r".weight_packed has shape \(256, 7\)"),
        ("packed", "weight_shape", torch.tensor([256, 32]), r".weight_shape is \[256, 32\], not \[256, 64\]"),
        ("w8a16", "weight_scale", torch.ones(256, 5), r".weight_scale has shape \(256, 5\)"),
        ("deepseek", "weight_scale_inv", torch.ones(6, 1), r"scales have shape \(6, 1\) where blocks make it \(6, 2\)"),
        ("nf4", "weight.absmax", torch.ones(12), r".weight has 8192 bytes and 12 scales"),
        ("llm-int8", "weight_format", torch.tensor(2, dtype=torch.uint8), r".weight_format is 2; supported is 0"),
    ],
)
def test_parts_that_do_not_fit_are_named(
    tmp_path: Path, name: str, tensor: str, value: torch.Tensor, words: str
) -> None:
    write_quantized(name, tmp_path)
    change(tmp_path, **{f"{LAYER}.mlp.up_proj.{tensor}": value})
    with pytest.raises(InvalidCheckpoint, match=rf"{LAYER}.mlp.up_proj \(.*{words}"):
        logits_of(tmp_path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "aqlm"}, "quant_method is 'aqlm'.* awq, bitsandbytes, compressed-tensors"),
        ({"quant_method": "awq", "version": "GEMV"}, "version is 'gemv'.* supported: gemm"),
        ({"quant_method": "gptq", "bits": 3}, "bits is 3.* supported: 2, 4, 8"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'.* gptq, gptq_v2"),
        ({"quant_method": "gptq", "dynamic": {"+:.*up.*": {"bits": 8}}}, "dynamic is .*up.*"),
        ({"quant_method": "gptq", "group_size": 0}, "group_size is 0"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt is 'e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size is \[128\]"),
        ({"quant_method": "bitsandbytes"}, "load_in_4bit is None"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "format is 'nvfp4-pack-quantized'"),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparsity_config.format is 'sparse-24-bitmask'",
        ),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": 3}}}},
            "config_groups.a.weights.num_bits is 3",
        ),
    ],
)
def test_what_is_not_read_is_refused_with_what_can_be_done(
    tmp_path: Path, config: dict[str, object], words: str
) -> None:
    write_quantized("packed", tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written | {"quantization_config": config}))
    with pytest.raises(UnsupportedModel, match=rf"quantization_config: {words}.*while it is loaded \(--quantization\)"):
        ModelConfig.from_directory(tmp_path)


def test_quantised_activations_and_k_v_are_noted(tmp_path: Path) -> None:
    write_quantized("w8a8", tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    (tmp_path / "config.json").write_text(json.dumps(written))
    scheme = ModelConfig.from_directory(tmp_path).quantization
    assert scheme is not None
    activations, kv = scheme.notes
    assert activations == "config_groups.group_0.input_activations (8 bits) are not quantised: only the weights are"
    assert kv.startswith("kv_cache_scheme is not followed")
