"""DoRA, trained biases, whole modules and rows of the vocabulary: what is accepted, and what is refused by its name."""

import numpy as np
import pytest

from runtime.adapter_format.canonical import canonical_from_tensors, read_canonical
from runtime.adapter_format.errors import InvalidAdapter
from runtime.adapter_format.mix import Part, compose
from runtime.adapter_format.replacements import MAX_TOKENS
from tests.runtime.adapter_format.adapter_files import CONFIG, MODEL, Q, V, canonical_bytes, lora, write
from tests.runtime.adapter_format.test_refusals import assert_it_says_what_to_do

P = "base_model.model."
BIASED = MODEL.__class__(**{f: getattr(MODEL, f) for f in MODEL.__struct_fields__} | {"qkv_bias": True})
TIED = MODEL.__class__(**{f: getattr(MODEL, f) for f in MODEL.__struct_fields__} | {"tie_embeddings": True})
NORMED = MODEL.__class__(**{f: getattr(MODEL, f) for f in MODEL.__struct_fields__} | {"qk_norm": "heads"})
EMBED, HEAD = "model.embed_tokens", "lm_head"
ROWS = f"{P}{EMBED}.token_adapter.trainable_tokens_delta"
HEAD_ROWS = f"{P}{HEAD}.token_adapter.trainable_tokens_delta"
MAGNITUDES = {f"{P}{Q}.lora_magnitude_vector": (64,), f"{P}{V}.lora_magnitude_vector": (32,)}
BIASES = {f"{P}{Q}.base_layer.bias": (64,), f"{P}{V}.base_layer.bias": (32,)}
K = "model.layers.0.self_attn.k_proj"


def values(shapes, seed=9):
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def canonical(shapes, fields, model=MODEL):
    return canonical_from_tensors(lora() | values(shapes), CONFIG | fields, model, max_rank=64)


ALL_BIASES = BIASES | {
    f"{P}model.layers.{layer}.self_attn.{name}.bias": (width,)
    for layer in range(2)
    for name, width in (("q_proj", 64), ("k_proj", 32), ("v_proj", 32))
    if f"model.layers.{layer}.self_attn.{name}" not in (Q, V)
}
ACCEPTED = {
    "dora": (MAGNITUDES, {"use_dora": True}, MODEL),
    "dora, old names": (
        {f"{name}.default.weight": shape for name, shape in MAGNITUDES.items()},
        {"use_dora": True},
        MODEL,
    ),
    "biases": (BIASES, {"bias": "lora_only"}, BIASED),
    "all biases": (ALL_BIASES, {"bias": "all"}, BIASED),
    "biases of a base without": ({}, {"bias": "all"}, MODEL),
    "tokens": ({ROWS: (2, 64)}, {"trainable_token_indices": [5, 1]}, MODEL),
    "tokens by name": ({ROWS: (1, 64)}, {"trainable_token_indices": {"model.embed_tokens": [95]}}, MODEL),
    "tokens of a tied model": (
        {ROWS: (1, 64)},
        {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [1]}},
        TIED,
    ),
    "embeddings": ({f"{P}{EMBED}.weight": (96, 64)}, {"modules_to_save": ["embed_tokens"]}, MODEL),
    "a head": ({f"{P}{HEAD}.weight": (96, 64)}, {"modules_to_save": ["lm_head", "classifier"]}, MODEL),
    "a projection": (
        {f"{P}{K}.weight": (32, 64), f"{P}{K}.bias": (32,)},
        {"modules_to_save": ["0.self_attn.k_proj"]},
        BIASED,
    ),
    "the last norm": ({f"{P}model.norm.weight": (64,)}, {"modules_to_save": ["model.norm"]}, MODEL),
}


@pytest.mark.parametrize(("shapes", "fields", "model"), ACCEPTED.values(), ids=ACCEPTED)
def test_every_tensor_is_kept_bit_by_bit(shapes, fields, model):
    _, file = canonical(shapes, fields, model)
    config, header, start = read_canonical(file.data.data)
    own = {name for name in header.tensors if ".lora_A" not in name and ".lora_B" not in name}
    expected = values(shapes)
    assert len(own) == len(expected)
    held = {bytes(file.data[start + header.tensors[name].start : start + header.tensors[name].stop]) for name in own}
    assert held == {array.tobytes() for array in expected.values()}
    assert set(config.scales) == {Q, V}


