"""Composing: the sum of weighted deltas, as one canonical file."""

import numpy as np
import pytest
from blake3 import blake3

from runtime.adapter_format import mix
from runtime.adapter_format.canonical import canonical_from_tensors, read_canonical
from runtime.adapter_format.errors import InvalidAdapter
from runtime.adapter_format.mix import Part, compose
from runtime.adapter_format.weight_dtypes import HELD, widened
from tests.runtime.adapter_format.adapter_files import CONFIG, MODEL, SHAPES, Q, V, canonical_bytes, lora, write

EMBED, DOWN = "model.embed_tokens", "model.layers.1.mlp.down_proj"


def bfloat16(array):
    return (array.view(np.uint32) >> 16).astype(np.uint16)


def made(directory, name, tensors, weight, **config):
    """A part from the canonical file of some tensors."""
    config = CONFIG | {"target_modules": ".*"} | config
    return Part(write(directory, canonical_bytes(tensors, config)[1], name), weight)


def matrices(path):
    """The configuration of a canonical file, and its tensors as float64."""
    config, header, offset = read_canonical(path)
    data = np.frombuffer(path.read_bytes(), np.uint8)[offset:]
    found = {}
    for name, entry in header.tensors.items():
        held = data[entry.start : entry.stop].view(HELD[entry.dtype])
        found[name] = widened(held, entry.dtype).reshape(entry.shape).astype(np.float64)
    return config, header, found


def deltas(path):
    """What a canonical file adds to each module's weight, (out, in)."""
    config, _, found = matrices(path)
    result = {}
    for module, scale in config.scales.items():
        a, b = ("lora_embedding_A", "lora_embedding_B") if module == EMBED else ("lora_A.weight", "lora_B.weight")
        result[module] = scale * found[f"{module}.{b}"] @ found[f"{module}.{a}"]
    return result


def test_a_mix_is_the_sum_of_the_weighted_deltas_in_every_module(tmp_path, monkeypatch):
    """Different ranks, scales, dtypes and modules; pieces so small that every matrix takes several."""
    monkeypatch.setattr(mix, "CHUNK_BYTES", 1024)
    half = {name: tensor.astype(np.float16) for name, tensor in lora(Q, DOWN, EMBED, rank=3, seed=2).items()}
    short = {name: bfloat16(tensor) for name, tensor in lora(V, EMBED, rank=5, seed=3).items()}
    parts = [
        made(tmp_path, "first", lora(Q, V, seed=1), 0.7),
        made(tmp_path, "second", half, -1.3, r=3, lora_alpha=5),
        made(tmp_path, "third", short, 2.0, r=5, use_rslora=True),
    ]
    found = compose(parts, tmp_path / "mix", max_rank=64)
    config, header, tensors = matrices(tmp_path / "mix")
    assert found.digest == blake3((tmp_path / "mix").read_bytes()).hexdigest()
    assert found.bytes == (tmp_path / "mix").stat().st_size
    assert found.rank == 9  # 4 + 5 of V, 3 + 5 of the embedding
    assert config.scales == dict.fromkeys((Q, V, DOWN, EMBED), 1.0)
    assert {entry.dtype for entry in header.tensors.values()} == {"F32"}
    ranks = {Q: 7, V: 9, DOWN: 3}
    for module, rank in ranks.items():
        inputs, outputs = SHAPES[module]
        assert tensors[f"{module}.lora_A.weight"].shape == (rank, inputs)
        assert tensors[f"{module}.lora_B.weight"].shape == (outputs, rank)
    expected = dict.fromkeys(config.scales, 0.0)
    for part in parts:
        for module, delta in deltas(part.path).items():
            expected[module] = expected[module] + part.weight * delta
    for module, delta in deltas(tmp_path / "mix").items():
        np.testing.assert_allclose(delta, expected[module], rtol=1e-5, atol=1e-6)
        assert np.abs(delta).max() > 1


def test_a_b_is_rounded_once_and_an_a_not_at_all(tmp_path):
    weights = lora(Q)
    part = made(tmp_path, "part", weights, -0.3, r=4, lora_alpha=3)
    compose([part], tmp_path / "mix", max_rank=64)
    _, _, tensors = matrices(tmp_path / "mix")
    prefix = f"base_model.model.{Q}"
    assert (tensors[f"{Q}.lora_A.weight"] == weights[f"{prefix}.lora_A.weight"]).all()
    exact = weights[f"{prefix}.lora_B.weight"].astype(np.float64) * (-0.3 * 0.75)
    assert (tensors[f"{Q}.lora_B.weight"] == exact.astype(np.float32)).all()


