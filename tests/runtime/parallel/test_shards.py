"""Which part of a model each rank holds: parts of equal sizes that are the whole one together."""

import msgspec
import pytest
import torch

from runtime.models.config import ModelConfig
from runtime.models.shards import Shard, Span, TensorCut
from runtime.parallel.group import RankGroup
from tests.runtime.models.families import FAMILIES, write_checkpoint
from tests.runtime.tiny_model import TINY


def shards(model, size):
    return [Shard(model, RankGroup(rank, size)) for rank in range(size)]


def tiny(directory, **fields):
    (directory / "config.json").write_bytes(msgspec.json.encode(TINY | fields))
    return ModelConfig.from_directory(directory)


@pytest.mark.parametrize(
    ("size", "heads", "parts"),
    [
        (2, (6, 2), [((0, 6), (0, 2)), ((6, 9), (2, 3))]),
        (3, (3, 1), [((0, 3), (0, 1)), ((3, 6), (1, 2)), ((6, 9), (2, 3))]),
        (4, (3, 1), [((0, 3), (0, 1)), ((3, 6), (1, 2)), ((6, 9), (2, 3)), ((9, 9), (3, 3))]),
        (
            6,
            (2, 1),
            [
                ((0, 2), (0, 1)),
                ((2, 3), (0, 1)),
                ((3, 5), (1, 2)),
                ((5, 6), (1, 2)),
                ((6, 8), (2, 3)),
                ((8, 9), (2, 3)),
            ],
        ),
    ],
)
def test_nine_heads_of_three_groups_are_padded_with_heads_of_zeros(tmp_path, size, heads, parts):
    """As SmolLM2-135M has them."""
    model = tiny(tmp_path, num_attention_heads=9, num_key_value_heads=3, hidden_size=72, intermediate_size=96)
    for shard, (q, kv) in zip(shards(model, size), parts, strict=True):
        assert (shard.model.num_heads, shard.model.num_kv_heads) == heads
        spans = shard.module("model.layers.0.self_attn.q_proj").outputs
        assert spans == (Span(*q, heads[0]).times(8),)
        assert shard.module("model.layers.0.self_attn.k_proj").outputs == (Span(*kv, heads[1]).times(8),)
        assert shard.module("model.layers.0.self_attn.o_proj").inputs == Span(*q, heads[0]).times(8)
    assert shards(model, 2)[0].padding == "12 query heads for 9, 4 K/V heads for 3"
    assert shards(model, 3)[0].padding == ""


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_parts_of_every_module_are_all_of_it_once(tmp_path_factory, name, size):
    model = _models(tmp_path_factory)[name]
    parts = shards(model, size)
    copies = max(size // model.num_kv_heads, 1)
    for index, site in enumerate(model.sites()):
        own = [shard.model.sites()[index] for shard in parts]
        assert len({(each.in_features, each.parts) for each in own}) == 1, "parts have one size"
        first = 0
        for module, width in site.parts:
            cuts = [shard.module(module) for shard in parts]
            if cuts[0].inputs is not None:
                assert own[0].in_features == cuts[0].inputs.width
                places = sorted(place for cut in cuts for place in range(*cut.inputs[:2]))
                assert places == list(range(site.in_features))
            elif cuts[0].outputs is not None:
                places = sorted(place for cut in cuts for span in cut.outputs for place in range(*span[:2]))
                once, again = set(places), len(places) - len(set(places))
                assert once == set(range(width))
                assert again == 0 or (copies > 1 and again <= (copies - 1) * width)
            first += width


_FOUND: dict[str, ModelConfig] = {}


def _models(factory):
    for name in FAMILIES if not _FOUND else ():
        directory = factory.mktemp("model")
        write_checkpoint(name, directory)
        _FOUND[name] = ModelConfig.from_directory(directory)
    return _FOUND


def test_a_cut_of_two_spans_leaves_zeros_behind_each():
    cut = TensorCut((Span(1, 2, 2), Span(4, 4, 1)), dim=1)
    whole = torch.arange(12.0).view(2, 6)
    assert cut.shape((2, 6)) == (2, 3)
    part = torch.zeros(2, 3)
    for source, target in cut.moves():
        part[target] = whole[source]
    assert part.tolist() == [[1, 0, 0], [7, 0, 0]]


def test_experts_in_blocks_are_cut_between_blocks(tmp_path):
    """GPT-OSS's width is 90 blocks of 32 numbers, which four ranks have 23 each of."""
    write_checkpoint("gpt-oss-moe", tmp_path)
    model = ModelConfig.from_directory(tmp_path)
    experts = msgspec.structs.replace(model.experts, mxfp4=True, intermediate_size=2880)
    model = msgspec.structs.replace(model, experts=experts)
    parts = shards(model, 4)
    name = "model.layers.0.mlp.experts.down_proj"
    assert [shard.tensor(name + "_blocks").spans[0] for shard in parts] == [
        Span(0, 23, 23),
        Span(23, 46, 23),
        Span(46, 69, 23),
        Span(69, 90, 23),
    ]
    assert parts[3].tensor("model.layers.0.mlp.experts.gate_up_proj_scales") == TensorCut((Span(4416, 5760, 1472),), 1)
