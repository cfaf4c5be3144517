"""The canonical file: the same maths makes the same bytes, and a broken adapter leaves nothing."""

import json

import numpy as np
import pytest
import torch
from blake3 import blake3
from safetensors.torch import save_file

from runtime.adapter_format.base_tensors import StoredTensor, base_tensors
from runtime.adapter_format.canonical import canonical_from_tensors, canonicalise, read_canonical
from runtime.adapter_format.errors import InvalidAdapter
from runtime.config import EngineConfig
from tests.runtime.adapter_format.adapter_files import (
    CONFIG,
    MODEL,
    SHAPES,
    Q,
    V,
    canonical_bytes,
    file_bytes,
    lora,
    write,
)

EMBED, HEAD = "model.embed_tokens", "lm_head"


def canonical(directory, tensors, config=CONFIG, **options):
    """The summary and the bytes of the canonical file made from a weights file."""
    weights = write(directory, file_bytes(tensors, {"format": "pt"}))
    target = directory / "canonical"
    summary = canonicalise(weights, json.dumps(config).encode(), MODEL, target, max_rank=64, **options)
    return summary, target.read_bytes()


def bfloat16(array):
    return (array.view(np.uint32) >> 16).astype(np.uint16)


def stored(tensors):
    return lambda name: StoredTensor("F32", tensors[name].shape, tensors[name].tobytes())


def test_the_summary_describes_the_file_and_the_digest_is_its_blake3(tmp_path):
    tensors = lora(Q, "model.layers.1.mlp.down_proj", rank={Q: 4, "model.layers.1.mlp.down_proj": 7})
    config = CONFIG | {"target_modules": [Q, "model.layers.1.mlp.down_proj"], "rank_pattern": {"down_proj": 7}}
    summary, content = canonical(tmp_path, tensors, config)
    assert summary.digest == blake3(content).hexdigest()
    assert summary.bytes == len(content)
    assert (summary.rank, summary.targets, summary.kind) == (7, ["down_proj", "q_proj"], "lora")
    assert summary.warnings == []


def test_tensors_keep_their_own_dtype_and_bits(tmp_path):
    whole = lora(Q, prefix="")
    tensors = {
        f"{Q}.lora_A.weight": bfloat16(whole[f"{Q}.lora_A.weight"]),
        f"{Q}.lora_B.weight": whole[f"{Q}.lora_B.weight"].astype(np.float16),
    }
    _, content = canonical(tmp_path, tensors)
    config, header, offset = read_canonical(content)
    assert config.scales == {Q: 2.0}
    assert {name: entry.dtype for name, entry in header.tensors.items()} == {
        f"{Q}.lora_A.weight": "BF16",
        f"{Q}.lora_B.weight": "F16",
    }
    for name, entry in header.tensors.items():
        assert content[offset + entry.start : offset + entry.stop] == tensors[name].tobytes()


def rename(old, new):
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def reverse(tensors):
    return dict(reversed(tensors.items()))


SAME_MATHS = {
    "no prefix": (rename("base_model.model.", ""), CONFIG),
    "adapter name": (rename(".weight", ".default.weight"), CONFIG),
    "other order": (reverse, CONFIG),
    "other words for the scale": (dict, CONFIG | {"lora_alpha": 4, "use_rslora": True}),
    "patterns": (dict, CONFIG | {"r": 9, "rank_pattern": {"q_proj": 4, "v_proj": 4}, "alpha_pattern": {"k_proj": 3}}),
    "fields that change nothing": (
        dict,
        CONFIG
        | {
            "base_model_name_or_path": "someone/some-model",
            "lora_dropout": 0.3,
            "peft_version": "0.99.0",
            "megatron_core": "megatron.core",
            "use_dora": False,
            "loftq_config": {},
            "eva_config": None,
            "qalora_group_size": 16,
            "init_lora_weights": "eva",
        },
    ),
}


@pytest.mark.parametrize(("change", "config"), SAME_MATHS.values(), ids=SAME_MATHS.keys())
def test_the_same_maths_makes_the_same_bytes(tmp_path, change, config):
    summary, content = canonical(tmp_path, lora())
    assert canonical(tmp_path, change(lora()), config) == (summary, content)


@pytest.mark.parametrize("config", [CONFIG | {"lora_alpha": 9}, CONFIG | {"alora_invocation_tokens": [3]}])
def test_another_scale_or_invocation_is_another_adapter(tmp_path, config):
    assert canonical(tmp_path, lora())[0].digest != canonical(tmp_path, lora(), config)[0].digest


