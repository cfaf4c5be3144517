"""A quantised weight in memory, the same for every format that it was published in."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NEGATIVE = (-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036)
POSITIVE = (0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)
NF4 = torch.tensor([*NEGATIVE, 0.0, *POSITIVE])  # quantiles of the normal distribution, as bitsandbytes rounds them


class QuantizedWeight(NamedTuple):
    """W[o][i] = (value of codes[o][i] − zeros[o][g]) · scales[o][g], where g is the group of input i.

    A code is an integer of `bits` with a sign, an 8-bit float, or a place in `book`.
    """

    codes: Tensor  # (out, in) int8, float8_e4m3fn, or uint8 with a book
    bits: int  # of a code
    scales: Tensor  # (out, groups) float32
    group: int  # inputs with one scale; the last group may have fewer
    zeros: Tensor | None = None  # (out, groups) int16, of the same range as the codes; None: 0
    book: Tensor | None = None  # (16,) float32
    group_of_input: Tensor | None = None  # (in,) int64; None: groups are neighbours

    @property
    def kind(self) -> str:
        """What a code is: int8, float8, int4 (of four bits or fewer), nf4, or a place in another book."""
        if self.book is not None:
            return "nf4" if torch.equal(self.book, NF4) else "fp4"
        if self.codes.dtype == torch.float8_e4m3fn:
            return "float8"
        return "int4" if self.bits <= 4 else "int8"

    def has_nan(self) -> bool:
        """Whether a code of 8-bit floats is not a number."""
        return bool((self.codes.view(torch.uint8) & 127 == 127).any())

    def order(self) -> Tensor | None:
        """The inputs group by group, (in,) int64; None: groups are neighbours."""
        return None if self.group_of_input is None else torch.argsort(self.group_of_input, stable=True)

    def has_order_of(self, other: "QuantizedWeight") -> bool:
        one, two = self.group_of_input, other.group_of_input
        return one is two if one is None or two is None else torch.equal(one, two)

    def has_full_groups(self) -> bool:
        """Whether each group but the last has `group` inputs, so that they can be laid side by side."""
        if self.group_of_input is None:
            return True
        sizes = torch.bincount(self.group_of_input)
        return bool((sizes[:-1] == self.group).all()) and int(sizes[-1]) <= self.group

    def groups(self) -> Tensor:
        """The group of each input, (in,) int64."""
        if self.group_of_input is not None:
            return self.group_of_input
        return torch.arange(self.codes.shape[1]) // self.group

    def split(self, widths: Sequence[int]) -> list["QuantizedWeight"]:
        """The weights of neighbouring outputs, so many each."""
        sizes = list(widths)
        zeros = [None] * len(sizes) if self.zeros is None else torch.split(self.zeros, sizes)
        rows = zip(torch.split(self.codes, sizes), torch.split(self.scales, sizes), zeros, strict=True)
        return [self._replace(codes=codes, scales=scales, zeros=zero) for codes, scales, zero in rows]

    def dequantized(self) -> Tensor:
        """W in float32, (out, in)."""
        values = self.codes.float() if self.book is None else self.book[self.codes.int()]
        groups = self.groups()
        if self.zeros is not None:
            values -= self.zeros.float()[:, groups]
        return values.mul_(self.scales[:, groups])
