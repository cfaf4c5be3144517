"""A decoder-only transformer over a paged K/V cache; after every projection, adapters add to its output."""

from collections.abc import Sequence
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.elementwise import kv_write, rotary, silu_mul
from kernels.cpu.paged_attention import AttentionGroup, paged_attention
from runtime.models.config import DOWN, GATE_UP, OUT, QKV, SITES_PER_LAYER, ModelConfig
from runtime.models.layers import Linear, RmsNorm, Rotary
from runtime.models.weights import LayerWeights, Weights


class Lora(Protocol):
    """What the decoder asks of a batch's adapters: each call changes `y` in place, on the rows that carry one."""

    def apply(self, site: int, x: Tensor, y: Tensor) -> None: ...

    def embed(self, token_ids: Tensor, x: Tensor) -> None: ...

    def norm(self, index: int, norm: RmsNorm, x: Tensor, y: Tensor) -> None: ...

    def apply_logits(self, x: Tensor, y: Tensor) -> None: ...


class Decoder:
    """The forward pass of one model. It holds weights and no other state, and runs without autograd."""

    def __init__(self, config: ModelConfig, weights: Weights):
        self.config = config
        self.weights = weights
        self.rotary = Rotary(config.rope, config.head_dim, weights.embedding.device)
        self.scale = config.head_dim**-0.5 if config.attention_multiplier is None else config.attention_multiplier

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        kv: list[Tensor],
        groups: Sequence[AttentionGroup],
        logit_rows: Tensor,
        lora: Lora | None,
    ) -> Tensor:
        """Write every token's K and V, and return the logits of `logit_rows`, (n, vocab) float32.

        `token_ids`, `positions` and `slots` (the slot mapping: where each token's K/V is written) are (T,) int64,
        `kv` has a tensor (slots, 2, kv_heads, head_dim) for each layer, `logit_rows` is (n,) int64. With `lora` None,
        exactly the operations of a model without adapters run.
        """
        config, weights = self.config, self.weights
        x = F.embedding(token_ids, weights.embedding)
        if lora is not None:
            lora.embed(token_ids, x)
        if config.embedding_multiplier != 1.0:
            x = x * config.embedding_multiplier
        angles = self.rotary(positions, x.dtype)
        for index, layer in enumerate(weights.layers):
            site = index * SITES_PER_LAYER
            x = self._attention(layer, site, x, angles, slots, kv[index], groups, lora)
            x = self._mlp(layer, site, x, lora)
        x = _norm(weights.norm, 2 * config.num_layers, x.index_select(0, logit_rows), lora)
        logits = weights.lm_head(x)
        if lora is not None:
            lora.apply_logits(x, logits)
        logits = logits.float()
        return logits if config.logits_scaling == 1.0 else logits / config.logits_scaling

    def _attention(
        self,
        layer: LayerWeights,
        site: int,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        slots: Tensor,
        kv: Tensor,
        groups: Sequence[AttentionGroup],
        lora: Lora | None,
    ) -> Tensor:
        config = self.config
        rows, q_heads, kv_heads, head_dim = len(x), config.num_heads, config.num_kv_heads, config.head_dim
        normed = _norm(layer.attention_norm, site // SITES_PER_LAYER * 2, x, lora)
        heads = _project(layer.qkv, site + QKV, normed, lora).view(rows, q_heads + 2 * kv_heads, head_dim)
        # Queries, keys and values lie side by side, so one call rotates queries and keys in place, and one writes keys
        # and values to the cache
        turned = heads[:, : q_heads + kv_heads]
        source = turned if layer.qk_norm is None else layer.qk_norm(turned)
        rotary(source, *angles, out=turned)
        kv_write(kv, slots, heads[:, q_heads:].view(rows, 2, kv_heads, head_dim))
        mixed = paged_attention(heads[:, :q_heads], kv, groups, self.scale)
        return self._add(x, _project(layer.o, site + OUT, mixed, lora))

    def _mlp(self, layer: LayerWeights, site: int, x: Tensor, lora: Lora | None) -> Tensor:
        normed = _norm(layer.mlp_norm, site // SITES_PER_LAYER * 2 + 1, x, lora)
        inner = silu_mul(_project(layer.gate_up, site + GATE_UP, normed, lora))
        return self._add(x, _project(layer.down, site + DOWN, inner, lora))

    def _add(self, residual: Tensor, y: Tensor) -> Tensor:
        return residual.add_(y, alpha=self.config.residual_multiplier)


def _norm(norm: RmsNorm, index: int, x: Tensor, lora: Lora | None) -> Tensor:
    """`index` is the norm's place in `ModelConfig.norms`."""
    y = norm(x)
    if lora is not None:
        lora.norm(index, norm, x, y)
    return y


def _project(linear: Linear, site: int, x: Tensor, lora: Lora | None) -> Tensor:
    y = linear(x)
    if lora is not None:
        lora.apply(site, x, y)
    return y
