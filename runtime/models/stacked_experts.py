"""The tensors of a checkpoint that hold a projection of all experts of a layer."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.models.experts import ExpertsConfig
from runtime.quantization.mxfp4 import BLOCK, from_mxfp4
from runtime.quantization.weight import QuantizedWeight

BLOCKS, SCALES, BIAS = "_blocks", "_scales", "_bias"
Shapes = dict[str, tuple[int, ...]]


class Projection(NamedTuple):
    """One expert's gate and up, one below the other, or its down."""

    weight: Tensor | list[QuantizedWeight]  # (out, in), or the quantised gate and up
    bias: Tensor | None


def stacked_shapes(experts: ExpertsConfig, layer: int, hidden: int) -> Shapes:
    """Return the shapes of a layer's tensors, by name; none if each projection of the experts is a module."""
    stacked, inner, count = experts.names.stacked, experts.intermediate_size, experts.count
    if stacked is None:
        return {}
    shapes: Shapes = {}
    for name, out, size in ((stacked.gate_up, 2 * inner, hidden), (stacked.down, hidden, inner)):
        own = _name(experts, layer, name)
        if experts.mxfp4:
            shapes |= {own + BLOCKS: (count, out, size // BLOCK, BLOCK // 2), own + SCALES: (count, out, size // BLOCK)}
        else:
            shapes[own] = (count, size, out) if stacked.alternating else (count, out, size)
        if stacked.alternating:
            shapes[own + BIAS] = (count, out)
    return shapes


def read_stacked(
    experts: ExpertsConfig, layer: int, read: Callable[[str], Tensor], *, keep_quantized: bool
) -> Iterator[tuple[Projection, Projection]]:
    """Yield the gate_up and the down of each expert of a layer, each tensor read once."""
    stacked = experts.names.stacked
    assert stacked is not None
    gate_up, down = (_Stack(experts, _name(experts, layer, name), read) for name in (stacked.gate_up, stacked.down))
    for expert in range(experts.count):
        yield gate_up.of(expert, 2, keep_quantized), down.of(expert, 1, keep_quantized)


def _name(experts: ExpertsConfig, layer: int, name: str) -> str:
    return f"model.layers.{layer}.{experts.names.block}.{name}"


class _Stack:
    """One projection of all experts, as it is stored."""

    def __init__(self, experts: ExpertsConfig, name: str, read: Callable[[str], Tensor]) -> None:
        self._experts = experts
        self._weight = None if experts.mxfp4 else read(name)
        self._packed = (read(name + BLOCKS), read(name + SCALES)) if experts.mxfp4 else None
        self._bias = read(name + BIAS) if experts.alternates else None

    def of(self, expert: int, parts: int, keep_quantized: bool) -> Projection:
        """An expert's projection of so many modules."""
        bias = None if self._bias is None else self._in_order(self._bias[expert], parts)
        if self._packed is not None:
            blocks, scales = (self._in_order(packed[expert], parts) for packed in self._packed)
            quantized = from_mxfp4(blocks, scales)
            if keep_quantized:
                return Projection(quantized.split([len(blocks) // parts] * parts), bias)
            return Projection(quantized.dequantized(), bias)
        assert self._weight is not None
        weight = self._weight[expert]
        return Projection(self._in_order(weight.T, parts) if self._experts.alternates else weight, bias)

    def _in_order(self, outputs: Tensor, parts: int) -> Tensor:
        """Put the outputs of the gate before those of up."""
        return torch.cat([outputs[part::parts] for part in range(parts)]) if parts > 1 else outputs
