"""MXFP4: blocks of 32 numbers of four bits (e2m1), each block with a power of two as its scale."""

import torch
from torch import Tensor

from runtime.quantization.weight import QuantizedWeight

BLOCK = 32
# What a code's lower three bits are, doubled, so that all are integers; the fourth bit is the sign
DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12)

HALVED = torch.tensor([2.0 ** (code - 127 - 1) for code in range(256)])  # by the scale's code


def from_mxfp4(blocks: Tensor, scales: Tensor) -> QuantizedWeight:
    """Return the same weight, to the bit, in integers of 8 bits.

    `blocks` is (out, in / 32, 16) uint8, of two codes each, the lower one first; `scales` (out, in / 32) uint8.
    """
    book = torch.tensor([*DOUBLED, *(-value for value in DOUBLED)], dtype=torch.int8)
    packed = blocks.to("cpu").flatten(1).int()
    codes = torch.stack((book[packed & 15], book[packed >> 4]), -1).flatten(1)
    return QuantizedWeight(codes=codes, bits=8, scales=HALVED[scales.to("cpu").int()], group=BLOCK)
