"""The offset table on the device: kernels find an adapter's weights through its slot, and slots are reused in order."""

import pytest
import torch

from kernels.cpu.grouped_lora import Run, embedding_lora, grouped_lora
from kernels.lora_tiles import Tiles
from kernels.reference import grouped_lora as reference
from runtime.adapter_format.canonical import read_canonical
from runtime.adapters.layout import layout_adapter
from runtime.gpu.adapter_table import AdapterTable
from tests.runtime.adapter_format.adapter_files import MODEL, SHAPES, Q, V, adapter, canonical_bytes, lora

MLP = "model.layers.1.mlp."
EVERYTHING = sorted(SHAPES)
WIDTH = 48


def layout_of(content):
    config, header, _ = read_canonical(memoryview(content))
    return layout_adapter(MODEL, config, header)


def some(*modules, rank=4, bias=False):
    """The layout of an adapter of some modules."""
    tensors = lora(*modules, rank=rank)
    if bias:
        for module in modules:
            tensors[f"base_model.model.{module}.lora_B.bias"] = torch.randn(SHAPES[module][1]).numpy()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ".*", "lora_bias": bias}
    return layout_of(canonical_bytes(tensors, config)[1])


def table(slots=2, width=WIDTH):
    return AdapterTable(MODEL.sites(), slots, width, torch.device("cpu"))


def slot_of(made, digest, layout, first):
    return made.row_of(digest, layout, first).slot


LAYOUTS = {
    "attention": some(Q, V),
    "everything": some(*EVERYTHING, rank=5),
    "biased, the second of two parts": some(f"{MLP}up_proj", f"{MLP}down_proj", V, rank=7, bias=True),
}


@pytest.mark.parametrize("first", [0, 64, 64 * 1000])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_kernels_find_the_weights_of_every_site_through_a_slot(layout, first):
    """The products through the table, beside those of the CPU path on views of the same extent."""
    generator = torch.Generator().manual_seed(first)
    arena = torch.randn(first + layout.elements + 64, generator=generator)
    made = table()
    run = Run(0, 3, layout.views(arena[first:]))
    tiles = Tiles(torch.tensor([[0, 3, slot_of(made, "digest", layout, first), 0]], dtype=torch.int32), 16)
    adapted = 0
    for number, site in enumerate(MODEL.sites()):
        widths = [part.out_features for part in site.parts]
        y = torch.randn(3, sum(widths), generator=generator)
        expected, between = y.clone(), torch.empty(3, 1, WIDTH)
        if number == MODEL.embed_site:
            inputs = torch.randint(site.in_features, (3,), generator=generator)
            embedding_lora(expected, inputs, number, [run])
            t = reference.embedding_shrink(inputs, number, arena, made.rows, tiles, between)
        else:
            inputs = torch.randn(3, site.in_features, generator=generator)
            grouped_lora(expected, inputs, number, [run])
            t = reference.shrink(inputs, number, arena, made.rows, tiles, between)
        reference.expand(t, y, number, arena, made.rows, tiles, widths)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        adapted += run.sites[number] is not None
    assert adapted == sum(site is not None for site in layout.sites) > 0


def test_an_adapter_keeps_its_slot_and_the_one_not_used_for_longest_is_written_anew():
    made = table(slots=2)
    layout = LAYOUTS["attention"]
    a, b = slot_of(made, "a", layout, 0), slot_of(made, "b", layout, 64)
    assert {a, b} == {0, 1}
    assert slot_of(made, "a", layout, 0) == a
    kept = made.rows[a].clone()
    assert slot_of(made, "c", layout, 128) == b
    assert torch.equal(made.rows[a], kept)
    assert slot_of(made, "b", layout, 64) == a, "c was used since"
    assert slot_of(made, "c", layout, 128) == b


def test_more_adapters_than_slots_take_turns_each_with_a_row_of_its_own():
    made = table(slots=3)
    names = list(LAYOUTS)
    for turn in range(20):
        used = {}
        for index in range(turn, turn + 3):
            name, first = names[index % 3], 64 * (index % 5)
            used[slot_of(made, name, LAYOUTS[name], first)] = name, first
        assert len(used) == 3, "no step's adapters share a slot"
        for slot, (name, first) in used.items():
            fresh = table()
            assert torch.equal(made.rows[slot], fresh.rows[slot_of(fresh, name, LAYOUTS[name], first)])


def test_at_another_place_an_adapter_gets_another_row():
    made = table()
    layout = LAYOUTS["everything"]
    here, there = slot_of(made, "a", layout, 0), slot_of(made, "a", layout, 64)
    assert here != there
    moved = made.rows[there] - made.rows[here]
    assert set(moved.unique().tolist()) == {0, 64}
    assert slot_of(made, "a", layout, 0) == here


def refused(made):
    with pytest.raises(AssertionError, match="not aligned"):
        slot_of(made, "crooked", LAYOUTS["attention"], 8)
    with pytest.raises(AssertionError, match="a site has 24 ranks, and there is room for 12"):
        slot_of(made, "wide", some(Q, f"{Q[:-6]}k_proj", f"{Q[:-6]}v_proj", rank=8), 0)


def test_what_is_not_aligned_or_too_wide_is_refused_and_takes_no_slot():
    made = table(slots=3, width=12)
    layout = LAYOUTS["attention"]
    refused(made)
    slots = [slot_of(made, name, layout, 0) for name in "abc"]
    refused(made)
    assert [slot_of(made, name, layout, 0) for name in "abc"] == slots
    assert len({slot_of(made, name, layout, 0) for name in "def"}) == 3


def test_a_row_says_which_sites_are_adapted_and_the_ranks_of_the_widest():
    rows = {name: table().row_of(name, layout, 0) for name, layout in LAYOUTS.items()}
    assert rows["attention"].ranks == 4
    assert rows["everything"].ranks == 15
    assert rows["everything"].sites == set(range(len(MODEL.sites())))
    assert MODEL.embed_site not in rows["attention"].sites
    assert table().row_of("r3", layout_of(adapter(rank=3)[1]), 0).ranks == 3