def test_memory_and_file_give_one_digest(tmp_path):
    tensors = lora() | lora(HEAD, prefix="", dtype=np.float16)
    for name in lora():
        tensors[name] = bfloat16(tensors[name])
    config = CONFIG | {"target_modules": ".*"}
    summary, content = canonical(tmp_path, tensors, config)
    digest, file = canonical_from_tensors(tensors, config, MODEL, max_rank=64)
    assert (digest, file.data.tobytes()) == (summary.digest, content)
    assert (file.config, file.header) == read_canonical(content)[:2]


@pytest.mark.parametrize(("dtype", "largest"), [("<f4", 0x7F7FFFFF), ("<f2", 0x7BFF), ("<u2", 0x7F7F)])
@pytest.mark.parametrize("sign", [0, 1])
def test_the_largest_finite_values_are_accepted(dtype, largest, sign):
    bits = largest | sign << (8 * np.dtype(dtype).itemsize - 1)
    extreme = np.array([bits], f"<u{np.dtype(dtype).itemsize}").view(dtype)
    tensors = {name: np.full(tensor.shape, extreme) for name, tensor in lora().items()}
    _, content = canonical_bytes(tensors, CONFIG | {"lora_alpha": 4})
    assert content.endswith(4 * extreme.tobytes())


def test_arrays_in_memory_need_not_be_contiguous():
    tensors = lora()
    turned = {name: np.asfortranarray(tensor) for name, tensor in tensors.items()}
    assert canonical_bytes(turned, CONFIG) == canonical_bytes(tensors, CONFIG)


def test_canonical_files_are_fixed_points(tmp_path):
    summary, content = canonical(tmp_path, lora(rank=4))
    config, header, offset = read_canonical(content)
    tensors = {
        name: np.frombuffer(content[offset + e.start : offset + e.stop], np.float32).reshape(e.shape)
        for name, e in header.tensors.items()
    }
    assert canonical(tmp_path, tensors) == (summary, content)
    assert read_canonical(tmp_path / "canonical") == (config, header, offset)


def test_another_base_name_is_a_warning_and_strictly_an_error(tmp_path):
    config = CONFIG | {"base_model_name_or_path": "org/other"}
    summary, _ = canonical(tmp_path, lora(), config, base_model_names=["org/ours"])
    assert summary.warnings == ['base_model_name_or_path: is "org/other", this server\'s base is org/ours']
    with pytest.raises(InvalidAdapter, match="base_model_name_or_path"):
        canonical(tmp_path, lora(), config, base_model_names=["org/ours"], strict=True)
    local = config | {"base_model_name_or_path": "/home/someone/models/Ours/"}
    assert canonical(tmp_path, lora(), local, base_model_names=["org/ours"], strict=True)[0].warnings == []


SAME_BASE = [
    "unsloth/Llama-3.2-1B-Instruct-bnb-4bit",
    "unsloth/llama-3.2-1b-instruct-unsloth-bnb-4bit",
    "unsloth/Meta-Llama-3.2-1B-Instruct",
    "/root/.cache/huggingface/hub/models--meta-llama--Llama-3.2-1B-Instruct/snapshots/0123456789abcdef0123456789abcdef/",
    "mlx-community/Llama-3.2-1B-Instruct-4bit",
    "someone/Llama-3.2-1B-Instruct-GPTQ-Int4",
    "./models/Llama-3.2-1B-Instruct/",
]


@pytest.mark.parametrize("claimed", SAME_BASE)
def test_a_copy_or_a_path_of_the_same_base_is_no_other_base(tmp_path, claimed):
    for ours in ("meta-llama/Llama-3.2-1B-Instruct", SAME_BASE[3]):
        config = CONFIG | {"base_model_name_or_path": claimed}
        assert canonical(tmp_path, lora(), config, base_model_names=[ours], strict=True)[0].warnings == []


@pytest.mark.parametrize(
    "claimed", ["meta-llama/Llama-3.2-1B", "Llama-3.2-3B-Instruct", "outputs/checkpoint-500", "4bit"]
)
def test_another_name_is_another_base(tmp_path, claimed):
    config = CONFIG | {"base_model_name_or_path": claimed}
    assert canonical(tmp_path, lora(), config, base_model_names=["org/Llama-3.2-1B-Instruct"])[0].warnings != []


