"""Each adapter that PEFT would not apply as its author meant is refused, by the name of the field at fault."""

import ast
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime.adapter_format import errors, peft_config, safetensors_header
from runtime.adapter_format import tensors as tensors_module
from runtime.adapter_format.canonical import canonical_from_tensors, canonicalise
from runtime.adapter_format.errors import InvalidAdapter
from runtime.adapter_format.peft_config import parse_peft_config
from runtime.adapter_format.safetensors_header import MAX_HEADER_BYTES
from tests.runtime.adapter_format.adapter_files import CONFIG, MODEL, Q, V, file_bytes, lora, raw_file, write

P = "base_model.model."
QA, QB = f"{P}{Q}.lora_A.weight", f"{P}{Q}.lora_B.weight"
EMBED = "model.embed_tokens"


def refusal(tensors, config):
    with pytest.raises(InvalidAdapter) as refused:
        canonical_from_tensors(tensors, config, MODEL, max_rank=64)
    assert refused.value.field in str(refused.value)
    assert_it_says_what_to_do(refused.value)
    return refused.value


VERBS = {"save", "correct", "train", "serve", "convert", "merge", "start", "fetch", "unpack", "download", "list", "set"}
VERBS |= {"send", "give", "check", "take", "copy", "remove", "mix"}


def assert_it_says_what_to_do(error):
    assert str(error).endswith(f"; {error.step}")
    assert error.step.split()[0] in VERBS, error.step


CONFIGS = {
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    "pissa by iterations": ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights"),
    "OLoRA": ({"init_lora_weights": "OLoRA"}, "init_lora_weights"),
    "corda": ({"init_lora_weights": "corda"}, "init_lora_weights"),
    "loftq": ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "init_lora_weights"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, "init_lora_weights"),
    "an init of tomorrow": ({"init_lora_weights": "quux"}, "init_lora_weights"),
    "an init that is a number": ({"init_lora_weights": 3}, "init_lora_weights"),
    "layer_replication": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "trainable_token_indices": ({"trainable_token_indices": [0]}, "trainable_token_indices"),
    "bias of tomorrow": ({"bias": "some"}, "bias"),
    "kasa": ({"kasa_config": {"beta": 1}}, "kasa_config"),
    "monteclora": ({"monteclora_config": {"num_samples": 4}}, "monteclora_config"),
    "arrow": ({"arrow_config": {"top_k": 3}}, "arrow_config"),
    "qalora": ({"use_qalora": True}, "use_qalora"),
    "bd-lora": ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
    "velora": ({"velora_config": {"num_groups": 2}}, "velora_config"),
    "megatron": ({"megatron_config": {"hidden_size": 64}}, "megatron_config"),
    "experts": ({"target_parameters": "mlp.experts.gate_up_proj"}, "target_parameters"),
    "a parameter of norms": ({"target_parameters": ["input_layernorm.weight"]}, "target_parameters"),
    "vera": ({"peft_type": "VERA"}, "peft_type"),
    "no rank": ({"r": None}, "r"),
    "rank zero": ({"r": 0}, "r"),
    "rank true": ({"r": True}, "r"),
    "rank a string": ({"r": "4"}, "r"),
    "rank over the limit": ({"r": 65}, "r"),
    "rank a fraction": ({"r": 4.5}, "r"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha"),
    "alpha zero": ({"lora_alpha": 0}, "lora_alpha"),
    "alpha negative": ({"lora_alpha": -8}, "lora_alpha"),
    "alpha 1e30": ({"lora_alpha": 1e30}, "lora_alpha"),
    "alpha a huge integer": ({"lora_alpha": 10**400}, "lora_alpha"),
    "alpha infinite": ({"lora_alpha": math.inf}, "lora_alpha"),
    "alpha nan": ({"lora_alpha": math.nan}, "lora_alpha"),
    "alpha true": ({"lora_alpha": True}, "lora_alpha"),
    "alpha that makes the scale insane": ({"lora_alpha": 50_000}, "lora_alpha"),
    "use_rslora a string": ({"use_rslora": "false"}, "use_rslora"),
    "lora_bias a string": ({"lora_bias": "none"}, "lora_bias"),
    "rank_pattern a list": ({"rank_pattern": [4]}, "rank_pattern"),
    "rank_pattern over the limit": ({"rank_pattern": {"q_proj": 65}}, "rank_pattern[q_proj]"),
    "alpha_pattern a string": ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern[q_proj]"),
    "alpha_pattern 1e30": ({"alpha_pattern": {"q_proj": 1e30}}, "alpha_pattern[q_proj]"),
    "many keys": ({"alpha_pattern": {f"m{i}": 4 for i in range(1025)}}, "alpha_pattern"),
    "a bad class": ({"rank_pattern": {"[z-a]": 4}}, "rank_pattern"),
    "a flag that PEFT's form does not allow": ({"rank_pattern": {"(?i)Q_PROJ": 4}}, "rank_pattern"),
    "a repetition of more than can be": ({"alpha_pattern": {"a{1,99999999999999}": 4}}, "alpha_pattern"),
    "target_modules a number": ({"target_modules": 3}, "target_modules"),
    "target_modules null": ({"target_modules": None}, "target_modules"),
    "target_modules broken": ({"target_modules": "(q_proj"}, "target_modules"),
    "target_modules nested deeply": ({"target_modules": "(" * 20_000 + ")" * 20_000}, "target_modules"),
    "exclude_modules broken": ({"exclude_modules": "("}, "exclude_modules"),
    "exclude_modules a number": ({"exclude_modules": [3]}, "exclude_modules"),
    "layers_pattern broken": ({"layers_pattern": "(", "layers_to_transform": 0}, "layers_pattern"),
    "layers_pattern a number": ({"layers_pattern": [3]}, "layers_pattern"),
    "a pattern and layers": ({"target_modules": ".*", "layers_to_transform": [0]}, "layers_to_transform"),
    "all modules and layers": ({"target_modules": "all-linear", "layers_to_transform": 0}, "layers_to_transform"),
    "a pattern and a layers_pattern": ({"target_modules": ".*", "layers_pattern": ""}, "layers_pattern"),
    "a layers_pattern without layers": ({"layers_pattern": ["layers"]}, "layers_pattern"),
    "layers_to_transform a string": ({"layers_to_transform": "0"}, "layers_to_transform"),
    "base name a number": ({"base_model_name_or_path": 3}, "base_model_name_or_path"),
    "alora empty": ({"alora_invocation_tokens": []}, "alora_invocation_tokens"),
    "alora outside the vocabulary": ({"alora_invocation_tokens": [3, 96]}, "alora_invocation_tokens"),
    "alora negative": ({"alora_invocation_tokens": [-1]}, "alora_invocation_tokens"),
    "alora a boolean": ({"alora_invocation_tokens": [True]}, "alora_invocation_tokens"),
    "alora a string": ({"alora_invocation_tokens": "<|assistant|>"}, "alora_invocation_tokens"),
    "alora of the old format": ({"invocation_string": "<|start_of_role|>"}, "invocation_string"),
}


