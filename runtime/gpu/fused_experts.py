"""A layer's routed experts on Triton kernels: two products over rows that are sorted by expert."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import expert_rows
from kernels.lora_tiles import most_tiles
from runtime.gpu.expert_sorting import SortedRows, sort_by_expert
from runtime.gpu.step_lora import DECODE_HEIGHT, StepLora
from runtime.models.config import ROUTER, SITES_PER_LAYER, ModelConfig
from runtime.models.weights import Experts, Mlp

Gated = Callable[[Tensor], Tensor]


class FusedExperts:
    """The experts of one layer, of which each row goes through the few that its router scores highest."""

    def __init__(self, config: ModelConfig, layer: int, experts: Experts) -> None:
        assert config.experts is not None
        self._config, self._experts = config.experts, experts
        self._router_site, self._site = layer * SITES_PER_LAYER + ROUTER, config.expert_site(layer, 0)
        self._shared_site = config.shared_site(layer)
        self._gate_up, self._down = (_Stacked.of(experts.each, which) for which in range(2))

    def forward(self, x: Tensor, height: int, lora: StepLora | None, gated: Gated) -> Tensor:
        """Return the weighted sum of each row's experts, and its shared expert, for `x` (rows, hidden)."""
        scores = self._experts.router(x)
        if lora is not None:
            lora.apply(self._router_site, x, scores)
        weights, chosen = scores.float().softmax(-1).topk(self._config.chosen)
        if self._config.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        rows = self._sorted(chosen, height, lora)
        inner = gated(self._product(self._gate_up, self._site, x[rows.order // chosen.shape[1]], rows, lora))
        y = self._product(self._down, self._site + 1, inner, rows, lora)
        of_pairs = torch.empty_like(y)
        of_pairs[rows.order] = y
        out = (of_pairs.view(*chosen.shape, -1).float() * weights[..., None]).sum(1).to(x.dtype)
        return out if self._experts.shared is None else out.add_(self._shared(x, lora, gated))

    def _sorted(self, chosen: Tensor, height: int, lora: StepLora | None) -> SortedRows:
        pairs = chosen.numel()
        slots, most_slots, adapters = (None, 0, 0) if lora is None else (lora.row_slots, lora.most_slots, lora.adapters)
        runs = min(pairs, self._config.count * (adapters + 1))
        return sort_by_expert(chosen, slots, most_slots, most_tiles(pairs, runs, height), height)

    def _product(self, stacked: "_Stacked", site: int, x: Tensor, rows: SortedRows, lora: StepLora | None) -> Tensor:
        config = expert_rows.DECODE if rows.tiles.height == DECODE_HEIGHT else expert_rows.PREFILL
        y = expert_rows.expert_matmul(x, stacked.weight, stacked.bias, rows.tiles, config)
        if lora is not None:
            lora.apply_sorted(site, x, y, rows.tiles)
        return y

    def _shared(self, x: Tensor, lora: StepLora | None, gated: Gated) -> Tensor:
        shared, site = self._experts.shared, self._shared_site
        assert shared is not None
        y = x
        for place, linear in enumerate(shared.mlp):
            inputs, y = y, linear(y)
            if lora is not None:
                lora.apply(site + place, inputs, y)
            y = gated(y) if place == 0 else y
        if shared.gate is None:
            return y
        gate = shared.gate(x)
        if lora is not None:
            lora.apply(site + 2, x, gate)
        return y * gate.sigmoid()


class _Stacked(NamedTuple):
    """One projection of all experts."""

    weight: Tensor  # (experts, out, in)
    bias: Tensor | None  # (experts, out)

    @classmethod
    def of(cls, each: list[Mlp], which: int) -> "_Stacked":
        """Copy each expert's weight to one tensor, of which its own becomes a part."""
        linears = [mlp[which] for mlp in each]
        weight = torch.stack([linear.plain() for linear in linears])
        for linear, own in zip(linears, weight, strict=True):
            linear.hold(own)
        biases = [linear.bias for linear in linears if linear.bias is not None]
        return cls(weight, torch.stack(biases) if biases else None)
