"""The expand of products that lie side by side, those of all hot adapters, against the expand of each row's own."""

from types import ModuleType

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from kernels import grouped_lora
from kernels.grouped_lora import DECODE_EXPAND
from kernels.lora_tiles import BASE
from kernels.reference import grouped_lora as reference
from tests.kernels.test_grouped_lora import ADAPTERS, DEVICE, SITE, load, random_adapter, random_rows, scratch, tiles_of

SLOTS = [0, 0, 3, 1, BASE, 2, 4, 4, 8, 5]
PLACES = [3, 0, 5, 7, 1, 2, 0, 0, 6]  # by slot
RANKS = 64


@pytest.mark.parametrize("module", [grouped_lora, reference], ids=["kernel", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_reads_the_columns_of_its_own_adapter(module: ModuleType, dtype: torch.dtype) -> None:
    inputs, widths = 48, (96, 32, 32)
    memory = load([random_adapter(seed, inputs, widths, dtype) for seed in range(ADAPTERS)], dtype)
    tiles, x = tiles_of(SLOTS), random_rows(len(SLOTS), inputs, dtype, 1)
    between = scratch(len(SLOTS), memory, splits=1)
    own = reference.shrink(x, SITE, memory.arena, memory.table, tiles, between).to(dtype)
    many = torch.full((len(SLOTS), 1, 8 * RANKS), torch.nan, dtype=dtype, device=DEVICE)
    for row, slot in enumerate(SLOTS):
        many[row, 0, PLACES[slot] * RANKS :][:RANKS] = own[row, 0]
    y = random_rows(len(SLOTS), sum(widths) + 16, dtype, 2)[:, : sum(widths)]
    expected, hots = y.clone(), torch.tensor(PLACES, dtype=torch.int32, device=DEVICE)
    config = [DECODE_EXPAND] if module is grouped_lora else []
    rest = SITE, memory.arena, memory.table, tiles, widths, *config
    module.expand(own.float(), expected, *rest)
    module.expand(many, y, *rest, hots=hots, hot_ranks=RANKS)
    assert torch.equal(y, expected)
