"""The fused decoder against the reference one: models of every family choose the same tokens by the same numbers."""

import pytest
import torch

from runtime.config import MIB, EngineConfig
from runtime.engine import Engine
from runtime.gpu.packed_linear import DeviceWeights, PackedLinear
from runtime.messages import SamplingParams
from runtime.models.config import ModelConfig
from runtime.models.weights import open_checkpoint
from tests.runtime.models.families import INTERPRETED, write_checkpoint
from tests.runtime.models.quantized_checkpoints import write_quantized
from tests.runtime.tiny_engine import prompt

TOLERANCE = 1e-4  # of the reference decoder against transformers
EXPERTS = ["qwen2-moe-sparse-step", "granite-moe-shared", "gpt-oss-moe"]


def adapter(sites):
    """Random tensors of rank 3 for every module, and their config."""
    generator = torch.Generator().manual_seed(5)
    tensors, ends = {}, set()
    for site in sites:
        for module, out in site.parts:
            end = module.rpartition(".")[2]
            a, b = ("lora_A.weight", "lora_B.weight")
            if end == "embed_tokens":
                a, b = ("lora_embedding_A", "lora_embedding_B")
            tensors[f"base_model.model.{module}.{a}"] = torch.randn(3, site.in_features, generator=generator) * 0.1
            tensors[f"base_model.model.{module}.{b}"] = torch.randn(out, 3, generator=generator) * 0.1
            ends.add(end)
    return tensors, {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "target_modules": sorted(ends), "bias": "none"}


@pytest.mark.parametrize("name", [*INTERPRETED, *EXPERTS])
def test_greedy_tokens_and_logprobs_are_the_references(tmp_path, name):
    """In chunks and decode steps, beside an adapter of all modules, beyond the original range of scaled RoPE."""
    write_checkpoint(name, tmp_path)
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True, logprobs=5)
    prompts = [[token % 131 for token in prompt(length, length)] for length in (34, 5)]
    completions = []
    for kernels, device in (("triton", "auto"), ("torch", "cpu")):
        engine = Engine(
            EngineConfig(
                model=str(tmp_path),
                kernels=kernels,
                device=device,
                kv_cache_bytes=MIB,
                adapter_bytes=MIB,
                host_adapter_bytes=MIB,
                max_model_len=64,
                max_running=2,
                max_batch_tokens=32,
                max_lora_rank=8,
                threads=1,
            )
        )
        digest = engine.add_adapter(*adapter(engine.runner.model.sites()))
        completions.append(engine.generate(prompts, params, [None, digest]))
        engine.check()
        engine.close()
    for ours, theirs in zip(*completions, strict=True):
        assert ours.token_ids == theirs.token_ids
        for one, other in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert one.top_ids == other.top_ids
            assert one.top_logprobs == pytest.approx(other.top_logprobs, abs=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "held"),
    [
        *[("awq", "int4, float32"), ("w8a8", "int8, float32"), ("gptq-order", "int4, float32")],
        *[("nf4", "nf4, float32"), ("fp8-channel", "float8, float32")],
    ],
)
def test_a_quantised_checkpoint_stays_packed_where_there_is_a_product_for_it(tmp_path, name, held):
    model = write_quantized(name, tmp_path)
    sizes = {"kv_cache_bytes": MIB, "adapter_bytes": MIB, "host_adapter_bytes": MIB, "max_model_len": 64, "threads": 1}
    engine = Engine(EngineConfig(model=str(tmp_path), kernels="triton", dtype="float32", **sizes))
    assert engine.ready.weights == f"{held}; the checkpoint is {engine.runner.model.quantization.method}"
    tokens = [token % 131 for token in prompt(5, 5)]
    (found,) = engine.generate([tokens], SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True, logprobs=5))
    engine.close()
    with torch.inference_mode():
        logits = model(torch.tensor([tokens + found.token_ids])).logits[0, len(tokens) - 1 : -1].log_softmax(-1)
    for row, one in zip(logits, found.logprobs, strict=True):
        assert one.top_logprobs == pytest.approx(row[one.top_ids].tolist(), abs=TOLERANCE)


@pytest.mark.parametrize("name", ["awq", "w8a8", "packed-zeros", "gptq-order", "nf4", "fp8-channel"])
def test_a_packed_linear_is_its_dequantised_twin(tmp_path, name):
    """Also where DoRA reads it, and with rows of a prompt."""
    write_quantized(name, tmp_path)
    config = ModelConfig.from_directory(tmp_path)
    checkpoint = open_checkpoint(config, tmp_path, torch.float32, "safetensors", pack=False, keep_quantized=True)
    layer = checkpoint.layer(0)
    for linear in (layer.qkv, layer.o, *layer.mlp):
        placed = DeviceWeights(torch.float32, torch.device("cpu"), "cpu").placed(linear)
        assert isinstance(placed, PackedLinear)
        exact = torch.cat([part.dequantized() for part in linear.quantized])
        torch.testing.assert_close(placed.plain(), exact, rtol=1e-6, atol=1e-7)
        for rows in (1, 40):
            x = torch.randn(rows, exact.shape[1], generator=torch.Generator().manual_seed(rows))
            torch.testing.assert_close(placed(x), x @ exact.t(), rtol=1e-4, atol=1e-4)
