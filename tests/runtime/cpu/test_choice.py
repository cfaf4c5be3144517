"""Which kernels a CPU gets, from the times of one projection."""

import pytest

from runtime.cpu.choice import Timing, faster

MILLISECOND = 1e-3


@pytest.mark.parametrize(
    ("compiled", "torch", "chosen"),
    [
        ((0.20, 6.6), (0.20, 1.1), "compiled"),  # matrix units, a small model: its steps outweigh its prompts
        ((2.0, 66.0), (2.0, 11.0), "torch"),  # and one with ten times the weights
        ((0.20, 6.6), (0.20, 6.5), "compiled"),
        ((2.0, 66.0), (1.9, 63.0), "compiled"),  # that is within what the clock varies
        ((2.0, 66.0), (9.0, 11.0), "compiled"),
    ],
)
def test_the_kernels_that_compute_a_request_sooner(
    compiled: tuple[float, float], torch: tuple[float, float], chosen: str
) -> None:
    ours, theirs = (Timing(row * MILLISECOND, prompt * MILLISECOND) for row, prompt in (compiled, torch))
    assert faster(ours, theirs) == chosen
