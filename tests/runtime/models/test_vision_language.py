"""The text part of models that see images: their logits, and adapters that PEFT has trained on the whole model."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

from runtime.adapter_format.errors import InvalidAdapter
from runtime.config import MIB, EngineConfig
from runtime.engine import Engine
from runtime.messages import SamplingParams
from runtime.models.config import ModelConfig
from runtime.models.config_file import UnsupportedModel
from tests.oracle import logits_of_output
from tests.runtime.models.quantized_checkpoints import quantize
from tests.runtime.models.test_decoder import assert_close, expected, load
from tests.runtime.models.vision_language import MODELS, NAMES_OF_THE_MODULE, respell, write_vision_language

TOKENS = [token % 128 for token in range(3, 163, 4)]  # none is an image's
TEXT_LINEARS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
PARAMS = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True, logprobs=3)
NAMES = pytest.mark.parametrize("name", MODELS)


@NAMES
def test_the_text_part_gives_the_logits_of_the_whole_model_whatever_its_names(tmp_path: Path, name: str) -> None:
    model = write_vision_language(name, tmp_path)
    wanted = expected(model, TOKENS)
    saved = set(load_file(tmp_path / "model.safetensors"))
    assert_close(load(tmp_path).step([(0, TOKENS, 0)])[0], wanted)
    respell(tmp_path, NAMES_OF_THE_MODULE)
    assert not saved & {name for name in load_file(tmp_path / "model.safetensors") if name != "lm_head.weight"}
    assert_close(load(tmp_path).step([(0, TOKENS, 0)])[0], wanted)


@pytest.mark.parametrize("at", ["the whole", "its text"])
def test_a_quantised_text_part_gives_the_logits_of_the_dequantised_model_whatever_its_names(
    tmp_path: Path, at: str
) -> None:
    model = quantize("packed-zeros", tmp_path, write_vision_language("qwen2.5-vl", tmp_path))
    if at == "its text":
        config = json.loads((tmp_path / "config.json").read_text())
        config["text_config"]["quantization_config"] = config.pop("quantization_config")
        (tmp_path / "config.json").write_text(json.dumps(config))
    wanted = expected(model, TOKENS)
    assert_close(load(tmp_path).step([(0, TOKENS, 0)])[0], wanted)
    respell(tmp_path, NAMES_OF_THE_MODULE)
    assert_close(load(tmp_path).step([(0, TOKENS, 0)])[0], wanted)


@pytest.mark.filterwarnings("ignore:::peft")
@pytest.mark.parametrize("kernels", ["compiled", "torch"])
@NAMES
def test_an_adapter_of_the_whole_model_is_applied_as_peft_does(tmp_path: Path, name: str, kernels: str) -> None:
    """Its names and its pattern are those of the modules, which begin in another way than the text model's."""
    base = write_vision_language(name, tmp_path)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TEXT_LINEARS, rank_pattern={"language_model.*q_proj": 2})
    model = peft.get_peft_model(base, config)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    tensors = peft.get_peft_model_state_dict(model.eval(), save_embedding_layers=False)
    assert all("language_model" in tensor for tensor in tensors)
    engine = Engine(
        EngineConfig(
            model=str(tmp_path),
            device="cpu",
            dtype="float32",
            kernels=kernels,
            kv_cache_bytes=MIB,
            adapter_bytes=MIB,
            host_adapter_bytes=MIB,
            max_model_len=64,
            threads=1,
        )
    )
    digest = engine.add_adapter(tensors, model.peft_config["default"].to_dict())
    [output] = engine.generate([TOKENS], PARAMS, digest)
    engine.close()
    rows = logits_of_output(model, TOKENS, output.token_ids).log_softmax(-1)
    for row, one in zip(rows, output.logprobs or [], strict=True):
        assert one.top_logprobs == pytest.approx(row[one.top_ids].tolist(), abs=1e-4)


def test_an_adapter_of_what_sees_images_is_refused_with_what_to_do(tmp_path: Path) -> None:
    base = write_vision_language("gemma3", tmp_path)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    engine = Engine(
        EngineConfig(
            model=str(tmp_path),
            device="cpu",
            kernels="torch",
            kv_cache_bytes=MIB,
            adapter_bytes=MIB,
            host_adapter_bytes=MIB,
            max_model_len=64,
            threads=1,
        )
    )
    with pytest.raises(InvalidAdapter, match=r"vision_tower.* sees images, expected target_modules that name the text"):
        engine.add_adapter(tensors, model.peft_config["default"].to_dict())
    engine.close()


def test_a_text_part_of_another_family_is_refused(tmp_path: Path) -> None:
    write_vision_language("mistral3", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["model_type"] = "llama"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=r"text_config\.model_type is 'llama'.*mistral"):
        ModelConfig.from_directory(tmp_path)