def test_a_tied_head_has_the_rows_of_the_embedding():
    _, file = canonical({ROWS: (2, 64)}, {"trainable_token_indices": [5, 1]}, TIED)
    assert file.config.token_indices == {EMBED: (5, 1), HEAD: (5, 1)}
    _, file = canonical({ROWS: (2, 64)}, {"trainable_token_indices": [5, 1]})
    assert file.config.token_indices == {EMBED: (5, 1)}


def test_plain_adapters_keep_their_digests():
    """The configuration of a canonical file has no word of what an adapter does not do."""
    _, content = canonical_bytes(lora(), CONFIG)
    assert b"token_indices" not in content


def nan(shapes):
    tensors = values(shapes)
    next(iter(tensors.values())).reshape(-1)[3] = np.nan
    return tensors


SAVED_HEAD = {f"{P}{HEAD}.weight": (96, 64)}
REFUSED = {
    "dora without magnitudes": ({}, {"use_dora": True}, MODEL, f"{Q}.lora_magnitude_vector"),
    "magnitudes without dora": (MAGNITUDES, {}, MODEL, f"{P}{Q}.lora_magnitude_vector"),
    "a magnitude of another width": (
        MAGNITUDES | {f"{P}{Q}.lora_magnitude_vector": (65,)},
        {"use_dora": True},
        MODEL,
        f"{P}{Q}.lora_magnitude_vector",
    ),
    "a magnitude with two axes": (
        MAGNITUDES | {f"{P}{Q}.lora_magnitude_vector": (1, 64)},
        {"use_dora": True},
        MODEL,
        f"{P}{Q}.lora_magnitude_vector",
    ),
    "a magnitude of another module": (
        MAGNITUDES | {f"{P}{K}.lora_magnitude_vector": (32,)},
        {"use_dora": True},
        MODEL,
        f"{K}.lora_A.weight",
    ),
    "dora a string": ({}, {"use_dora": "yes"}, MODEL, "use_dora"),
    "dora and lora_bias": (MAGNITUDES, {"use_dora": True, "lora_bias": True}, MODEL, "lora_bias"),
    "dora of an alora": (MAGNITUDES, {"use_dora": True, "alora_invocation_tokens": [3]}, MODEL, "use_dora"),
    "a bias of tomorrow": ({}, {"bias": "some"}, MODEL, "bias"),
    "a lost bias": ({f"{P}{Q}.base_layer.bias": (64,)}, {"bias": "lora_only"}, BIASED, f"{V}.bias"),
    "a bias without its base_layer": (BIASES | {f"{P}{V}.bias": (32,)}, {"bias": "lora_only"}, BIASED, f"{P}{V}.bias"),
    "a bias of a module without LoRA": (
        BIASES | {f"{P}{K}.bias": (32,)},
        {"bias": "lora_only"},
        BIASED,
        f"{P}{K}.bias",
    ),
    "biases that are not to be": (BIASES, {}, BIASED, f"{P}{Q}.base_layer.bias"),
    "biases of a base without any": (BIASES, {"bias": "all"}, MODEL, f"{P}{Q}.base_layer.bias"),
    "a bias of another width": (
        BIASES | {f"{P}{Q}.base_layer.bias": (63,)},
        {"bias": "lora_only"},
        BIASED,
        f"{P}{Q}.base_layer.bias",
    ),
    "biases of an alora": (BIASES, {"bias": "lora_only", "alora_invocation_tokens": [3]}, BIASED, "bias"),
    "a module that is not there": ({}, {"modules_to_save": ["lm_head"]}, MODEL, "modules_to_save"),
    "a module that is not named": (
        SAVED_HEAD | {f"{P}{EMBED}.weight": (96, 64)},
        {"modules_to_save": ["embed_tokens"]},
        MODEL,
        f"{P}{HEAD}.weight",
    ),
    "a resized head": ({f"{P}{HEAD}.weight": (97, 64)}, {"modules_to_save": ["lm_head"]}, MODEL, f"{P}{HEAD}.weight"),
    "a head and its copy": (
        SAVED_HEAD | {f"{HEAD}.weight": (96, 64)},
        {"modules_to_save": ["lm_head"]},
        MODEL,
        f"{HEAD}.weight",
    ),
    "a saved module with LoRA": (
        {f"{P}{Q}.weight": (64, 64)},
        {"modules_to_save": ["0.self_attn.q_proj"]},
        MODEL,
        "modules_to_save",
    ),
    "a projection without its bias": (
        {f"{P}{K}.weight": (32, 64)},
        {"modules_to_save": ["0.self_attn.k_proj"]},
        BIASED,
        "modules_to_save",
    ),
    "norms of heads": (
        {f"{P}model.layers.0.self_attn.q_norm.weight": (16,)},
        {"modules_to_save": ["q_norm"]},
        NORMED,
        f"{P}model.layers.0.self_attn.q_norm.weight",
    ),
    "modules_to_save a string": ({}, {"modules_to_save": "lm_head"}, MODEL, "modules_to_save"),
    "modules_to_save empty names": ({}, {"modules_to_save": [""]}, MODEL, "modules_to_save"),
    "a saved module of an alora": (
        SAVED_HEAD,
        {"modules_to_save": ["lm_head"], "alora_invocation_tokens": [3]},
        MODEL,
        "modules_to_save",
    ),
    "tokens without rows": ({}, {"trainable_token_indices": [0]}, MODEL, "trainable_token_indices"),
    "rows without tokens": ({ROWS: (1, 64)}, {}, MODEL, ROWS),
    "rows of the head without tokens": (
        {ROWS: (1, 64), HEAD_ROWS: (1, 64)},
        {"trainable_token_indices": [0]},
        MODEL,
        HEAD_ROWS,
    ),
    "rows of a head that is tied": (
        {ROWS: (1, 64), HEAD_ROWS: (1, 64)},
        {"trainable_token_indices": [0]},
        TIED,
        HEAD_ROWS,
    ),
    "more rows than tokens": ({ROWS: (3, 64)}, {"trainable_token_indices": [0, 1]}, MODEL, ROWS),
    "rows of another width": ({ROWS: (1, 65)}, {"trainable_token_indices": [0]}, MODEL, ROWS),
    "tokens outside the vocabulary": (
        {ROWS: (1, 64)},
        {"trainable_token_indices": [96]},
        MODEL,
        "trainable_token_indices",
    ),
    "negative tokens": ({ROWS: (1, 64)}, {"trainable_token_indices": [-1]}, MODEL, "trainable_token_indices"),
    "a token twice": ({ROWS: (2, 64)}, {"trainable_token_indices": [4, 4]}, MODEL, "trainable_token_indices"),
    "no tokens": ({}, {"trainable_token_indices": []}, MODEL, "trainable_token_indices"),
    "a boolean token": ({ROWS: (1, 64)}, {"trainable_token_indices": [True]}, MODEL, "trainable_token_indices"),
    "too many tokens": ({}, {"trainable_token_indices": [0] * (MAX_TOKENS + 1)}, MODEL, "trainable_token_indices"),
    "tokens of an unknown module": (
        {ROWS: (1, 64)},
        {"trainable_token_indices": {"wte": [0]}},
        MODEL,
        "trainable_token_indices",
    ),
    "rows of a projection": (
        {ROWS: (1, 64), f"{P}{K}.token_adapter.trainable_tokens_delta": (1, 64)},
        {"trainable_token_indices": [0]},
        MODEL,
        f"{P}{K}.token_adapter.trainable_tokens_delta",
    ),
    "tokens and whole embeddings": (
        {ROWS: (1, 64), f"{P}{EMBED}.weight": (96, 64)},
        {"trainable_token_indices": [0], "modules_to_save": ["embed_tokens"]},
        MODEL,
        "trainable_token_indices",
    ),
    "tokens and a whole tied head": (
        SAVED_HEAD | {ROWS: (1, 64)},
        {"trainable_token_indices": [0], "modules_to_save": ["lm_head"]},
        TIED,
        "trainable_token_indices",
    ),
    "tokens of an alora": (
        {ROWS: (1, 64)},
        {"trainable_token_indices": [0], "alora_invocation_tokens": [3]},
        MODEL,
        "trainable_token_indices",
    ),
}


