"""The layouts of quantised weights in published checkpoints, each read into a QuantizedWeight.

Sources: AutoAWQ's gemm packing, AutoGPTQ's and GPTQModel's two checkpoint formats, compressed-tensors' pack-quantized
and naive formats, DeepSeek's 8-bit floats with block scales, the states of bitsandbytes' Linear4bit and Linear8bitLt.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from runtime.quantization.scheme import PACKED_BITS, Scheme
from runtime.quantization.weight import QuantizedWeight

Tensors = Mapping[str, Tensor]  # by their names behind the module's
Shape = tuple[int, ...]  # (out, in)

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the place in a word of each of eight neighbouring outputs
STATES = (".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4")


class InvalidWeight(ValueError):
    """The tensors of a quantised weight do not fit together."""


class Format(NamedTuple):
    marker: str  # the tensor by which a module is of this format
    needs: tuple[str, ...]
    may: tuple[str, ...]  # read if they are there
    read: Callable[[Scheme, Shape, Tensors], QuantizedWeight]


def formats_of(scheme: Scheme) -> tuple[Format, ...]:
    return _FORMATS[scheme.method]


def _awq(scheme: Scheme, shape: Shape, tensors: Tensors) -> QuantizedWeight:
    """Words along the outputs, (in, out / 8), in an order of AWQ's own; zero points likewise, (groups, out / 8)."""
    out, inner = shape
    group, groups = _grouped(inner, scheme.group)
    _check(tensors, ".qweight", (inner, out // 8), torch.int32)
    _check(tensors, ".qzeros", (groups, out // 8), torch.int32)
    _check(tensors, ".scales", (groups, out))

    def reordered(words: Tensor) -> Tensor:
        eights: Tensor = unpacked(words, 4).unflatten(1, (-1, 8))
        return eights[:, :, list(AWQ_ORDER)].flatten(1)

    codes, zeros = reordered(tensors[".qweight"]), reordered(tensors[".qzeros"])
    return _integers(codes.t(), 4, tensors[".scales"].t(), group, zeros.t())


def _gptq(scheme: Scheme, shape: Shape, tensors: Tensors) -> QuantizedWeight:
    """Words along the inputs, (in · bits / 32, out); zero points along the outputs, (groups, out · bits / 32)."""
    assert scheme.bits is not None
    out, inner = shape
    group, groups = _grouped(inner, scheme.group)
    words = 32 // scheme.bits
    _check(tensors, ".qweight", (inner // words, out), torch.int32)
    _check(tensors, ".qzeros", (groups, out // words), torch.int32)
    _check(tensors, ".scales", (groups, out))
    zeros = unpacked(tensors[".qzeros"], scheme.bits).short() + scheme.stored_zeros_less_one
    codes = unpacked(tensors[".qweight"].t(), scheme.bits)
    order = tensors.get(".g_idx")
    if order is not None:
        _check(tensors, ".g_idx", (inner,))
        order = order.long()
        if order.min() < 0 or order.max() >= groups:
            raise InvalidWeight(f".g_idx has groups {int(order.min())} to {int(order.max())} of {groups}")
        if torch.equal(order, torch.arange(inner) // group):
            order = None
    return _integers(codes, scheme.bits, tensors[".scales"].t(), group, zeros.t(), order)


def _packed(scheme: Scheme, shape: Shape, tensors: Tensors) -> QuantizedWeight:
    """Words along the inputs, (out, in · bits / 32), of integers plus 2^(bits−1); zero points along the outputs."""
    out, inner = shape
    words, scales = tensors[".weight_packed"], tensors[".weight_scale"]
    bits = next((bits for bits in PACKED_BITS if words.shape == (out, -(-inner * bits // 32))), None)
    if bits is None:
        raise InvalidWeight(f".weight_packed has shape {tuple(words.shape)}, which is no {shape} of 2, 4 or 8 bits")
    _check(tensors, ".weight_packed", tuple(words.shape), torch.int32)
    if ".weight_shape" in tensors and tuple(tensors[".weight_shape"].tolist()) != shape:
        raise InvalidWeight(f".weight_shape is {tensors['.weight_shape'].tolist()}, not {list(shape)}")
    group = _group_of(scales, shape)
    zeros = tensors.get(".weight_zero_point")
    if zeros is not None:
        zeros = unpacked(zeros.t(), bits)[:, :out].t()
    order = tensors.get(".weight_g_idx")
    if order is not None:
        order = None if bool((order < 0).all()) else order.long()
    return _integers(unpacked(words, bits)[:, :inner], bits, scales, group, zeros, order, middle=zeros is None)


def _scaled(scheme: Scheme, shape: Shape, tensors: Tensors) -> QuantizedWeight:
    """Integers or floats of 8 bits, (out, in), and scales for the whole, for each output, group or block."""
    out, inner = shape
    codes = tensors[".weight"]
    scales = tensors[".weight_scale_inv" if ".weight_scale_inv" in tensors else ".weight_scale"].float()
    if codes.dtype not in (torch.int8, torch.float8_e4m3fn):
        raise InvalidWeight(f".weight is {codes.dtype}; supported are int8 and float8_e4m3fn")
    _check(tensors, ".weight", shape)
    zeros = tensors.get(".weight_zero_point")
    zeros = zeros if zeros is None or bool(zeros.any()) else None
    if scheme.block is not None and scales.ndim == 2 and scales.shape != (out, 1):
        height, group = scheme.block
        wanted = -(-out // height), -(-inner // group)
        if tuple(scales.shape) != wanted or zeros is not None:
            raise InvalidWeight(f"the scales have shape {tuple(scales.shape)} where blocks make it {wanted}")
        scales = scales.repeat_interleave(height, 0)[:out]
    else:
        scales = scales.reshape(-1, 1) if scales.ndim < 2 else scales
        group = _group_of(scales, shape)
        scales = scales.expand(out, -1)
        zeros = zeros if zeros is None else zeros.reshape(-1, scales.shape[1]).expand(out, -1).short()
    return QuantizedWeight(codes, 8, scales, group, zeros)


def _bitsandbytes4(scheme: Scheme, shape: Shape, tensors: Tensors) -> QuantizedWeight:
    """Two codes a byte, the first in its high half; a scale for each block, itself quantised in some checkpoints."""
    out, inner = shape
    state = next((tensors[name] for name in STATES if name in tensors), None)
    if state is None:
        raise InvalidWeight(f"lacks {' or '.join(STATES)}")
    fields = msgspec.json.decode(bytes(state.tolist()))
    block = fields["blocksize"]
    if tuple(fields["shape"]) != shape or inner % block:
        raise InvalidWeight(f"has shape {fields['shape']} in blocks of {block} where the model has {shape}")
    scales = tensors[".weight.absmax"]
    if ".weight.nested_absmax" in tensors:
        outer = tensors[".weight.nested_absmax"].repeat_interleave(fields["nested_blocksize"])[: scales.numel()]
        scales = tensors[".weight.nested_quant_map"][scales.int()] * outer + fields["nested_offset"]
    bytes_ = tensors[".weight"].contiguous().view(torch.uint8).flatten()
    if bytes_.numel() * 2 != out * inner or scales.numel() * block != out * inner:
        raise InvalidWeight(f".weight has {bytes_.numel()} bytes and {scales.numel()} scales; the model has {shape}")
    codes = torch.stack((bytes_ >> 4, bytes_ & 15), 1).view(out, inner)
    return QuantizedWeight(codes, 4, scales.float().view(out, -1), block, book=tensors[".weight.quant_map"].float())


def _bitsandbytes8(scheme: Scheme, shape: Shape, tensors: Tensors) -> QuantizedWeight:
    """Integers whose 127 is the largest weight of an output, `SCB`."""
    _check(tensors, ".weight", shape, torch.int8)
    _check(tensors, ".SCB", shape[:1])
    if ".weight_format" in tensors and int(tensors[".weight_format"]) != 0:
        raise InvalidWeight(f".weight_format is {int(tensors['.weight_format'])}; supported is 0, rows")
    return QuantizedWeight(tensors[".weight"], 8, tensors[".SCB"].float()[:, None] / 127, shape[1])


_SCALED_MAY = (".weight_zero_point",)
_FORMATS: dict[str, tuple[Format, ...]] = {
    "awq": (Format(".qweight", (".qweight", ".qzeros", ".scales"), (), _awq),),
    "gptq": (Format(".qweight", (".qweight", ".qzeros", ".scales"), (".g_idx",), _gptq),),
    "compressed-tensors": (
        Format(
            ".weight_packed",
            (".weight_packed", ".weight_scale"),
            (".weight_zero_point", ".weight_g_idx", ".weight_shape"),
            _packed,
        ),
        Format(".weight_scale", (".weight", ".weight_scale"), _SCALED_MAY, _scaled),
    ),
    "fp8": (
        Format(".weight_scale_inv", (".weight", ".weight_scale_inv"), (), _scaled),
        Format(".weight_scale", (".weight", ".weight_scale"), (), _scaled),
    ),
    "fbgemm_fp8": (Format(".weight_scale", (".weight", ".weight_scale"), (), _scaled),),
    "bitsandbytes": (
        Format(
            ".weight.absmax",
            (".weight", ".weight.absmax", ".weight.quant_map"),
            (".weight.nested_absmax", ".weight.nested_quant_map", *STATES),
            _bitsandbytes4,
        ),
        Format(".SCB", (".weight", ".SCB"), (".weight_format",), _bitsandbytes8),
    ),
}


def unpacked(words: Tensor, bits: int) -> Tensor:
    """Unsigned integers from words of 32 bits, the first in the lowest bits: (n, w) to (n, w · 32 / bits) uint8."""
    octets = words.contiguous().view(torch.uint8)
    parts = [octets >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
    return torch.stack(parts, -1).flatten(1)


def _integers(
    codes: Tensor,
    bits: int,
    scales: Tensor,
    group: int,
    zeros: Tensor | None,
    order: Tensor | None = None,
    *,
    middle: bool = False,
) -> QuantizedWeight:
    """From unsigned codes and zero points; `middle` says that all zero points are 2^(bits−1)."""
    half = 1 << bits - 1
    signed = (codes.contiguous() - half).view(torch.int8)  # wraps, as two's complement does
    own = None if middle or zeros is None else (zeros.short() - half).contiguous()
    own = own if own is not None and bool(own.any()) else None
    return QuantizedWeight(signed, bits, scales.float().contiguous(), group, own, group_of_input=order)


def _grouped(inner: int, group: int) -> tuple[int, int]:
    """The inputs of a group, and how many groups there are."""
    group = inner if group == -1 else group
    return group, -(-inner // group)


def _group_of(scales: Tensor, shape: Shape) -> int:
    out, inner = shape
    if scales.ndim != 2 or scales.shape[0] not in (1, out) or inner % scales.shape[1]:
        raise InvalidWeight(f".weight_scale has shape {tuple(scales.shape)}, which does not divide {shape} evenly")
    return inner // scales.shape[1]


def _check(tensors: Tensors, name: str, shape: Shape, dtype: torch.dtype | None = None) -> None:
    tensor = tensors[name]
    if tuple(tensor.shape) != shape or (dtype is not None and tensor.dtype != dtype):
        kind = "" if dtype is None else f" of {dtype}"
        raise InvalidWeight(f"{name} has shape {tuple(tensor.shape)} of {tensor.dtype}, not {shape}{kind}")
