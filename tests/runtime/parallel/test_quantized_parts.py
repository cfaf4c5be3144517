"""Quantised bases on several ranks: each holds its part as the checkpoint does, where no group of inputs is cut."""

import msgspec
import pytest
import torch

from runtime.config import MIB, EngineConfig
from runtime.engine import Engine
from runtime.gpu.packed_linear import DeviceWeights, PackedLinear
from runtime.models.config import ModelConfig
from runtime.models.shards import Shard, Span
from runtime.models.weights import open_checkpoint
from runtime.parallel.group import RankGroup
from runtime.quantization.scheme import read_scheme
from tests.runtime.gpu.test_triton_models import adapter
from tests.runtime.models.quantized_checkpoints import CASES, write_quantized
from tests.runtime.parallel.rank_threads import ranks_as_threads
from tests.runtime.tiny_engine import GREEDY, prompt

FLOATS = torch.float32


def checkpoint_of(directory, rank, size, *, keep):
    shard = Shard(ModelConfig.from_directory(directory), RankGroup(rank, size))
    return open_checkpoint(shard.whole, directory, FLOATS, "safetensors", shard=shard, pack=False, keep_quantized=keep)


def linears(layer):
    return {"qkv": layer.qkv, "o": layer.o, "gate_up": layer.mlp.gate_up, "down": layer.mlp.down}


@pytest.mark.parametrize("kind", CASES)
def test_a_part_stands_for_the_part_of_the_dequantised_weight(tmp_path, kind):
    """Three ranks have heads of zeros and a width that is padded; four have half a group of the inputs of o each."""
    write_quantized(kind, tmp_path)
    model = ModelConfig.from_directory(tmp_path)
    for size in (2, 3, 4):
        kept = set()
        for rank in range(size):
            shard = Shard(model, RankGroup(rank, size))
            exact = open_checkpoint(
                model, tmp_path / "dequantised", FLOATS, "safetensors", shard=shard, pack=False
            ).layer(0)
            for name, linear in linears(checkpoint_of(tmp_path, rank, size, keep=True).layer(0)).items():
                if linear.quantized:
                    kept.add(name)
                    found = torch.cat([part.dequantized() for part in linear.quantized])
                else:
                    assert name not in kept, "all ranks have parts of one kind"
                    found = linear.weight
                torch.testing.assert_close(found, linears(exact)[name].weight, rtol=1e-6, atol=1e-7)
        assert kept == {"qkv", "gate_up"} | {name for name in ("o", "down") if can_be_cut(tmp_path, name, size)}


