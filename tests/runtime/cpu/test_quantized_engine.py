"""Engines on quantised weights: what is kept packed, and that it is computed with as its dequantised model is."""

import json
import weakref

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.cpu.compiled.panels import quantize
from kernels.cpu.compiled.program import Pool
from runtime.cpu.compiled_decoder import CompiledDecoder
from runtime.cpu.weight_panels import WeightPanels
from runtime.kv.cache import KvCache
from runtime.models.config import ModelConfig
from runtime.models.layers import Linear
from runtime.models.weights import Checkpoint, open_checkpoint
from tests.kernels.cpu.compiled.steps import exact_weight
from tests.runtime.cpu.four_bits import to_int4, to_nf4
from tests.runtime.cpu.test_compiled_decoder import PARAMS, logits_of, start
from tests.runtime.gpu.test_triton_models import adapter
from tests.runtime.models.families import write_checkpoint
from tests.runtime.models.quantized_checkpoints import write_quantized
from tests.runtime.tiny_engine import prompt

# A projection of integers rounds its rows to 16 bits, 2⁻¹⁶ of the largest of 128; tests of the kernels hold it exactly
TOLERANCE = 1e-3
PROMPTS = [[token % 131 for token in prompt(length, length)] for length in (41, 5)]

HELD = {
    "awq": "int4, float32",
    "gptq-symmetric": "int4, float32",
    "gptq-order": "int4, float32",
    "gptq-8": "int8, float32",
    "gptq-2": "int4, float32",
    "packed-zeros": "int4, float32",
    "packed-order": "int4, float32",
    "w8a8": "int8, float32",
    "llm-int8": "int8, float32",
    "nf4": "nf4, float32",
    "nf4-nested": "nf4, float32",
    "deepseek": "float32",  # in blocks that do not divide 128
    "fp8-block": "float8, float32",
    "fp8-channel": "float8, float32",
}

CASES = [
    *((name, "llama", held) for name, held in HELD.items()),
    # Gate and up in one module, and q, k and v; a module whose groups are no neighbours
    ("gptq-order", "phi3", "int4, float32"),
    ("fp8-block", "phi3", "float8, float32"),
    # Norms behind projections and of projections, with an offset; capped logits
    ("packed-zeros", "olmo2", "int4, float32"),
    ("nf4-nested", "gemma2", "nf4, float32"),
    # Experts, whose router is in floats
    ("awq", "qwen3-moe", "int4, float32"),
]


@pytest.mark.parametrize(("name", "family", "held_in"), CASES)
def test_log_probabilities_are_those_of_the_dequantised_model_with_and_without_adapters(
    tmp_path, name, family, held_in
):
    model = write_quantized(name, tmp_path, family, moe_intermediate_size=64)
    found = {}
    for kernels in ("compiled", "torch"):
        engine = start(tmp_path, kernels=kernels, dtype="float32")
        digest = engine.add_adapter(*adapter(engine.runner.model.sites()))
        found[kernels] = engine.generate([*PROMPTS, *PROMPTS], PARAMS, [None, None, digest, digest])
        held, _, method = engine.ready.weights.partition("; the checkpoint is ")
        assert held == (held_in if kernels == "compiled" else "float32")
        assert method == engine.runner.model.quantization.method
        engine.check()
        engine.close()
    for ours, theirs in zip(found["compiled"], found["torch"], strict=True):
        assert ours.token_ids == theirs.token_ids
        for one, other in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert one.top_logprobs == pytest.approx(other.top_logprobs, abs=TOLERANCE)
    for tokens, ours in zip(PROMPTS, found["compiled"], strict=False):
        logits = logits_of(model, tokens + ours.token_ids)[len(tokens) - 1 : -1].log_softmax(-1)
        for row, one in zip(logits, ours.logprobs, strict=True):
            assert one.top_logprobs == pytest.approx(row[one.top_ids].tolist(), abs=TOLERANCE)


@pytest.mark.parametrize("name", ["nf4-nested", "awq"])
def test_an_adapter_on_a_quantised_base_is_pefts_on_the_dequantised_one(tmp_path, name):
    """As a QLoRA adapter is trained."""
    model = write_quantized(name, tmp_path)
    torch.manual_seed(5)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    written = tmp_path / "adapter"
    adapted.save_pretrained(written)
    engine = start(tmp_path, kernels="compiled", dtype="float32")
    digest = engine.add_adapter(
        load_file(written / "adapter_model.safetensors"), json.loads((written / "adapter_config.json").read_text())
    )
    found = engine.generate(PROMPTS, PARAMS, [digest, digest])
    engine.close()
    for tokens, ours in zip(PROMPTS, found, strict=True):
        logits = logits_of(adapted, tokens + ours.token_ids)[len(tokens) - 1 : -1].log_softmax(-1)
        for row, one in zip(logits, ours.logprobs, strict=True):
            assert one.top_logprobs == pytest.approx(row[one.top_ids].tolist(), abs=TOLERANCE)