def test_biases_are_added_up(tmp_path):
    bias = np.linspace(-1, 1, SHAPES[Q][1], dtype=np.float32)
    biased = {**lora(Q), f"base_model.model.{Q}.lora_B.bias": bias}
    parts = [
        made(tmp_path, "first", biased, 0.5, lora_bias=True),
        made(tmp_path, "second", lora(Q, seed=1), 0.25),
        made(tmp_path, "third", biased, -3.0, lora_bias=True, lora_alpha=4),
    ]
    compose(parts, tmp_path / "mix", max_rank=64)
    _, _, tensors = matrices(tmp_path / "mix")
    np.testing.assert_allclose(tensors[f"{Q}.lora_B.bias"], (0.5 * 2 - 3.0) * bias.astype(np.float64), rtol=1e-6)


def test_an_upload_of_the_same_sum_has_the_same_digest(tmp_path):
    """So whatever reads canonical files reads this one."""
    first, second = lora(Q, seed=1), lora(Q, seed=2)
    parts = [made(tmp_path, "first", first, 0.5), made(tmp_path, "second", second, -0.5)]
    found = compose(parts, tmp_path / "mix", max_rank=64)
    a, b = (f"base_model.model.{Q}.lora_{letter}.weight" for letter in "AB")
    tensors = {a: np.concatenate([first[a], second[a]]), b: np.concatenate([first[b], -second[b]], axis=1)}
    digest, _ = canonical_from_tensors(tensors, CONFIG | {"r": 8, "target_modules": ["q_proj"]}, MODEL, max_rank=64)
    assert found.digest == digest


def test_an_alora_invocation_is_that_of_all_parts(tmp_path):
    parts = [
        made(tmp_path, name, lora(seed=seed), 0.5, alora_invocation_tokens=[5, 6]) for seed, name in enumerate("ab")
    ]
    compose(parts, tmp_path / "mix", max_rank=64)
    assert read_canonical(tmp_path / "mix")[0].alora_invocation_tokens == (5, 6)


OTHERS = {"a plain LoRA": {}, "another invocation": {"alora_invocation_tokens": [5]}}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_parts_that_begin_at_different_places_are_refused(tmp_path, other):
    parts = [
        made(tmp_path, "a", lora(), 1.0, alora_invocation_tokens=[5, 6]),
        made(tmp_path, "b", lora(), 1.0, **other),
    ]
    with pytest.raises(InvalidAdapter, match="alora_invocation_tokens: differs"):
        compose(parts, tmp_path / "mix", max_rank=64)
    assert not (tmp_path / "mix").exists()


def test_ranks_that_add_up_to_too_many_are_refused_with_both_numbers(tmp_path):
    parts = [made(tmp_path, "a", lora(Q, V), 1.0), made(tmp_path, "b", lora(V, rank=5), 1.0, r=5)]
    assert compose(parts, tmp_path / "fits", max_rank=9).rank == 9
    with pytest.raises(
        InvalidAdapter, match=r"has rank 9 in the mix, and max_lora_rank is 8; .* --max-lora-rank 9"
    ) as found:
        compose(parts, tmp_path / "mix", max_rank=8)
    assert found.value.field == V
    assert not (tmp_path / "mix").exists()


@pytest.mark.parametrize("weight", [3e38, -1e300, 1e308])
def test_a_weight_that_makes_infinities_is_refused(tmp_path, weight):
    with pytest.raises(InvalidAdapter, match=r"lora_B.weight: overflows float32"):
        compose([made(tmp_path, "a", lora(), weight)], tmp_path / "mix", max_rank=64)
    assert not (tmp_path / "mix").exists()


def test_a_part_that_is_cut_short_is_refused(tmp_path):
    part = made(tmp_path, "a", lora(), 0.5)
    part.path.write_bytes(part.path.read_bytes()[:-4])
    with pytest.raises(InvalidAdapter, match="is truncated"):
        compose([part], tmp_path / "mix", max_rank=64)
