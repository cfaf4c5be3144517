"""Projections whose weights stay quantised on the device, where there is a product for their layout."""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import tuned
from kernels.quantized_product import BLOCK, FEW_ROWS, HALF, quantized_product
from runtime.gpu.hot_adapters import HotLinear
from runtime.models.config import DOWN, GATE_UP, OUT, QKV
from runtime.models.layers import Linear
from runtime.models.weights import Checkpoint, Experts, LayerWeights, Mlp, Weights
from runtime.quantization.weight import QuantizedWeight

PARTS = {QKV: 3, OUT: 1, GATE_UP: 2, DOWN: 1}  # of a site


class Packed(NamedTuple):
    """A weight as `kernels.quantized_product` takes it."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    group: int
    book: Tensor | None

    def to(self, device: torch.device) -> "Packed":
        codes, scales, zeros, group, book = self
        zeros, book = (None if one is None else one.to(device) for one in (zeros, book))
        return Packed(codes.to(device), scales.to(device), zeros, group, book)


class PackedLinear(Linear):
    """y = x Wᵀ + b of stacked weights, in x's dtype."""

    def __init__(self, parts: Sequence[QuantizedWeight], bias: Tensor | None, device: torch.device, gpu: str):
        super().__init__(None, bias)
        self.out_features, self.in_features = sum(len(part.codes) for part in parts), parts[0].codes.shape[1]
        order = parts[0].order()
        self._gpu, self._order = gpu, None if order is None else order.to(device)
        self.packed_weight = packed_of(parts, order).to(device)

    def __call__(self, x: Tensor) -> Tensor:
        kind = "decode product" if len(x) <= FEW_ROWS else "prefill product"
        x = x if self._order is None else x.index_select(1, self._order)
        y = quantized_product(x, *self.packed_weight, tuned.lookup(self._gpu, kind, len(x)).config)
        return (y if self.bias is None else y.add_(self.bias)).to(x.dtype)

    @property
    def shape(self) -> Hashable:
        """What its kernels are compiled for."""
        codes, _, zeros, group, book = self.packed_weight
        return codes.shape, codes.dtype, zeros is None, group, book is None

    def plain(self) -> Tensor:
        """W in float32, (out, in)."""
        codes, scales, zeros, group, book = self.packed_weight
        if codes.dtype == torch.uint8:
            codes = torch.cat((codes & 15, codes >> 4), 2)
        places = codes.transpose(1, 2).flatten(0, 1)[: self.in_features]
        weight = places.float() if book is None else book[places.int()]
        groups = torch.arange(self.in_features, device=codes.device) // group
        if zeros is not None:
            weight -= zeros.float()[groups]
        weight.mul_(scales[groups])
        return (weight if self._order is None else torch.empty_like(weight).index_copy_(0, self._order, weight)).t()