@pytest.mark.parametrize("wrong", ["k_proj alone", "groups of other sizes"])
def test_a_site_whose_parts_have_no_panels_in_common_is_dequantised(tmp_path, wrong):
    write_quantized("gptq-order", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    if wrong == "k_proj alone":
        name = "model.layers.1.self_attn.k_proj.g_idx"
        tensors[name] = tensors[name].flip(0)
    else:
        for part in ("q_proj", "k_proj", "v_proj"):
            tensors[f"model.layers.1.self_attn.{part}.g_idx"][:9] = 0
    save_file(tensors, tmp_path / "model.safetensors")
    found = []
    for kernels in ("compiled", "torch"):
        engine = start(tmp_path, kernels=kernels, dtype="float32")
        found.append(engine.generate(PROMPTS, PARAMS))
        engine.close()
    for ours, theirs in zip(*found, strict=True):
        for one, other in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert one.top_logprobs == pytest.approx(other.top_logprobs, abs=TOLERANCE)


@pytest.mark.parametrize(("quantization", "make"), [("int4", to_int4), ("nf4", to_nf4)])
def test_a_base_quantised_to_four_bits_is_its_dequantised_twin(tmp_path, quantization, make):
    """The projections of its layers in four bits, embedding and head in eight; an adapter on all of them."""
    write_checkpoint("llama", tmp_path)
    exact = load_file(tmp_path / "model.safetensors")
    for name, tensor in exact.items():
        if name.endswith("_proj.weight"):
            exact[name] = make(tensor).dequantized()
        elif tensor.ndim == 2:
            exact[name] = exact_weight(quantize(tensor))
    twin = tmp_path / "twin"
    twin.mkdir()
    (twin / "config.json").write_text((tmp_path / "config.json").read_text())
    save_file(exact, twin / "model.safetensors")
    found = []
    for directory, option in ((tmp_path, quantization), (twin, None)):
        engine = start(directory, kernels="compiled", dtype="float32", quantization=option)
        assert engine.ready.weights == (f"{quantization}, int8" if option else "float32")
        digest = engine.add_adapter(*adapter(engine.runner.model.sites()))
        found.append(engine.generate([*PROMPTS, *PROMPTS], PARAMS, [None, None, digest, digest]))
        engine.close()
    for ours, theirs in zip(*found, strict=True):
        assert ours.token_ids == theirs.token_ids
        for one, other in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert one.top_logprobs == pytest.approx(other.top_logprobs, abs=TOLERANCE)


@pytest.mark.parametrize(("quantization", "make"), [("int4", to_int4), ("nf4", to_nf4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inputs", [64, 100, 1])
def test_a_projection_is_quantised_to_the_codes_of_its_twin(quantization, make, dtype, inputs):
    weight = torch.randn(30, inputs, generator=torch.Generator().manual_seed(2)).to(dtype)
    weight[3], weight[4], weight[5], weight[6] = 0, weight[4].abs(), -weight[5].abs(), weight[6] * 1e-30
    [made] = WeightPanels(quantization, dtype).projection(Linear(weight, pack=False), [30])
    assert torch.equal(exact_weight(made), make(weight).dequantized())


@pytest.mark.parametrize("quantization", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_makes_its_group_not_finite(quantization, wrong):
    weight = torch.randn(30, 300, generator=torch.Generator().manual_seed(2))
    weight[7, 130] = wrong
    [made] = WeightPanels(quantization, torch.float32).projection(Linear(weight, pack=False), [30])
    faulty = torch.zeros(30, 300, dtype=torch.bool)
    faulty[7, 128 : 128 + made.group] = True
    assert torch.equal(exact_weight(made).isnan(), faulty)


@pytest.mark.parametrize("make", [to_int4, to_nf4])
@pytest.mark.parametrize("inputs", [64, 100, 1])
def test_four_bits_are_the_nearest_to_each_weight(make, inputs):
    weight = torch.randn(30, inputs, generator=torch.Generator().manual_seed(2))
    weight[3], weight[4] = 0, weight[4].abs()
    made = make(weight)
    error = (made.dequantized() - weight).abs()
    values = torch.arange(-8, 8).float() if made.book is None else made.book
    zeros = torch.zeros_like(made.scales) if made.zeros is None else made.zeros.float()
    groups = made.groups()
    every = (values - zeros[:, groups, None]) * made.scales[:, groups, None]
    assert (error <= (every - weight[..., None]).abs().amin(2) + 1e-6).all()
    assert not made.dequantized()[3].any()


def test_what_a_quantised_checkpoint_holds_in_floats_or_as_floats_is_quantised_too(tmp_path):
    for name, held in (("awq", "int4, int8"), ("fp8-block", "float8, int8"), ("deepseek", "int8")):
        write_quantized(name, tmp_path)
        engine = start(tmp_path, kernels="compiled", dtype="float32", quantization="int8")
        assert engine.ready.weights == f"{held}; the checkpoint is {engine.runner.model.quantization.method}"
        engine.close()


def test_a_layer_is_packed_and_dropped_before_the_next_is_read(tmp_path, monkeypatch):
    write_checkpoint("llama", tmp_path)
    config = ModelConfig.from_directory(tmp_path)
    read, layer = [], Checkpoint.layer

    def watched(checkpoint, index):
        assert not any(one() for one in read), "a layer's weights are still in memory"
        found = layer(checkpoint, index)
        read.extend(weakref.ref(one.weight) for one in (found.qkv, found.o, *found.mlp))
        return found

    monkeypatch.setattr(Checkpoint, "layer", watched)
    checkpoint = open_checkpoint(config, tmp_path, torch.float32, "safetensors", pack=False, keep_quantized=True)
    kv, pool = KvCache(config, 2, 16, torch.float32, torch.device("cpu")), Pool(1)
    CompiledDecoder(config, checkpoint, kv.layers, 16, pool, 4, 4, WeightPanels("int4", torch.float32))
    pool.close()
    assert len(read) == 4 * config.num_layers