@pytest.mark.parametrize(("fields", "field"), CONFIGS.values(), ids=CONFIGS.keys())
def test_a_configuration_is_refused_by_its_field(fields, field):
    assert refusal(lora(), CONFIG | fields).field == field


def test_the_old_alora_format_is_told_how_to_convert():
    message = str(refusal(lora(), CONFIG | {"invocation_string": "x"}))
    assert "alora_invocation_tokens = tokenize(invocation_string)[1:]" in message


def test_the_rank_limit_names_both_figures():
    message = str(refusal(lora(), CONFIG | {"r": 65}))
    assert "65" in message
    assert "64" in message


def edited(*removed, **added):
    """The standard adapter without some tensors and with others."""
    tensors = {name: tensor for name, tensor in lora().items() if name not in removed}
    return tensors | {name.replace("__", "."): tensor for name, tensor in added.items()}


def with_value(name, value, dtype=np.float32, others=1):
    tensors = {n: np.full_like(t, others, dtype) for n, t in lora().items()}
    tensors[name][1, 2] = value
    return tensors


A = np.ones((4, 64), np.float32)
B = np.ones((64, 4), np.float32)
BIASES = {f"{P}{m}.lora_B.bias": np.ones(n, np.float32) for m, n in ((Q, 64), (V, 32))}
ANY = CONFIG | {"target_modules": ".*"}
BF16_NAN, BF16_INFINITY = 0xFFC1, 0x7F80

