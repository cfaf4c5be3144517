"""Pairs of a row and an expert are sorted and cut into tiles, whatever the batch, in shapes that are known before."""

import pytest
import torch

from kernels.lora_tiles import BASE, Tiles, lay_tiles, most_tiles
from runtime.gpu.expert_sorting import row_slots, sort_by_expert

EXPERTS, CHOSEN, SLOTS = 6, 3, 4


def choices(rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.stack([torch.randperm(EXPERTS, generator=generator)[:CHOSEN] for _ in range(rows)])


@pytest.mark.parametrize("height", [4, 16])
@pytest.mark.parametrize("slots", [None, [BASE] * 5, [2], [BASE, 0, 0, 3, 3, 3, BASE, 1, 3] * 4])
def test_each_pair_is_in_one_tile_of_its_expert_and_its_adapter(slots: list[int] | None, height: int) -> None:
    rows = 7 if slots is None else len(slots)
    chosen, runs = choices(rows), min(rows * CHOSEN, EXPERTS * (SLOTS + 1))
    count = most_tiles(rows * CHOSEN, runs, height)
    order, tiles = sort_by_expert(chosen, None if slots is None else torch.tensor(slots), SLOTS, count, height)
    assert tiles.fields.shape == (count, 4)
    assert sorted(order.tolist()) == list(range(rows * CHOSEN))
    place = 0
    for first, size, slot, expert in tiles.fields.tolist():
        assert size <= height
        if size == 0:
            continue
        assert first == place
        for pair in order[first : first + size].tolist():
            row = pair // CHOSEN
            assert chosen.flatten()[pair] == expert
            assert (BASE if slots is None else slots[row]) == slot
        place += size
    assert place == rows * CHOSEN


def test_rows_have_the_slots_of_their_tiles() -> None:
    slots = torch.tensor([BASE, 2, 2, 2, 2, 2, 0, BASE, 1], dtype=torch.int32)
    fields = torch.zeros((6, 4), dtype=torch.int32)
    lay_tiles(slots.numpy(), 4, fields.numpy())
    assert row_slots(Tiles(fields, 4), len(slots)).tolist() == slots.tolist()
