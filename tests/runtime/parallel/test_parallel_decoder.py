"""The decoder on two and four ranks against transformers, for every family; what each rank holds and sends."""

import pytest
import torch

from runtime.models.config import ModelConfig
from runtime.models.decoder import Decoder
from runtime.models.shards import Shard
from runtime.models.weights import Mlp, open_checkpoint
from runtime.parallel.group import RankGroup
from tests.runtime.models.families import FAMILIES, write_checkpoint
from tests.runtime.models.paged_driver import PagedDriver
from tests.runtime.models.quantized_checkpoints import write_quantized
from tests.runtime.models.test_decoder import assert_close, expected, prompt
from tests.runtime.parallel.rank_threads import on_ranks

TOKENS = prompt(30)
BOUNDS = [(0, 21), (21, 22), (22, 30)]


def weights_of(model, directory, group):
    return open_checkpoint(
        model, directory, torch.float32, "safetensors", shard=Shard(model, group), pack=False
    ).weights()


def logits_on_ranks(directory, size):
    """Rank 0's logits of TOKENS, in three steps; what each rank has sent; its decoder."""
    model = ModelConfig.from_directory(directory)

    def compute(group):
        decoder = Decoder(Shard(model, group).model, weights_of(model, directory, group), group)
        driver = PagedDriver(decoder.config, decoder, torch.float32)
        found = [driver.step([(0, TOKENS[first:last], first)])[0] for first, last in BOUNDS]
        return torch.cat(found), group.bytes_sent, decoder

    return on_ranks(size, directory / f"store-{size}", compute)


@pytest.mark.parametrize("name", FAMILIES)
def test_two_and_four_ranks_give_the_logits_of_transformers(tmp_path, name):
    oracle = expected(write_checkpoint(name, tmp_path), TOKENS)
    model = ModelConfig.from_directory(tmp_path)
    for size in (2, 4):
        (logits, *_), *others = ranks = logits_on_ranks(tmp_path, size)
        assert_close(logits, oracle)
        assert logits.argmax(-1).tolist() == oracle.argmax(-1).tolist()
        # Two sums of hidden states a layer, in float32; and to rank 0 each rank's logits
        sums = 2 * model.num_layers * len(TOKENS) * model.hidden_size * 4
        if model.qk_norm == "projections":
            sums += model.num_layers * len(TOKENS) * 2 * 4
        share = len(TOKENS) * -(-model.vocab_size // size) * 4
        assert [sent for _, sent, _ in ranks] == [sums, *[sums + share for _ in others]]


def numbers(weights):
    """How many numbers each part of a model has: projections, the head, what all ranks have."""
    layers = 0
    for layer in weights.layers:
        linears = [layer.qkv, layer.o]
        if isinstance(layer.mlp, Mlp):
            linears += layer.mlp
        else:
            linears += [linear for each in layer.mlp.each for linear in each]
        layers += sum(linear.weight.numel() for linear in linears)
    return layers, weights.lm_head.weight.numel(), weights.embedding.numel()


@pytest.mark.parametrize(("name", "size"), [("llama", 2), ("glm4", 2), ("llama-multi-head", 3), ("gpt-oss-moe", 2)])
def test_each_rank_holds_its_share(tmp_path, name, size):
    write_checkpoint(name, tmp_path)
    model = ModelConfig.from_directory(tmp_path)
    layers, _, embedding = numbers(weights_of(model, tmp_path, RankGroup()))
    for rank in range(size):
        group = RankGroup(rank, size)
        assert Shard(model, group).padding == ""
        head = (-(-model.vocab_size // size) + 1) * model.hidden_size
        assert numbers(weights_of(model, tmp_path, group)) == (layers // size, head, embedding)


def test_only_a_ranks_part_is_read(tmp_path, monkeypatch):
    """Not even for a moment is there a whole matrix in memory: a rank's may be all that fits."""
    write_checkpoint("llama", tmp_path)
    model = ModelConfig.from_directory(tmp_path)
    read = []

    def part(stored, cut):
        tensor = original(stored, cut)
        read.append((stored.name, tensor.numel()))
        return tensor

    import runtime.models.stored_tensors as stored_tensors

    original = stored_tensors._Stored.part
    monkeypatch.setattr(stored_tensors._Stored, "part", part)
    monkeypatch.setattr(stored_tensors._Stored, "tensor", lambda stored: whole(stored))
    wholes = []

    def whole(stored):
        wholes.append(stored.name)
        return stored.file.get_tensor(stored.name)

    weights_of(model, tmp_path, RankGroup(1, 2))
    assert {name for name in wholes if "norm" not in name} == {"model.embed_tokens.weight"}
    sizes = dict(read)
    assert sizes["model.layers.0.self_attn.q_proj.weight"] == 3 * 16 * 60
    assert sizes["model.layers.2.mlp.down_proj.weight"] == 60 * 48


@pytest.mark.parametrize("kind", ["gptq-order", "nf4-nested", "fp8-block", "packed-zeros"])
def test_a_quantised_base_is_dequantised_and_cut(tmp_path, kind):
    oracle = expected(write_quantized(kind, tmp_path, "llama"), TOKENS)
    (logits, *_), *_ = logits_on_ranks(tmp_path, 2)
    assert_close(logits, oracle)
