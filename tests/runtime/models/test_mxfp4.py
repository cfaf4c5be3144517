"""GPT-OSS as it is published, its experts in MXFP4, against transformers' own reading of the blocks."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from runtime.config import MIB, EngineConfig
from runtime.engine import Engine
from runtime.messages import SamplingParams
from runtime.models.config import ModelConfig
from runtime.models.config_file import UnsupportedModel
from runtime.models.stored_tensors import InvalidCheckpoint
from tests.oracle import logits_of_output
from tests.runtime.models.families import write_checkpoint
from tests.runtime.tiny_engine import prompt

BLOCK = 32
PARAMS = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, logprobs=5)
# A projection of integers of 8 bits rounds its rows to 16 bits
TOLERANCE = {"compiled": 1e-3, "torch": 1e-4}


def write_mxfp4(directory, **changes):
    """A tiny checkpoint of any codes, of scales near those of its weights, and the model that it stands for."""
    model = write_checkpoint("gpt-oss-moe", directory, intermediate_size=96)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]}
    (directory / "config.json").write_text(json.dumps(config | changes))
    tensors = load_file(directory / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        count, inputs, outputs = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (count, outputs, inputs // BLOCK, BLOCK // 2), dtype=torch.uint8)
        scales = torch.randint(122, 126, blocks.shape[:3], dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        with torch.no_grad():
            model.get_parameter(name).copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    save_file(tensors, directory / "model.safetensors")
    return model


def engine_of(directory, **options):
    sizes = {"kv_cache_bytes": MIB, "adapter_bytes": MIB, "host_adapter_bytes": MIB, "max_model_len": 64}
    return Engine(EngineConfig(model=str(directory), device="cpu", dtype="float32", threads=1, **sizes, **options))


@pytest.mark.parametrize(("kernels", "held"), [("compiled", "int8, float32"), ("torch", "float32")])
def test_blocks_are_computed_with_as_transformers_reads_them(tmp_path, kernels, held):
    model = write_mxfp4(tmp_path)
    engine = engine_of(tmp_path, kernels=kernels)
    assert engine.ready.weights == f"{held}; the checkpoint is mxfp4"
    tokens = [token % 131 for token in prompt(41, 2)]
    [found] = engine.generate([tokens], PARAMS)
    engine.close()
    logits = logits_of_output(model, tokens, found.token_ids).log_softmax(-1)
    for row, one in zip(logits, found.logprobs, strict=True):
        assert one.top_logprobs == pytest.approx(row[one.top_ids].tolist(), abs=TOLERANCE[kernels])


def test_random_weights_of_the_same_form_compute(tmp_path):
    write_mxfp4(tmp_path)
    engine = engine_of(tmp_path, kernels="torch", load_format="dummy")
    [found] = engine.generate([[5, 6, 7]], PARAMS)
    engine.close()
    assert len(found.token_ids) == PARAMS.max_tokens


def test_blocks_in_another_dtype_and_other_gates_are_refused_by_name(tmp_path):
    write_mxfp4(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("_blocks"))
    save_file(tensors | {name: tensors[name].float()}, tmp_path / "model.safetensors")
    with pytest.raises(
        InvalidCheckpoint, match=r"gate_up_proj_blocks is F32; supported are U8|down_proj_blocks is F32"
    ):
        engine_of(tmp_path, kernels="torch")
    write_mxfp4(tmp_path, swiglu_alpha=1.5)
    with pytest.raises(UnsupportedModel, match=r"swiglu_alpha is 1\.5, which is not supported; supported: 1\.702"):
        ModelConfig.from_directory(tmp_path)