TENSORS = {
    "B without A": (edited(QA), CONFIG, f"{Q}.lora_A.weight"),
    "A without B": (edited(QB), CONFIG, f"{Q}.lora_B.weight"),
    "no module applies": ({f"{P}model.layers.9.self_attn.q_proj.lora_A.weight": A}, CONFIG, "layers.9"),
    "no tensors": ({}, CONFIG, "weights: has no tensors; set stage3_gather"),
    "a module the model lacks": (lora() | {f"{P}model.layers.0.mlp.router.lora_A.weight": A}, ANY, "router"),
    "a layer prefix of the bare model": (
        edited(**{f"{P}layers.0.self_attn.q_proj.lora_A.weight": A}),
        CONFIG,
        "layers",
    ),
    "in_features": (lora() | {QA: np.ones((4, 63), np.float32)}, CONFIG, QA),
    "out_features": (lora() | {QB: np.ones((65, 4), np.float32)}, CONFIG, QB),
    "transposed": (lora() | {QA: A.T.copy()}, CONFIG, QA),
    "one dimension": (lora() | {QA: np.ones(256, np.float32)}, CONFIG, QA),
    "rank 8 under a configuration of 4": (lora(rank=8), CONFIG, QA),
    "a rank that the pattern changes": (lora(), CONFIG | {"rank_pattern": {"q_proj": 8}}, QA),
    "nan": (with_value(QA, np.nan), CONFIG, QA),
    "infinity": (with_value(QB, -np.inf), CONFIG, QB),
    "nan in float16": (with_value(QA, np.nan, np.float16), CONFIG, QA),
    "nan in bfloat16": (with_value(QA, BF16_NAN, np.uint16), CONFIG, QA),
    "infinity in bfloat16": (with_value(QB, BF16_INFINITY, np.uint16), CONFIG, QB),
    "infinity in float16": (with_value(QA, -np.inf, np.float16), CONFIG, QA),
    "infinity among what is below zero": (with_value(QA, np.inf, others=-1), CONFIG, QA),
    "a nan without a sign among what is below zero": (with_value(QA, 0x7FC0, np.uint16, others=0xBF80), CONFIG, QA),
    "a scaled B that overflows": (with_value(QB, 3e38), CONFIG, QB),
    "a scaled B that overflows below zero": (with_value(QB, -3e38), CONFIG, QB),
    "a scaled B that overflows in bfloat16": (with_value(QB, 0xFF7F, np.uint16), CONFIG, QB),
    "the base's weight": (edited(**{f"{P}{Q}.weight": np.ones((64, 64), np.float32)}), CONFIG, f"{Q}.weight"),
    "the base's norm": (edited(**{"model.norm.weight": np.ones(64, np.float32)}), CONFIG, "model.norm.weight"),
    "the base's head": (edited(**{"lm_head.weight": np.ones((96, 64), np.float32)}), CONFIG, "lm_head.weight"),
    "a copy of a projection": (
        edited(**{f"{P}{Q}.base_layer.weight": np.ones((64, 64), np.float32)}),
        CONFIG,
        f"{Q}.base_layer.weight",
    ),
    "a copy of a head that is not adapted": (
        edited(**{f"{P}lm_head.base_layer.weight": np.ones((96, 64), np.float32)}),
        CONFIG,
        "lm_head.base_layer.weight",
    ),
    "one tensor under two names": (edited(**{f"{Q}.lora_A.default.weight": A}), CONFIG, f"{Q}.lora_A.default.weight"),
    "a bias that lora_bias denies": (lora() | BIASES, CONFIG, f"{Q}.lora_B.bias"),
    "no bias where lora_bias wants one": (lora(), CONFIG | {"lora_bias": True}, f"{Q}.lora_B.bias"),
    "a bias of the wrong size": (
        lora() | BIASES | {f"{P}{Q}.lora_B.bias": np.ones(63, np.float32)},
        CONFIG | {"lora_bias": True},
        f"{P}{Q}.lora_B.bias",
    ),
    "a bias of A": (edited(**{f"{P}{Q}.lora_A.bias": np.ones(4, np.float32)}), CONFIG, "lora_A.bias"),
    "another adapter's name": (edited(**{f"{P}{Q}.lora_A.mine.weight": A}), CONFIG, "lora_A.mine.weight"),
    "dora's magnitude": (
        edited(**{f"{P}{Q}.lora_magnitude_vector": np.ones(64, np.float32)}),
        CONFIG,
        f"{P}{Q}.lora_magnitude_vector",
    ),
    "kasa's diagonal": (edited(**{f"{P}{Q}.lora_diag": np.ones(4, np.float32)}), CONFIG, f"{P}{Q}.lora_diag"),
    "fused qkv": ({f"{P}model.layers.0.self_attn.qkv_proj.lora_A.weight": A}, ANY, "qkv_proj"),
    "fused gate and up": ({f"{P}model.layers.0.mlp.gate_up_proj.lora_A.weight": A}, ANY, "gate_up_proj"),
    "experts": ({f"{P}model.layers.0.mlp.experts.base_layer.lora_A.weight": A}, ANY, "experts"),
    "an embedding as a linear": ({f"{P}{EMBED}.lora_A.weight": A, f"{P}{EMBED}.lora_B.weight": B}, ANY, EMBED),
    "a linear as an embedding": ({f"{P}{Q}.lora_embedding_A": A, f"{P}{Q}.lora_embedding_B": B}, ANY, Q),
    "a module that target_modules leaves out": (lora(), CONFIG | {"target_modules": ["v_proj"]}, Q),
    "a module that a pattern leaves out": (lora(), CONFIG | {"target_modules": r".*\.(v_proj|o_proj)"}, Q),
    "a module that is excluded": (lora(), CONFIG | {"exclude_modules": ["q_proj"]}, Q),
    "a module that a pattern excludes": (lora(), CONFIG | {"exclude_modules": ".*q_proj"}, Q),
    "the head, which all-linear leaves out": (lora("lm_head"), CONFIG | {"target_modules": "all-linear"}, "lm_head"),
    "a layer that layers_to_transform leaves out": (
        lora(),
        CONFIG | {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 0},
        V,
    ),
    "layers that the model calls otherwise": (
        lora(),
        CONFIG | {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "h"},
        Q,
    ),
    "tied adapters": (lora(EMBED), ANY | {"ensure_weight_tying": True}, "ensure_weight_tying"),
    "lora_bias on the embedding": (lora(EMBED), ANY | {"lora_bias": True}, "lora_bias"),
    "alora on the embedding": (lora(EMBED), ANY | {"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    "kohya": ({"lora_unet_mid_block.lora_down.weight": A}, ANY, "kohya"),
    "diffusers": ({"unet.mid_block.to_q.lora.up.lora_up.weight": A}, ANY, "diffusers"),
    "mlx": ({"model.layers.0.self_attn.q_proj.lora_a": A}, ANY, "mlx"),
    "integers": (lora() | {QA: A.astype(np.int8)}, CONFIG, QA),
    "the other byte order": (lora() | {QA: A.astype(">f4")}, CONFIG, QA),
    "float64": (lora() | {QA: A.astype(np.float64)}, CONFIG, QA),
    "a control character in a name": ({"a\x1b[31m.lora_A.weight": A}, ANY, r"a\x1b[31m"),
}


@pytest.mark.parametrize(("tensors", "config", "named"), TENSORS.values(), ids=TENSORS.keys())
def test_tensors_are_refused_by_name(tensors, config, named):
    assert named in str(refusal(tensors, config))


def entry(start, stop, shape=None, dtype="F32"):
    return {"dtype": dtype, "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


def nested(depth):
    return b'{"a":' + b"[" * depth + b"]" * depth + b"}"


def torch_file():
    content = io.BytesIO()
    torch.save({"x": torch.zeros(2)}, content)
    return content.getvalue()


GOOD = file_bytes(lora())
DUPLICATE = (
    b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
)
DUPLICATE_WITHIN = b'{"x":{"dtype":"I8","dtype":"F32","shape":[1],"data_offsets":[0,4]}}'

FILES = {
    "empty": (b"", "is empty.*stage3_gather"),
    "a header over the limit": ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "header of"),
    "a header of 2**63": ((2**63).to_bytes(8, "little") + b"{}", "header of"),
    "a header cut off": (GOOD[:100], "truncated"),
    "data cut off": (GOOD[:-1], "truncated"),
    "trailing bytes": (GOOD + b"\0", "1 trailing bytes"),
    "a duplicate tensor": (raw_file(DUPLICATE, b"\0" * 4), "'x' twice"),
    "a duplicate dtype": (raw_file(DUPLICATE_WITHIN, b"\0" * 4), "'dtype' twice"),
    "duplicate metadata": (raw_file(b'{"__metadata__":{"a":"1","a":"2"}}'), "'a' twice"),
    "an overlap": (raw_file({"x": entry(0, 8), "y": entry(4, 12)}, b"\0" * 12), "overlaps"),
    "the same bytes twice": (raw_file({"x": entry(0, 8), "y": entry(0, 8)}, b"\0" * 8), "overlaps"),
    "a hole": (raw_file({"x": entry(0, 4), "y": entry(8, 12)}, b"\0" * 12), "hole"),
    "a hole at the start": (raw_file({"x": entry(4, 8)}, b"\0" * 8), "hole"),
    "a range of another size": (raw_file({"x": entry(0, 8, [3])}, b"\0" * 8), "expected 12"),
    "a range that runs backwards": (raw_file({"x": entry(8, 4, [1])}, b"\0" * 8), "x: spans"),
    "negative offsets": (raw_file({"x": entry(-4, 0)}, b""), "data_offsets"),
    "an astronomic shape": (raw_file({"x": entry(0, 4, [2**62, 2**62])}, b"\0" * 4), "x: spans"),
    "a shape with zero": (raw_file({"x": entry(0, 0, [0, 4])}), "shape"),
    "a shape of booleans": (raw_file({"x": entry(0, 4, [True])}, b"\0" * 4), "shape"),
    "integers": (raw_file({"x": entry(0, 4, [4], "I8")}, b"\0" * 4), "F32, F16 or BF16"),
    "float8": (raw_file({"x": entry(0, 4, [4], "F8_E4M3")}, b"\0" * 4), "F32, F16 or BF16"),
    "a dtype that is no string": (raw_file({"x": entry(0, 4, [1], ["F32"])}, b"\0" * 4), "F32, F16 or BF16"),
    "an unknown key": (raw_file({"x": entry(0, 4) | {"z": 1}}, b"\0" * 4), "exactly dtype"),
    "a tensor that is a list": (raw_file({"x": []}), "exactly dtype"),
    "an empty name": (raw_file({"": entry(0, 4)}, b"\0" * 4), "exactly dtype"),
    "metadata of numbers": (raw_file({"__metadata__": {"a": 1}}), "__metadata__"),
    "a header that is a list": (raw_file(b"[]"), "not a JSON object"),
    "a header that is not JSON": (raw_file(b"{'x': 1}"), "not JSON"),
    "a header with NaN": (raw_file(b'{"x": NaN}'), "not JSON"),
    "a header that is not UTF-8": (raw_file(b'{"\xff": 1}'), "not JSON"),
    "a header nested deeply": (raw_file(nested(200_000)), "not JSON"),
    "gguf": (b"GGUF\x03\0\0\0" + b"\0" * 64, "GGUF"),
    "a pickle": (b"\x80\x04\x95\x10\0\0\0\0\0\0\x01", "pickle"),
    "what torch.save writes": (torch_file(), r"pickle of PyTorch.*python -m service\.convert"),
    "a zip archive": (b"PK\x03\x04" + b"\x14" * 64, "is a zip archive; unpack it"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    "a web page": (b"<!DOCTYPE html>\n<html lang='en'>" + b" " * 99, "is a web page"),
    "a web page behind a blank line": (b"\n\n  <HTML><head>" + b" " * 99, "is a web page"),
    "an answer of the hub": (b"Invalid username or password.", "HF_TOKEN"),
    "an archive": (b"\x1f\x8b\x08" + b"\xff" * 99, "gzip"),
    "tensors without values": (raw_file({"x": entry(0, 0, [0])}), "zero_to_fp32.py"),
}


@pytest.mark.parametrize(("content", "expected"), FILES.values(), ids=FILES.keys())
def test_a_broken_file_is_refused_and_leaves_nothing(tmp_path, content, expected):
    weights = write(tmp_path, content)
    with pytest.raises(InvalidAdapter, match=expected) as refused:
        canonicalise(weights, json.dumps(CONFIG).encode(), MODEL, tmp_path / "target", max_rank=64)
    assert_it_says_what_to_do(refused.value)
    assert list(tmp_path.iterdir()) == [weights]


CONFIG_FILES = {
    "not JSON": (b"{", "not JSON"),
    "a list": (b"[]", "not a JSON object"),
    "a duplicate key": (b'{"r": 4, "r": 8, "lora_alpha": 8}', "'r' twice"),
    "a duplicate pattern": (b'{"r": 4, "lora_alpha": 8, "rank_pattern": {"q": 4, "q": 8}}', "'q' twice"),
    "infinity": (b'{"r": 4, "lora_alpha": Infinity}', "Infinity"),
    "a number of 5,000 digits": (b'{"r": 4, "lora_alpha": ' + b"9" * 5000 + b"}", "not JSON"),
    "over 1 MB": (b'{"r": 4, "lora_alpha": 8, "x": "' + b"x" * 2**20 + b'"}', "expected at most"),
    "nested deeply": (nested(100_000), "not JSON"),
    "a web page": (b"<!doctype html><html>", "is a web page"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
}


@pytest.mark.parametrize(("content", "expected"), CONFIG_FILES.values(), ids=CONFIG_FILES.keys())
def test_a_broken_configuration_is_refused(content, expected):
    with pytest.raises(InvalidAdapter, match=expected) as refused:
        parse_peft_config(content, max_rank=64, vocab_size=96)
    assert_it_says_what_to_do(refused.value)


STEPS = {
    "pissa": "path_initial_model_for_weight_conversion",
    "pissa by iterations": "path_initial_model_for_weight_conversion",
    "OLoRA": "path_initial_model_for_weight_conversion",
    "corda": "path_initial_model_for_weight_conversion",
    "lora_ga": "path_initial_model_for_weight_conversion",
    "loftq": "serve the base that LoftQ wrote",
    "layer_replication": "merge_and_unload",
    "kasa": "merge_and_unload",
    "a parameter of norms": "merge_and_unload",
    "rank over the limit": "--max-lora-rank 65",
    "rank_pattern over the limit": "--max-lora-rank 65",
    "alora of the old format": "python -m service.convert SOURCE TARGET --tokenizer DIRECTORY",
    "target_modules broken": "list the names of modules",
    "lora_bias a string": "adapter_config.json",
}


@pytest.mark.parametrize(("case", "step"), STEPS.items(), ids=STEPS.keys())
def test_a_refused_configuration_is_told_the_call_the_command_or_the_option(case, step):
    assert step in refusal(lora(), CONFIG | CONFIGS[case][0]).step


def explicit_steps():
    """Every step that is written where an adapter is refused, in all rooms that refuse one."""
    root = Path(__file__).parents[3]
    for path in [*root.glob("runtime/**/*.py"), *root.glob("service/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "InvalidAdapter":
                step = node.args[2] if len(node.args) > 2 else None
                text = step.values[0] if isinstance(step, ast.JoinedStr) else step
                if isinstance(text, ast.Constant):
                    yield f"{path.name}:{node.lineno}", text.value


def test_every_step_that_is_written_begins_with_what_to_do():
    found = dict(explicit_steps())
    assert len(found) > 15
    assert {where: step for where, step in found.items() if step.split()[0] not in VERBS} == {}
    constants = vars(errors) | vars(safetensors_header) | vars(peft_config) | vars(tensors_module)
    for name in (
        "SAVE_AGAIN",
        "CORRECT",
        "CONVERT",
        "ITS_BASE",
        "MERGE",
        "AGAIN",
        "CAST",
        "GATHER",
        "BY_PEFT",
        "BY_LOFTQ",
    ):
        assert constants[name].split()[0] in VERBS
    for name in ("TRAIN_AGAIN", "WITHOUT_COPIES"):
        assert constants[name].split()[0] in VERBS


def test_the_first_key_that_matches_decides():
    config = {
        "r": 1,
        "target_modules": ".*",
        "lora_alpha": 8,
        "rank_pattern": {"_proj": 9, "q_proj": 2, ".*q_proj": 3, "v_proj|k_proj": 5},
    }
    parsed = parse_peft_config(config, max_rank=64, vocab_size=96)
    ranks = {module: rank for module, (rank, _) in parsed.scales([Q, V, "model.layers.0.mlp.up_proj"]).items()}
    assert ranks == {Q: 2, V: 5, "model.layers.0.mlp.up_proj": 1}
