"""The base's weights as PyTorch holds them, for adapters that depend on them: DoRA and trained biases."""

from collections.abc import Iterator
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from runtime.adapters.layout import PIECE_ELEMENTS
from runtime.adapters.parts import Pause
from runtime.models.config import GATE_UP, OUT, QKV, ROUTER, SITES_PER_LAYER, ModelConfig
from runtime.models.layers import Linear
from runtime.models.weights import Mlp, Weights

DEVICE_ELEMENTS = 1 << 22  # of one copy from a GPU, which may wait for a step
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


class _Projection(NamedTuple):
    """One projection of a stacked linear."""

    linear: Linear
    columns: slice


class TorchBase:
    """The weights of `models.decoder`. Sums are numpy's, on the calling thread alone."""

    def __init__(self, model: ModelConfig, weights: Weights) -> None:
        self._embedding = weights.embedding
        self._projections = {HEAD: _Projection(weights.lm_head, slice(0, model.head_width))}
        sites = model.sites()
        for index, linear in _linears(model, weights):
            first = 0
            for module, width in sites[index].parts:
                self._projections[module] = _Projection(linear, slice(first, first + width))
                first += width

    def bias(self, module: str) -> np.ndarray | None:
        found = self._projections.get(module)
        if found is None or found.linear.bias is None:
            return None
        bias: np.ndarray = found.linear.bias[found.columns].float().cpu().numpy()
        return bias

    def lengths(self, module: str, a: np.ndarray, b: np.ndarray, scale: float, pause: Pause) -> np.ndarray:
        if module == EMBEDDING:
            rows = _squares(self._embedding, np.ascontiguousarray(b.T), np.ascontiguousarray(a.T), scale, pause)
            totals = reduce(np.add, (piece.sum(axis=0, dtype=np.float64) for piece in rows))
        else:
            linear, columns = self._projections[module]
            return lengths_of(linear.plain()[columns], a, b, scale, pause)
        lengths: np.ndarray = np.sqrt(totals).astype(np.float32)
        return lengths


def lengths_of(weight: Tensor, a: np.ndarray, b: np.ndarray, scale: float, pause: Pause) -> np.ndarray:
    """See `BaseWeights.lengths`; `weight` is (out, in)."""
    rows = _squares(weight, a, b, scale, pause)
    lengths: np.ndarray = np.sqrt(np.concatenate([piece.sum(axis=1, dtype=np.float64) for piece in rows]))
    return lengths.astype(np.float32)


def _linears(model: ModelConfig, weights: Weights) -> Iterator[tuple[int, Linear]]:
    """Every linear of the layers and its site."""
    for index, layer in enumerate(weights.layers):
        site, mlp = index * SITES_PER_LAYER, layer.mlp
        yield from ((site + QKV, layer.qkv), (site + OUT, layer.o))
        if isinstance(mlp, Mlp):
            yield from enumerate(mlp, site + GATE_UP)
            continue
        yield site + ROUTER, mlp.router
        for expert, each in enumerate(mlp.each):
            yield from enumerate(each, model.expert_site(index, expert))
        if mlp.shared is not None:
            first = model.shared_site(index)
            yield from enumerate(mlp.shared.mlp, first)
            if mlp.shared.gate is not None:
                yield first + 2, mlp.shared.gate


def _squares(weight: Tensor, a: np.ndarray, b: np.ndarray, scale: float, pause: Pause) -> Iterator[np.ndarray]:
    """(W + scale · BA)² in float32, some rows at a time."""
    elements = PIECE_ELEMENTS if weight.device.type == "cpu" else DEVICE_ELEMENTS
    step = max(1, elements // weight.shape[1])
    for first in range(0, len(weight), step):
        pause()
        rows = weight[first : first + step].to("cpu", torch.float32, copy=True).numpy()
        for rank in range(len(a)):
            rows += np.float32(scale) * b[first : first + step, rank : rank + 1] * a[rank]
        yield np.square(rows, out=rows)
