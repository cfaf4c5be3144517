"""The norm after an expand against its twin, which composes both, and against two launches of our own."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton")

from kernels.lora_tiles import BASE
from kernels.offset_table import PartEntry, SiteEntry, table_rows
from kernels.reference import rms_norm as reference
from kernels.rms_norm import EXPAND_CANDIDATES, ExpandNormConfig, expand_add_rms_norm
from tools import expand_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of a sum of y and up to 33 products, relative to the largest; Triton's interpreter cuts bfloat16 off
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2**-7 if DEVICE == "cuda" else 2**-5}
RANKS = (1, 4, 16, 3, 33)


def problem(width: int, slots: list[int], splits: int, dtype: torch.dtype) -> tuple:
    """Adapters of all ranks; the second site of three is theirs. Every third has gains, every second a bias."""
    generator = torch.Generator().manual_seed(width)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    aligned = -(-width // 16) * 16
    table, end = [], 16
    for index, rank in enumerate(RANKS):
        bias, gain = (end + rank * aligned, end + (rank + 1) * aligned)
        part = PartEntry(rank, end, bias if index % 2 else None, None if index % 3 else gain)
        table.append(table_rows([None, SiteEntry(0, [part]), None], 40))
        end = gain + aligned
    rows = len(slots)
    return (
        random(rows, width),
        random(rows, 2 * width)[:, :width],
        random(rows, splits + 1, 40, dtype=torch.float32)[:, :splits],
        torch.tensor(slots, dtype=torch.int32, device=DEVICE),
        1,
        random(end),
        torch.stack(table).to(DEVICE),
        0.5,
        random(width, dtype=torch.float32) * width**0.5,
        torch.tensor(0.1, device=DEVICE),
    )


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("config", [EXPAND_CANDIDATES[0], ExpandNormConfig(2, 8), ExpandNormConfig(16, 8)])
@pytest.mark.parametrize("slots", [[BASE], [4], [0, 0, 1, BASE, 2, 3, 4, BASE]], ids=str)
@pytest.mark.parametrize(("width", "splits"), [(1, 1), (48, 3), (577, 1)])
def test_it_is_the_expand_and_then_the_norm_of_the_sum(
    width: int, splits: int, slots: list[int], config: ExpandNormConfig, dtype: torch.dtype
) -> None:
    ours, twins = problem(width, slots, splits, dtype), problem(width, slots, splits, dtype)
    before = ours[1].clone()
    out, expected = expand_add_rms_norm(*ours, config=config), reference.expand_add_rms_norm(*twins)
    assert torch.equal(ours[1], before)
    for actual, exact in ((ours[0], twins[0]), (out, expected)):
        assert actual.dtype == dtype
        bound = TOLERANCE[dtype] * (exact.double().abs() + exact.double().abs().amax(1, keepdim=True))
        assert ((actual.double() - exact.double()).abs() <= bound).all()


def test_rows_without_an_adapter_are_normed_to_the_bit_as_without_any() -> None:
    from kernels.rms_norm import RmsNormConfig, add_rms_norm

    arguments, others = (problem(128, [BASE] * 3, 1, torch.float32) for _ in range(2))
    out = expand_add_rms_norm(*arguments)
    alone = add_rms_norm(others[0], others[1], *others[-3:], RmsNormConfig(128, 8))
    assert torch.equal(arguments[0], others[0])
    torch.testing.assert_close(out, alone, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("rows", "adapters", "rank"), [(1, 1, 16), (8, 2, 4), (40, 2, 3)])
def test_both_ways_that_the_tool_times_compute_the_same(rows: int, adapters: int, rank: int) -> None:
    made = expand_norm.Problem.of(rows, adapters, rank, sites=2, width=64, device=DEVICE)
    made = made._replace(residual=made.residual.float(), y=made.y.float(), arena=made.arena.float())
    copy = made._replace(residual=made.residual.clone(), y=made.y.clone())
    for site in range(2):
        torch.testing.assert_close(made.together(site), copy.apart(site), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(made.residual, copy.residual, rtol=1e-5, atol=1e-4)
        copy.y.copy_(made.y)


@pytest.mark.skipif(DEVICE == "cuda", reason="a CUDA device is there")
def test_without_a_gpu_the_tool_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert expand_norm.main() == 1
    assert "no CUDA device" in capsys.readouterr().err