@pytest.mark.parametrize(("shapes", "fields", "model", "field"), REFUSED.values(), ids=REFUSED)
def test_what_peft_would_apply_differently_is_refused_by_its_name(shapes, fields, model, field):
    with pytest.raises(InvalidAdapter) as refused:
        canonical(shapes, fields, model)
    assert refused.value.field == field
    assert_it_says_what_to_do(refused.value)


IA3 = {"peft_type": "IA3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
DOWN = "model.layers.1.mlp.down_proj"
VECTORS = {f"{P}{K}.ia3_l": (32, 1), f"{P}{DOWN}.ia3_l": (1, 112)}


def test_ia3_scales_outputs_and_the_other_factor_of_down_projs_input():
    _, file = canonical_from_tensors(values(VECTORS), IA3, MODEL, max_rank=64)
    assert list(file.header.tensors) == ["model.layers.0.self_attn.k_proj.gain", "model.layers.1.mlp.up_proj.gain"]
    assert file.config.scales == {}


REFUSED_IA3 = {
    "no vector": ({}, {}, "weights"),
    "an output's shape for an input": (VECTORS | {f"{P}{DOWN}.ia3_l": (64, 1)}, {}, f"{P}{DOWN}.ia3_l"),
    "an input's shape for an output": (VECTORS | {f"{P}{K}.ia3_l": (1, 64)}, {}, f"{P}{K}.ia3_l"),
    "a module that is not targeted": (VECTORS | {f"{P}{Q}.ia3_l": (64, 1)}, {}, f"{P}{Q}.ia3_l"),
    "a module of another model": (
        VECTORS | {f"{P}model.layers.2.mlp.down_proj.ia3_l": (1, 112)},
        {},
        f"{P}model.layers.2.mlp.down_proj.ia3_l",
    ),
    "the input of k_proj": (
        {f"{P}{K}.ia3_l": (1, 64)},
        {"feedforward_modules": ["k_proj"]},
        "feedforward_modules",
    ),
    "feedforward_modules a number": (VECTORS, {"feedforward_modules": 3}, "feedforward_modules"),
    "matrices of LoRA": (
        VECTORS | {f"{P}{K}.lora_A.weight": (4, 64), f"{P}{K}.lora_B.weight": (32, 4)},
        {},
        f"{P}{K}.lora_A.weight",
    ),
    "a saved module": (
        VECTORS | {f"{P}{K}.weight": (32, 64)},
        {"modules_to_save": ["0.self_attn.k_proj"]},
        "modules_to_save",
    ),
}


@pytest.mark.parametrize(("shapes", "fields", "field"), REFUSED_IA3.values(), ids=REFUSED_IA3)
def test_ia3_is_refused_by_what_is_wrong(shapes, fields, field):
    with pytest.raises(InvalidAdapter) as refused:
        canonical_from_tensors(values(shapes), IA3 | fields, MODEL, max_rank=64)
    assert refused.value.field == field
    assert_it_says_what_to_do(refused.value)


@pytest.mark.parametrize("kind", ["dora", "biases", "tokens", "a head", "the last norm"])
def test_nan_is_refused_in_every_tensor(kind):
    shapes, fields, model = ACCEPTED[kind]
    with pytest.raises(InvalidAdapter, match="NaN or infinite"):
        canonical_from_tensors(lora() | nan(shapes), CONFIG | fields, model, max_rank=64)


@pytest.mark.parametrize("kind", ["dora", "biases", "tokens", "a head", "the last norm"])
def test_a_mix_has_no_part_that_is_more_than_lora(kind, tmp_path):
    shapes, fields, model = ACCEPTED[kind]
    plain, other = (
        write(tmp_path, file.data.tobytes(), name)
        for name, (_, file) in (("plain", canonical({}, {}, model)), ("other", canonical(shapes, fields, model)))
    )
    with pytest.raises(InvalidAdapter, match="serve this adapter alone"):
        compose([Part(plain, 0.5), Part(other, 0.5)], tmp_path / "mix", max_rank=64)
    assert not (tmp_path / "mix").exists()


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"])
def test_the_call_that_converts_is_named(init):
    with pytest.raises(InvalidAdapter, match=r"path_initial_model_for_weight_conversion"):
        canonical({}, {"init_lora_weights": init})
