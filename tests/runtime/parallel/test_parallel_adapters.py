"""Engines on two and four ranks against PEFT: adapters of all kinds, aLoRA, K/V that are evicted and reloaded."""

import json

import peft
import pytest
import torch

from runtime.config import MIB, EngineConfig
from runtime.engine import Engine
from runtime.messages import SamplingParams
from tests.runtime.adapters.test_kinds import BLOCK_BYTES, GREEDY, SCORE, Bases, assert_right, engine_of, text
from tests.runtime.adapters.test_kinds_of_families import DORA, KINDS, adapted, check
from tests.runtime.adapters.test_kinds_of_families import engine_of as engine_of_family
from tests.runtime.models.families import write_checkpoint
from tests.runtime.models.test_family_engines import Family, check_kv
from tests.runtime.parallel.rank_threads import ranks_as_threads
from tests.runtime.tiny_engine import ADAPTER_CONFIG, adapter_tensors
from tests.runtime.tiny_model import TINY

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore:::peft")]


@pytest.fixture(autouse=True)
def threads():
    with ranks_as_threads():
        yield


def on(size):
    return {"kernels": "torch", "tensor_parallel_size": size}


@pytest.mark.parametrize(("tied", "size"), [(False, 2), (False, 4), (True, 2)])
def test_every_kind_is_exact_in_one_batch_with_the_others(tmp_path, tied, size):
    bases = Bases(tmp_path, tied)
    engine = engine_of(bases, threads=1, **on(size))
    digests = {name: engine.add_adapter(*bases.adapter(name)) for name in bases.kinds} | {None: None}
    prompts = [text(seed) for seed, _ in enumerate(digests)]
    found = engine.generate(prompts, SCORE, list(digests.values()))
    for name, tokens, completion in zip(digests, prompts, found, strict=True):
        assert_right(bases, name, tokens, completion.prompt_logprobs)
    engine.check()
    engine.close()


@pytest.mark.parametrize("family", KINDS)
def test_adapters_of_a_family_are_exact_beside_each_other_and_the_base(tmp_path, family):
    models = {name: adapted(write_checkpoint(family, tmp_path), kind) for name, kind in KINDS[family].items()}
    models[None] = write_checkpoint(family, tmp_path)
    check(engine_of_family(tmp_path, "torch", tensor_parallel_size=2), models)


@pytest.mark.parametrize(
    ("name", "size"), [("olmo2", 2), ("phi3-window", 2), ("gemma3", 2), ("gpt-oss-moe", 2), ("qwen2-moe", 4)]
)
def test_preempted_shared_and_evicted_kv_give_the_numbers_of_peft(tmp_path, name, size):
    """The base, a LoRA and an aLoRA; a block of a rank has as many bytes as its K/V heads."""
    family = Family(name, tmp_path)
    heads = max(family.model.num_kv_heads // size, 1)
    check_kv(family, family.engine(8 * heads // family.model.num_kv_heads, host_kv_bytes=MIB, **on(size)))


def test_adapters_evict_each_other_and_come_back(tmp_path):
    """Memory for two of them: extents are used again, and each rank has what belongs there."""
    bases = Bases(tmp_path, tied=False)
    names = ["plain", "dora", "tokens of the head", "projections", "ia3"]
    engine = engine_of(bases, threads=1, **on(2))
    sizes = [engine.adapters._adapters[engine.add_adapter(*bases.adapter(name))].size for name in names]
    engine.close()
    memory = {"adapter_bytes": 2 * max(sizes), "host_adapter_bytes": 3 * max(sizes)}
    engine = engine_of(bases, threads=1, kv_cache_bytes=8 * BLOCK_BYTES, max_model_len=64, **memory, **on(2))
    digests = {name: engine.add_adapter(*bases.adapter(name)) for name in names}
    each = 2 * names
    prompts = [text(300 + seed) for seed, _ in enumerate(each)]
    found = engine.generate(prompts, GREEDY, [digests[name] for name in each])
    assert engine.adapters.device.evictions > 0
    for name, tokens, completion in zip(each, prompts, found, strict=True):
        judged = bases.logits(name, tokens + completion.token_ids)[len(tokens) - 1 :]
        assert judged.argmax(-1).tolist() == completion.token_ids, name
    engine.check()
    engine.close()


def test_a_row_of_zeros_under_dora_is_refused_whichever_rank_has_it(tmp_path):
    """The last rank's part of a projection fails, and then no rank has the adapter."""
    base = write_checkpoint("llama", tmp_path)
    model = adapted(base, DORA | {"target_modules": ["v_proj"]})
    engine = engine_of_family(tmp_path, "torch", tensor_parallel_size=2)
    tensors = {
        key: tensor.clone()
        for key, tensor in peft.get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    name = "base_model.model.model.layers.1.self_attn.v_proj"
    weight = base.get_submodule("model.layers.1.self_attn.v_proj").get_base_layer().weight
    with torch.no_grad():  # the last output: BA is what the base has, with the other sign
        a, b = (tensors[f"{name}.lora_{each}.weight"] for each in "AB")
        a[:] = 0
        a[0] = weight[-1]
        b[-1, 0] = -2 / 3  # the scale is 1.5
    reason = reason_of_failure(engine, engine.add_adapter(tensors, model.peft_config["default"].to_dict()))
    assert reason.startswith("rank 1: ")
    assert "divides by a row of zeros" in reason
    assert engine.generate([[5, 6, 7]], SamplingParams(max_tokens=2))[0].token_ids
    engine.close()


def test_dora_of_what_no_file_has_whole_is_refused_by_name(tmp_path):
    """Each rank has some inputs of down_proj, and the length of a row is of all of them."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    sizes = {"kv_cache_bytes": MIB, "adapter_bytes": MIB, "host_adapter_bytes": MIB}
    engine = Engine(EngineConfig(model=str(tmp_path), load_format="dummy", device="cpu", threads=1, **sizes, **on(2)))
    tensors = adapter_tensors(modules=["mlp.down_proj"])
    for layer in range(2):
        tensors[f"base_model.model.model.layers.{layer}.mlp.down_proj.lora_magnitude_vector"] = torch.ones(32)
    config = ADAPTER_CONFIG | DORA | {"target_modules": ["down_proj"]}
    assert "down_proj: is DoRA's" in (reason := reason_of_failure(engine, engine.add_adapter(tensors, config)))
    assert reason.endswith("set tensor_parallel_size (--tensor-parallel-size) to 1")
    engine.close()


def reason_of_failure(engine, digest):
    """Why an adapter does not load."""
    engine.adapters.load(digest, "device")
    while not (failed := [event.reason for event in engine.step() if getattr(event, "state", "") == "failed"]):
        engine.wait(1.0)
    return failed[0]