def test_the_class_of_the_base_decides_where_peft_wrote_it(tmp_path):
    for same in (
        "LlamaForCausalLM",
        "LlamaModel",
        "LlamaForSequenceClassification",
        "FullyShardedDataParallel",
        None,
        3,
    ):
        config = CONFIG | {"auto_mapping": {"base_model_class": same, "parent_library": "x"}}
        assert canonical(tmp_path, lora(), config)[0].warnings == []
    for other in ("Qwen2ForCausalLM", "BertModel", "GPT2LMHeadModel"):
        with pytest.raises(InvalidAdapter, match=f"{other}, this server's base is a LlamaForCausalLM"):
            canonical(tmp_path, lora(), CONFIG | {"auto_mapping": {"base_model_class": other}})


def test_a_set_field_that_peft_does_not_know_is_a_warning(tmp_path):
    summary, _ = canonical(tmp_path, lora(), CONFIG | {"unsloth_fixed": True, "left_empty": {}})
    assert summary.warnings == ["unsloth_fixed: unknown field, ignored"]


def test_a_refused_adapter_leaves_nothing_and_what_was_there_stays(tmp_path):
    broken = lora()
    broken[f"base_model.model.{V}.lora_B.weight"][0, 0] = np.nan
    (tmp_path / "canonical").write_bytes(b"before")
    with pytest.raises(InvalidAdapter):
        canonical(tmp_path, broken)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_model.safetensors", "canonical"]
    assert (tmp_path / "canonical").read_bytes() == b"before"


def with_base_copies(module, value):
    return lora(module) | {f"base_model.model.{module}.base_layer.weight": value}


@pytest.mark.parametrize("module", [EMBED, HEAD])
def test_a_copy_of_the_bases_own_embedding_is_accepted_and_left_out(tmp_path, module):
    weight = np.random.default_rng(0).standard_normal((96, 64)).astype(np.float32)
    config = CONFIG | {"target_modules": ".*"}
    plain = canonical(tmp_path, lora(module), config)
    base = stored({f"{module}.weight": weight})
    copied = with_base_copies(module, weight)
    assert canonical(tmp_path, copied, config, base_tensor=base) == plain
    unwrapped = {name.replace(".base_layer", ""): tensor for name, tensor in copied.items()}
    assert canonical(tmp_path, unwrapped, config, base_tensor=base) == plain


