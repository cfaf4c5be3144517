"""The base's matrices in panels: in their dtype, as a checkpoint holds them quantised, or quantised here."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.cpu.compiled import panels
from kernels.cpu.compiled.panels import FLOAT8, GROUP, INT4, INT8, PanelMemory, Panels, pack, pack_codes, quantize
from runtime.config import Quantization
from runtime.models.layers import Linear
from runtime.quantization.weight import QuantizedWeight

NAMES = ("float32", "bfloat16", "float16", "int8", "int4", "nf4", "float8")  # by the numbers of panels.h
LEAST_GROUP = 16  # with smaller ones, scales would need more memory than weights of four bits


class _Kind(NamedTuple):
    """How a quantised weight lies in panels."""

    type: int
    group: int


MADE = {"int8": _Kind(INT8, GROUP), "int4": _Kind(INT4, 64), "nf4": _Kind(panels.NF4, 64)}  # 64: as QLoRA's nf4


class WeightPanels:
    """Lays matrices out one after another, and counts how they are held.

    What a checkpoint holds quantised stays so where there are panels for it; otherwise it is dequantised to `dtype`.
    What is in floats then is quantised as `quantization` says: the projections of layers to it, embedding and head to
    int8 at least, because errors there reach every token. Routers of experts are never quantised.
    """

    def __init__(self, quantization: Quantization | None, dtype: torch.dtype, threads: int = 1) -> None:
        self._quantization, self._dtype, self._threads = quantization, dtype, threads
        self._memory = PanelMemory()
        self._held: Counter[str] = Counter()  # weights by what they are held in

    @property
    def description(self) -> str:
        """What most weights are held in first."""
        return ", ".join(name for name, _ in self._held.most_common())

    def embedding(self, weight: Tensor) -> Panels:
        return self._made(weight, None if self._quantization is None else "int8")

    def head(self, linear: Linear) -> Panels:
        if not linear.quantized:
            return self.embedding(linear.weight)
        if _can_keep(linear.quantized):
            return self._kept(linear.quantized)[0]
        return self.embedding(linear.quantized[0].dequantized().to(self._dtype))

    def router(self, linear: Linear) -> Panels:
        """Of experts, or a shared one's gate, in its dtype: it is small, and an error there changes much."""
        weight = linear.quantized[0].dequantized().to(self._dtype) if linear.quantized else linear.weight
        return self._made(weight, None)

    def projection(self, linear: Linear, widths: Sequence[int]) -> list[Panels]:
        """The parts of a site, which all lie in one kind of panels."""
        if not linear.quantized:
            return [self._made(part, self._quantization) for part in torch.split(linear.weight, list(widths))]
        parts = linear.quantized
        if len(parts) < len(widths):  # one module of the checkpoint is gate and up
            [fused] = parts
            parts = fused.split(widths)
        if _can_keep(parts):
            return self._kept(parts)
        return [self._made(part.dequantized().to(self._dtype), self._quantization) for part in parts]

    def _kept(self, parts: Sequence[QuantizedWeight]) -> list[Panels]:
        order = parts[0].order()
        return [self._counted(_packed(part, order, self._memory, self._threads)) for part in parts]

    def _made(self, weight: Tensor, quantization: Quantization | None) -> Panels:
        if quantization is None:
            return self._counted(pack(weight, self._memory, self._threads))
        return self._counted(quantize(weight, self._memory, *MADE[quantization], self._threads))

    def _counted(self, made: Panels) -> Panels:
        self._held[NAMES[made.type]] += made.columns * made.k
        return made


def _can_keep(parts: Sequence[QuantizedWeight]) -> bool:
    """Whether there is one kind of panels for all parts of a site, which meet the same numbers of a row."""
    kinds, first = {_kind_of(part) for part in parts}, parts[0]
    return len(kinds) == 1 and None not in kinds and all(part.has_order_of(first) for part in parts)


def _kind_of(weight: QuantizedWeight) -> _Kind | None:
    """How the weight lies in panels; None if there are none for it."""
    inputs = weight.codes.shape[1]
    group = GROUP if weight.group % GROUP == 0 or weight.group >= inputs else weight.group
    if GROUP % group or group < LEAST_GROUP:
        return None
    if not weight.has_full_groups():
        return None
    match weight.kind:
        case "nf4":
            return _Kind(panels.NF4, group)
        case "float8":
            return None if weight.has_nan() else _Kind(FLOAT8, group)
        case "int4":
            return _Kind(INT4, group)
        case "int8" if weight.zeros is None:
            return _Kind(INT8, group)
    return None


def _packed(weight: QuantizedWeight, order: Tensor | None, memory: PanelMemory, threads: int) -> Panels:
    kind = _kind_of(weight)
    assert kind is not None
    codes, scales, zeros = weight.codes, weight.scales, weight.zeros
    inputs = codes.shape[1]
    if order is not None:
        codes, order = codes[:, order], order.int()
    # A scale of more inputs than the kernels' largest group is repeated
    groups = torch.arange(0, inputs, kind.group) // weight.group
    scales = scales[:, groups]
    if kind.type == INT4:
        half = 1 << 3
        zeros = torch.zeros_like(scales) if zeros is None else zeros[:, groups]
        codes, zeros = codes + half, (zeros + half).to(torch.int8)
        return pack_codes(INT4, codes, scales, zeros, kind.group, memory, order, threads)
    return pack_codes(kind.type, codes, scales, None, kind.group, memory, order, threads)