class DeviceWeights:
    """Puts linears on a device, and counts how their weights are held."""

    def __init__(self, dtype: torch.dtype, device: torch.device, gpu: str) -> None:
        self._dtype, self._device, self._gpu = dtype, device, gpu
        self._name = str(dtype).removeprefix("torch.")
        self._held: Counter[str] = Counter()
        self._packed: dict[Hashable, PackedLinear] = {}  # one of each shape

    @property
    def description(self) -> str:
        """What most weights are held in first."""
        return ", ".join(name for name, _ in self._held.most_common())

    def load(self, checkpoint: Checkpoint) -> Weights:
        """The model; each layer is placed before the next is read, so that the host never holds them all."""
        embedding = checkpoint.embedding()
        self._held[self._name] += embedding.numel()
        layers = [self._layer(checkpoint.layer(index)) for index in range(checkpoint.config.num_layers)]
        tied = checkpoint.config.tie_embeddings
        head = checkpoint.tied_head(embedding) if tied else self.placed(checkpoint.lm_head())
        return Weights(embedding, layers, checkpoint.norm(), head)

    def _layer(self, layer: LayerWeights) -> LayerWeights:
        mlp: Mlp | Experts
        if isinstance(layer.mlp, Mlp):
            mlp = Mlp(*map(self.placed, layer.mlp))
        else:  # there is no grouped product of quantised experts
            each = [Mlp(*map(self.dequantized, one)) for one in layer.mlp.each]
            shared = layer.mlp.shared
            if shared is not None:
                gate = None if shared.gate is None else self.placed(shared.gate)
                shared = shared._replace(mlp=Mlp(*map(self.placed, shared.mlp)), gate=gate)
            mlp = layer.mlp._replace(router=self.dequantized(layer.mlp.router), each=each, shared=shared)
        if isinstance(mlp, Mlp):
            mlp = Mlp(_with_room(mlp.gate_up, GATE_UP), _with_room(mlp.down, DOWN))
        qkv, o = _with_room(self.placed(layer.qkv), QKV), _with_room(self.placed(layer.o), OUT)
        return layer._replace(qkv=qkv, o=o, mlp=mlp)

    def placed(self, linear: Linear) -> Linear:
        """The linear as the device computes with it; one whose weights have no product here is dequantised."""
        parts = linear.quantized
        if not parts or not can_keep(parts):
            return self.dequantized(linear)
        self._held[parts[0].kind] += sum(part.codes.numel() for part in parts)
        packed = PackedLinear(parts, linear.bias, self._device, self._gpu)
        self._packed[packed.shape] = packed
        return packed

    def dequantized(self, linear: Linear) -> Linear:
        """The linear in the model's dtype."""
        if linear.quantized:
            parts = [part.dequantized().to(self._dtype) for part in linear.quantized]
            linear = Linear(torch.cat(parts).to(self._device), linear.bias, pack=False)
        self._held[self._name] += linear.weight.numel()
        return linear

    def warm_up(self) -> None:
        """Compile the product of many rows for each shape; steps of few rows compile that of few."""
        for linear in self._packed.values():
            linear(torch.zeros(FEW_ROWS + 1, linear.in_features, dtype=self._dtype, device=self._device))


def _with_room(linear: Linear, which: int) -> Linear:
    """The linear with room for hot adapters, unless it is packed."""
    return linear if isinstance(linear, PackedLinear) else HotLinear(linear, PARTS[which])


def can_keep(parts: Sequence[QuantizedWeight]) -> bool:
    """Whether there is a product for the parts of a site: of one kind, in whole groups of one order of the inputs."""
    first, *others = parts
    [(kind, group), *more] = {(part.kind, _group_of(part)) for part in parts}
    if more or not all(part.has_order_of(first) for part in others) or not first.has_full_groups():
        return False
    if kind == "float8" and any(part.has_nan() for part in parts):
        return False
    return group % (HALF if first.bits <= 4 else BLOCK) == 0


def _group_of(weight: QuantizedWeight) -> int:
    """Inputs with one scale; of all of them, whole blocks."""
    inputs = weight.codes.shape[1]
    return -(-inputs // BLOCK) * BLOCK if weight.group >= inputs else weight.group


def packed_of(parts: Sequence[QuantizedWeight], order: Tensor | None) -> Packed:
    """The parts of a site, one below the other, in blocks of inputs in this order."""
    first = parts[0]
    four_bits = first.bits <= 4
    codes = torch.cat([part.codes.view(torch.int8) for part in parts])
    codes = codes if order is None else codes[:, order]
    out, inputs = codes.shape
    blocks = torch.nn.functional.pad(codes, (0, -inputs % BLOCK)).view(out, -1, BLOCK).transpose(0, 1)
    scales = torch.cat([part.scales for part in parts]).t().contiguous()
    middle = 8 if four_bits and first.book is None else 0  # of codes with a sign, which a nibble has not
    zeros = None
    if middle or any(part.zeros is not None for part in parts):
        each = [torch.zeros_like(part.scales) if part.zeros is None else part.zeros for part in parts]
        zeros = (torch.cat(each).t() + middle).to(torch.int8).contiguous()
    if four_bits:
        low, high = (blocks + middle).to(torch.uint8).split(HALF, 2)
        blocks = low | high << 4
    blocks = blocks.contiguous()
    if first.kind == "float8":
        blocks = blocks.view(torch.float8_e4m3fn)
    return Packed(blocks, scales, zeros, _group_of(first), first.book)
