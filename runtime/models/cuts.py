"""A rank's part of a tensor, or of a quantised weight."""

from torch import Tensor

from runtime.models.shards import ModuleCut, Span, TensorCut
from runtime.quantization.weight import QuantizedWeight


def part_of(whole: Tensor, cut: TensorCut) -> Tensor:
    if cut.is_whole:
        return whole
    part = whole.new_zeros(cut.shape(tuple(whole.shape)))
    for source, target in cut.moves():
        part[target] = whole[source]
    return part


def quantized_part(weight: QuantizedWeight, cut: ModuleCut) -> QuantizedWeight | None:
    """The part of a weight as it is quantised; None where some rank's would begin among inputs that have one scale.

    All ranks have parts of one kind, as they have of one size.
    """
    if cut.inputs is not None:
        return _by_inputs(weight, cut, cut.inputs)
    scales, zeros = weight.scales, weight.zeros
    zeros = None if zeros is None else part_of(zeros, cut.by_output)
    return weight._replace(
        codes=part_of(weight.codes, cut.by_output), scales=part_of(scales, cut.by_output), zeros=zeros
    )


def _by_inputs(weight: QuantizedWeight, cut: ModuleCut, span: Span) -> QuantizedWeight | None:
    scales, zeros, size = weight.scales, weight.zeros, weight.group
    if weight.group_of_input is not None or (scales.shape[1] > 1 and cut.step % size):
        return None
    start, stop, width = span
    first = start // size
    groups = TensorCut((Span(first, -(-stop // size) if start < stop else first, -(-width // size)),), dim=1)
    zeros = None if zeros is None else part_of(zeros, groups)
    codes = part_of(weight.codes, cut.by_input)
    if zeros is not None:  # what is behind the model's inputs is 0 in a group that has some of them
        behind = stop - start
        codes[:, behind:] = zeros[:, (behind - 1) // size, None].to(codes.dtype) if behind else 0
    elif weight.book is not None:
        codes[:, stop - start :] = weight.book.abs().argmin()
    return weight._replace(codes=codes, scales=part_of(scales, groups), zeros=zeros)
