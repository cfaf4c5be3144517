"""Tiny checkpoints in every quantised format that is read, written after the published layouts, and what they hold.

Each packer returns the tensors of one module and the weight that they stand for, computed from its integers
and from nothing that it packed.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.runtime.models.families import write_checkpoint

SHAPE = {"hidden_size": 64, "intermediate_size": 256, "head_dim": 16, "num_attention_heads": 4}
NF4 = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0, 0.0795803, 0.1609302]
NF4 += [0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # the column that lies in each nibble of a word

Packed = tuple[dict[str, Tensor], Tensor]


class Case(NamedTuple):
    config: dict[str, object]  # quantization_config
    pack: Callable[[Tensor], Packed]


def words(values: Tensor, bits: int) -> Tensor:
    """Unsigned integers (n, m) in words of 32 bits along m, the first lowest."""
    per = 32 // bits
    shifted = values.long().unflatten(1, (-1, per)) << torch.arange(per) * bits
    total = shifted.sum(2)
    return torch.where(total >= 1 << 31, total - (1 << 32), total).int()


def grouped(weight: Tensor, bits: int, group: int, *, zeros: bool, order: Tensor | None = None) -> tuple[Tensor, ...]:
    """Unsigned codes (out, in), scales and zero points (out, groups), and the weight that they stand for."""
    out, inner = weight.shape
    places = torch.arange(inner) // group if order is None else order
    codes, top = torch.empty(out, inner), (1 << bits) - 1
    count = inner // group
    scales, points = torch.empty(out, count), torch.full((out, count), float(1 << bits - 1))
    for one in range(count):
        part = weight[:, places == one]
        if zeros:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scale = ((high - low) / top).half().float()
            points[:, one] = (-low / scale).round().clamp(1, top)
        else:
            scale = (part.abs().amax(1) / (top // 2)).half().float()
        scales[:, one] = scale
        codes[:, places == one] = (part / scale[:, None] + points[:, one, None]).round().clamp(0, top)
    return codes, scales, points, (codes - points[:, places]) * scales[:, places]


def shuffle(inputs: int) -> Tensor:
    """The same for all modules of a site: they are quantised in the order of what their inputs have in common."""
    return torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))


def awq(weight: Tensor) -> Packed:
    codes, scales, zeros, exact = grouped(weight, 4, 32, zeros=True)

    def ordered(values: Tensor) -> Tensor:
        return words(values.unflatten(1, (-1, 8))[:, :, list(AWQ_COLUMNS)].flatten(1), 4)

    tensors = {".qweight": ordered(codes.t()), ".qzeros": ordered(zeros.t()), ".scales": scales.t().half()}
    return tensors, exact


def gptq(bits: int, group: int, *, zeros: bool, shuffled: bool = False, less: int = 1) -> Callable[..., Packed]:
    def pack(weight: Tensor) -> Packed:
        order = torch.arange(weight.shape[1]) // group
        if shuffled:
            order = order[shuffle(len(order))]
        codes, scales, points, exact = grouped(weight, bits, group, zeros=zeros, order=order)
        tensors = {".qweight": words(codes, bits).t(), ".qzeros": words(points.t() - less, bits)}
        return tensors | {".scales": scales.t().half(), ".g_idx": order.int()}, exact

    return pack


def packed(bits: int, group: int, *, zeros: bool = False, shuffled: bool = False) -> Callable[..., Packed]:
    def pack(weight: Tensor) -> Packed:
        order = torch.arange(weight.shape[1]) // group
        if shuffled:
            order = order[shuffle(len(order))]
        codes, scales, points, exact = grouped(weight, bits, group, zeros=zeros, order=order)
        tensors = {".weight_packed": words(codes, bits), ".weight_scale": scales.half()}
        tensors[".weight_shape"] = torch.tensor(weight.shape)
        if zeros:
            tensors[".weight_zero_point"] = words(points.t(), bits).t()
        if shuffled:
            tensors[".weight_g_idx"] = order.int()
        return tensors, exact

    return pack


def int8(scale_name: str, factor: float = 1.0) -> Callable[..., Packed]:
    def pack(weight: Tensor) -> Packed:
        scales = weight.abs().amax(1, keepdim=True) / 127
        codes = (weight / scales).round()
        stored = scales if scale_name == ".weight_scale" else scales[:, 0] * factor
        return {".weight": codes.to(torch.int8), scale_name: stored}, codes * scales

    return pack


def fp8(scale_name: str, block: tuple[int, int] | None, *, per_output: bool = False) -> Callable[..., Packed]:
    def pack(weight: Tensor) -> Packed:
        out, inner = weight.shape
        height, width = block or ((1, inner) if per_output else (out, inner))
        largest = torch.nn.functional.pad(weight.abs(), (0, -inner % width, 0, -out % height))
        scales = largest.unflatten(1, (-1, width)).unflatten(0, (-1, height)).amax((1, 3)) / 448
        wide = scales.repeat_interleave(height, 0)[:out].repeat_interleave(width, 1)[:, :inner]
        codes = (weight / wide).to(torch.float8_e4m3fn)
        stored = scales if block or per_output else scales.flatten()
        return {".weight": codes, scale_name: stored, ".input_scale": torch.ones(1)}, codes.float() * wide

    return pack


def nf4(*, nested: bool) -> Callable[..., Packed]:
    def pack(weight: Tensor) -> Packed:
        block, book = 64, torch.tensor(NF4)
        largest = weight.reshape(-1, block).abs().amax(1)
        tensors, fields = {}, {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": [*weight.shape]}
        if nested:
            offset, outer = largest.mean().item(), 256
            table = torch.linspace(-1, 1, 256)
            size = (largest - offset).abs().amax()
            places = (((largest - offset) / size + 1) * 127.5).round().clamp(0, 255)
            count = -(-largest.numel() // outer)
            tensors |= {".weight.absmax": places.to(torch.uint8), ".weight.nested_quant_map": table}
            tensors[".weight.nested_absmax"] = size.expand(count).clone()
            fields |= {"nested_blocksize": outer, "nested_dtype": "float32", "nested_offset": offset}
            largest = table[places.long()] * size + offset
        else:
            tensors[".weight.absmax"] = largest
        codes = (weight.reshape(-1, block, 1) / largest[:, None, None] - book).abs().argmin(2)
        pairs = codes.view(-1, 2)
        tensors[".weight"] = (pairs[:, :1] * 16 + pairs[:, 1:]).to(torch.uint8)
        tensors[".weight.quant_map"] = book
        state = list(json.dumps(fields).encode())
        tensors[".weight.quant_state.bitsandbytes__nf4"] = torch.tensor(state, dtype=torch.uint8)
        return tensors, (book[codes] * largest[:, None]).view(weight.shape)

    return pack


def _compressed(form: str, weights: dict[str, object], **more: object) -> dict[str, object]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None} | more
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


def _gptq(bits: int, group: int, **more: object) -> dict[str, object]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group} | more


_INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
_FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor"}
_BLOCKS = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 32]}
CASES = {
    "awq": Case({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, awq),
    "gptq": Case(_gptq(4, 32, sym=False), gptq(4, 32, zeros=True)),
    "gptq-symmetric": Case(_gptq(4, 64, sym=True), gptq(4, 64, zeros=False)),
    "gptq-order": Case(_gptq(4, 32, desc_act=True), gptq(4, 32, zeros=True, shuffled=True)),
    "gptq-v2": Case(_gptq(4, 32, checkpoint_format="gptq_v2"), gptq(4, 32, zeros=True, less=0)),
    "gptq-8": Case(_gptq(8, 32), gptq(8, 32, zeros=False)),
    "gptq-2": Case(_gptq(2, 32), gptq(2, 32, zeros=True)),
    "packed": Case(_compressed("pack-quantized", {"num_bits": 4, "type": "int"}), packed(4, 32)),
    "packed-zeros": Case(_compressed("pack-quantized", {"num_bits": 4, "type": "int"}), packed(4, 32, zeros=True)),
    "packed-order": Case(_compressed("pack-quantized", {"num_bits": 4, "type": "int"}), packed(4, 32, shuffled=True)),
    "packed-8": Case(_compressed("pack-quantized", {"num_bits": 8, "type": "int"}), packed(8, 64)),
    "w8a16": Case(_compressed("int-quantized", _INT8), int8(".weight_scale")),
    "w8a8": Case(
        _compressed("int-quantized", _INT8, input_activations={"num_bits": 8, "dynamic": True}), int8(".weight_scale")
    ),
    "fp8-tensor": Case(_compressed("float-quantized", _FP8), fp8(".weight_scale", None)),
    "fp8-channel": Case(_compressed("float-quantized", _FP8), fp8(".weight_scale", None, per_output=True)),
    "fp8-block": Case(_compressed("float-quantized", _BLOCKS), fp8(".weight_scale", (32, 32))),
    "deepseek": Case(
        {"quant_method": "fp8", "weight_block_size": [48, 48], "activation_scheme": "dynamic"},
        fp8(".weight_scale_inv", (48, 48)),
    ),
    "fp8-static": Case({"quant_method": "fp8", "activation_scheme": "static"}, fp8(".weight_scale", None)),
    "fbgemm": Case({"quant_method": "fbgemm_fp8"}, fp8(".weight_scale", None, per_output=True)),
    "nf4": Case({"quant_method": "bitsandbytes", "load_in_4bit": True}, nf4(nested=False)),
    "nf4-nested": Case({"quant_method": "bitsandbytes", "load_in_4bit": True}, nf4(nested=True)),
    "llm-int8": Case({"quant_method": "bitsandbytes", "load_in_8bit": True}, int8(".SCB", 127.0)),
}


def write_quantized(name: str, directory: Path, family: str = "llama", **settings: object) -> torch.nn.Module:
    """Write a family's tiny model with all its projections quantised; return it dequantised, in float32.

    The head and the embedding stay as they are, as in most published checkpoints.
    """
    return quantize(name, directory, write_checkpoint(family, directory, **(SHAPE | settings)))


def quantize(name: str, directory: Path, model: torch.nn.Module) -> torch.nn.Module:
    """Quantise the projections of the text of a checkpoint; return its model dequantised, in float32.

    transformers reads the dequantised one itself, because its modules may hold several of a checkpoint's tensors.
    """
    config, pack = CASES[name]
    exact, twin = load_file(directory / "model.safetensors"), directory / "dequantised"
    tensors = dict(exact)
    for weight in [one for one in tensors if one.endswith("_proj.weight") and "visual" not in one]:
        module = weight.removesuffix(".weight")
        made, exact[weight] = pack(tensors.pop(weight).float())
        tensors |= {module + suffix: tensor.contiguous() for suffix, tensor in made.items()}
    model.config.save_pretrained(twin)
    save_file(exact, twin / "model.safetensors", metadata={"format": "pt"})
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(written | {"quantization_config": config}))
    return type(model).from_pretrained(twin, attn_implementation="eager", dtype=torch.float32).eval()
