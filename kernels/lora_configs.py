"""How the grouped LoRA kernels are cut up: the defaults, and what a tuner may choose from."""

from itertools import product
from typing import NamedTuple


class ShrinkConfig(NamedTuple):
    """`split_k` programs share the sum over the inputs; each leaves its own, and the expand adds them up."""

    block_r: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int


class ExpandConfig(NamedTuple):
    """`block_r` ranks are multiplied at a time; a program computes `block_n` columns."""

    block_n: int
    block_r: int
    num_warps: int
    num_stages: int


class Candidates(NamedTuple):
    """What may be chosen for a kind of batch; all of them are right for every shape."""

    heights: tuple[int, ...]  # rows a tile
    shrink: tuple[ShrinkConfig, ...]
    expand: tuple[ExpandConfig, ...]


def _shrinks(*choices: tuple[int, ...]) -> tuple[ShrinkConfig, ...]:
    return tuple(ShrinkConfig(*choice) for choice in product(*choices))


def _expands(*choices: tuple[int, ...]) -> tuple[ExpandConfig, ...]:
    return tuple(ExpandConfig(*choice) for choice in product(*choices))


# Few rows: weights are read once, and what counts is how many programs read them at the same time.
DECODE = Candidates(
    heights=(16,),
    shrink=_shrinks((16, 32, 64), (64, 128, 256), (1, 4, 16), (2, 4), (2, 4)),
    expand=_expands((32, 64, 128), (16, 32, 64), (2, 4), (1, 2)),
)
# Many rows: x and y are what is read, and should be read once.
PREFILL = Candidates(
    heights=(32, 64, 128),
    shrink=_shrinks((16, 32, 64), (32, 64, 128), (1, 2, 4), (4, 8), (2, 3)),
    expand=_expands((64, 128), (16, 32), (4, 8), (1, 2)),
)

# Not measured: middle choices, to be replaced by a tuner's.
DECODE_SHRINK = ShrinkConfig(block_r=16, block_k=128, split_k=4, num_warps=4, num_stages=4)
DECODE_EXPAND = ExpandConfig(block_n=64, block_r=16, num_warps=4, num_stages=2)
PREFILL_SHRINK = ShrinkConfig(block_r=32, block_k=64, split_k=1, num_warps=4, num_stages=3)
PREFILL_EXPAND = ExpandConfig(block_n=128, block_r=16, num_warps=4, num_stages=2)