@pytest.mark.parametrize("sharded", [False, True])
def test_a_copy_of_a_quantised_base_is_compared_where_the_base_has_it_in_floats(tmp_path, sharded):
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    base = {f"{EMBED}.weight": weight, f"{Q}.qweight": torch.zeros(8, 64, dtype=torch.int32)}
    name = "model-00001-of-00001.safetensors" if sharded else "model.safetensors"
    for head in ({"lm_head.qweight": torch.zeros(8, 96, dtype=torch.int32)}, {"lm_head.weight": weight.char()}):
        save_file(base | head, tmp_path / name)
        if sharded:
            index = {"weight_map": dict.fromkeys(base | head, name)}
            (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        options = {"base_tensor": base_tensors(EngineConfig(model=str(tmp_path)))}
        config = CONFIG | {"target_modules": ".*"}
        canonical(tmp_path, with_base_copies(EMBED, weight.numpy()), config, **options)
        with pytest.raises(InvalidAdapter, match=r"lm_head.weight: is quantised .*; save it with save_pretrained"):
            canonical(tmp_path, with_base_copies(HEAD, weight.numpy()), config, **options)


def test_a_copy_in_another_dtype_is_compared_by_value(tmp_path):
    bits = bfloat16(np.random.default_rng(0).standard_normal((96, 64)).astype(np.float32))
    weight = (bits.astype(np.uint32) << 16).view(np.float32)
    base = stored({"lm_head.weight": weight})
    config = CONFIG | {"target_modules": ".*"}
    assert canonical(tmp_path, with_base_copies(HEAD, bits), config, base_tensor=base)[0].targets == ["lm_head"]


ROUND = {"uint16": lambda array: torch.from_numpy(array).bfloat16().view(torch.uint16).numpy(), "float16": np.float16}


@pytest.mark.parametrize("dtype", ["uint16", "float16"])
def test_a_copy_that_was_rounded_to_its_dtype_is_accepted_with_a_warning(tmp_path, dtype):
    weight = np.random.default_rng(0).standard_normal((96, 64)).astype(np.float32)
    weight[3, 3:6] = 1.00390625, 1.01171875, 1e-6  # halfway to a bfloat16, twice, and small in float16
    copied = np.array(ROUND[dtype](weight))
    config = CONFIG | {"target_modules": ["lm_head"]}
    options = {"base_tensor": stored({"lm_head.weight": weight})}
    summary, content = canonical(tmp_path, with_base_copies(HEAD, copied), config, **options)
    assert content == canonical(tmp_path, lora(HEAD), config)[1]
    [warning] = summary.warnings
    assert f"rounded to {'BF16' if dtype == 'uint16' else 'F16'}" in warning
    other = copied.view(np.uint16).copy()
    other[95, 63] ^= 1
    with pytest.raises(InvalidAdapter, match="differs from the base"):
        canonical(tmp_path, with_base_copies(HEAD, other.view(dtype)), config, **options)


@pytest.mark.parametrize("rows", [95, 97])
def test_a_resized_vocabulary_is_refused_with_both_shapes_and_the_way_out(tmp_path, rows):
    weight = np.random.default_rng(0).standard_normal((100, 64)).astype(np.float32)
    resized = lora() | {f"base_model.model.{EMBED}.weight": weight[:rows]}
    with pytest.raises(InvalidAdapter, match="save_embedding_layers=False") as refused:
        canonical(tmp_path, resized, base_tensor=stored({f"{EMBED}.weight": weight[:96]}))
    assert f"[{rows}, 64]" in str(refused.value)
    assert "[96, 64]" in str(refused.value)


def test_modules_that_the_file_lacks_are_listed_if_they_begin_at_zero_and_refused_if_not(tmp_path):
    config = CONFIG | {"target_modules": ["q_proj", "v_proj", "lm_head"], "layers_to_transform": None}
    summary, content = canonical(tmp_path, lora(), config)
    assert content == canonical(tmp_path, lora())[1]
    [warning] = summary.warnings
    assert "no tensors for 3 of the modules" in warning
    for module in ("model.layers.1.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "lm_head"):
        assert module in warning
    for init in ("gaussian", "eva", True, "mica"):
        assert canonical(tmp_path, lora(), config | {"init_lora_weights": init})[0].warnings == [warning]
    for init in (False, "orthogonal"):
        with pytest.raises(InvalidAdapter, match="fills at random"):
            canonical(tmp_path, lora(), config | {"init_lora_weights": init})


def test_another_embedding_is_refused_and_so_is_one_that_cannot_be_compared(tmp_path):
    weight = np.random.default_rng(0).standard_normal((96, 64)).astype(np.float32)
    other = weight.copy()
    other[95, 63] += 1
    config = CONFIG | {"target_modules": ".*"}
    for base in (stored({"lm_head.weight": weight}), None):
        with pytest.raises(InvalidAdapter, match=r"lm_head.base_layer.weight") as refusal:
            canonical(tmp_path, with_base_copies(HEAD, other), config, base_tensor=base)
        assert refusal.value.field == "base_model.model.lm_head.base_layer.weight"


def test_every_projection_of_the_model_can_be_adapted_alone(tmp_path):
    for module in SHAPES:
        summary, _ = canonical(tmp_path, lora(module), CONFIG | {"target_modules": ".*"})
        assert summary.targets == [module.rpartition(".")[2]]


LAST = "model.layers.1"


@pytest.mark.parametrize(
    ("modules", "leaves"),
    [
        ([HEAD], True),
        ([f"{LAST}.self_attn.q_proj", f"{LAST}.self_attn.o_proj"], True),
        ([f"{LAST}.mlp.gate_proj", f"{LAST}.mlp.up_proj", f"{LAST}.mlp.down_proj", HEAD], True),
        ([f"{LAST}.self_attn.k_proj"], False),
        ([HEAD, f"{LAST}.self_attn.v_proj"], False),
        (["model.layers.0.self_attn.o_proj"], False),
        (["model.layers.0.mlp.down_proj", f"{LAST}.mlp.down_proj"], False),
        ([EMBED], False),
    ],
)
def test_an_adapter_that_leaves_every_k_and_v_as_the_bases_is_known_as_such(tmp_path, modules, leaves):
    summary, _ = canonical(tmp_path, lora(*modules), CONFIG | {"target_modules": ".*"})
    assert summary.kv_is_base is leaves


def test_the_summary_has_the_invocation_of_an_alora(tmp_path):
    summary, content = canonical(tmp_path, lora(), CONFIG | {"alora_invocation_tokens": [3, 4, 3]})
    assert (summary.kind, summary.invocation_tokens) == ("alora", (3, 4, 3))
    assert read_canonical(content)[0].alora_invocation_tokens == (3, 4, 3)
    plain, _ = canonical(tmp_path, lora(), CONFIG | {"alora_invocation_tokens": None})
    assert (plain.kind, plain.invocation_tokens) == ("lora", None)