def can_be_cut(directory, name, size):
    """Whether all parts of a projection's inputs begin where a group does; two heads of 16 numbers share K and V."""
    [weight] = linears(checkpoint_of(directory, 0, 1, keep=True).layer(0))[name].quantized
    if weight.group_of_input is not None:
        return False
    if weight.scales.shape[1] == 1:
        return True
    if name == "o":
        return {2: 32, 3: 32, 4: 16}[size] % weight.group == 0
    named = ModelConfig.from_directory(directory).quantization.together == weight.group
    return named or -(-256 // size) % weight.group == 0


def bytes_of(directory, rank, size):
    """The memory of a rank's projections as a GPU holds them, by their name in layer 0; all are packed."""
    placed = DeviceWeights(FLOATS, torch.device("cpu"), "cpu")
    found = {}
    for name, linear in linears(checkpoint_of(directory, rank, size, keep=True).layer(0)).items():
        packed = placed.placed(linear)
        assert isinstance(packed, PackedLinear)
        codes, scales, zeros, *_ = packed.packed_weight
        found[name] = codes.nbytes, scales.nbytes + (0 if zeros is None else zeros.nbytes)
    return found


@pytest.mark.parametrize("kind", ["gptq", "packed-8", "nf4"])
def test_each_rank_holds_half_of_the_packed_weights(tmp_path, kind):
    write_quantized(kind, tmp_path, head_dim=32)  # the inputs of o are two blocks of 64
    whole = bytes_of(tmp_path, 0, 1)
    for rank in range(2):
        assert bytes_of(tmp_path, rank, 2) == {
            name: (codes // 2, scales // 2) for name, (codes, scales) in whole.items()
        }


@pytest.mark.parametrize("kind", ["w8a16", "fp8-channel"])
def test_a_scale_for_each_output_is_of_each_ranks_inputs(tmp_path, kind):
    write_quantized(kind, tmp_path, head_dim=32)
    whole, part = bytes_of(tmp_path, 0, 1), bytes_of(tmp_path, 1, 2)
    for name, (codes, scales) in whole.items():
        assert part[name] == (codes // 2, scales // (1 if name in ("o", "down") else 2))


def test_no_group_of_inputs_is_cut_where_the_configuration_names_its_size(tmp_path):
    """Of 256 inputs in groups of 64 three ranks have two groups each, and the last one none."""
    write_quantized("gptq-symmetric", tmp_path)
    model = ModelConfig.from_directory(tmp_path)
    shards = [Shard(model, RankGroup(rank, 3)) for rank in range(3)]
    cuts = [shard.module("model.layers.0.mlp.down_proj").inputs for shard in shards]
    assert cuts == [Span(0, 128, 128), Span(128, 256, 128), Span(256, 256, 128)]
    assert "384 intermediate_size for 256" in shards[0].padding


def test_parts_that_begin_within_a_group_are_dequantised_and_named_once(tmp_path, caplog):
    write_quantized("gptq", tmp_path)
    with caplog.at_level("INFO"):
        checkpoint_of(tmp_path, 0, 4, keep=True).weights()
    [line] = [record.getMessage() for record in caplog.records if "dequantised" in record.getMessage()]
    assert line.startswith("model.layers.0.self_attn.o_proj.weight is dequantised, as all o_proj")


@pytest.mark.parametrize(
    ("kind", "together"),
    [("awq", 32), ("gptq-symmetric", 64), ("deepseek", 48), ("fp8-block", 32), ("nf4", 64), ("w8a16", -1)],
)
def test_a_configuration_says_which_inputs_have_one_scale(kind, together):
    assert read_scheme(CASES[kind].config).together == together


def test_the_group_size_of_compressed_tensors_is_read():
    weights = {"num_bits": 4, "type": "int", "group_size": 128}
    config = {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": weights}}}
    assert read_scheme(config).together == 128
    config["config_groups"]["b"] = {"weights": weights | {"group_size": None}}
    assert read_scheme(config).together == -1


def outputs(directory, size, kernels, lengths=(34, 5), max_tokens=GREEDY.max_tokens, **options):
    sizes = {"kv_cache_bytes": MIB, "adapter_bytes": MIB, "host_adapter_bytes": MIB, "max_model_len": 64}
    engine = Engine(
        EngineConfig(
            model=str(directory),
            kernels=kernels,
            device="cpu",
            dtype="float32",
            threads=1,
            tensor_parallel_size=size,
            **sizes,
            **options,
        )
    )
    digest = engine.add_adapter(*adapter(engine.runner.model.sites()))
    prompts = [[token % 131 for token in prompt(length, length)] for length in lengths]
    params = msgspec.structs.replace(GREEDY, max_tokens=max_tokens)
    found = [completion.token_ids for completion in engine.generate(prompts, params, [None, digest])]
    held = engine.runner.weights_held
    engine.check()
    engine.close()
    return found, held


@pytest.mark.parametrize(
    ("kind", "family"), [("gptq-order", "llama"), ("nf4-nested", "llama"), ("fp8-block", "qwen2-moe"), ("awq", "phi3")]
)
def test_tokens_of_a_quantised_base_are_those_of_one_rank(tmp_path, kind, family):
    """With an adapter of all modules beside the base; PyTorch's kernels dequantise each rank's part."""
    write_quantized(kind, tmp_path, family)
    expected, _ = outputs(tmp_path, 1, "torch")
    with ranks_as_threads():
        assert outputs(tmp_path, 2, "torch")[0] == expected


def test_the_triton_runner_computes_with_packed_parts(tmp_path):
    write_quantized("gptq", tmp_path, num_hidden_layers=1)
    short = {"lengths": (9, 5), "max_tokens": 2, "max_running": 2}
    expected, _ = outputs(tmp_path, 1, "torch", **short)
    assert outputs(tmp_path, 2, "triton", **short) == (expected, "int4, float32; the checkpoint is gptq")
