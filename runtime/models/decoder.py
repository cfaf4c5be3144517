"""A decoder-only transformer over a paged K/V cache; after every projection, adapters add to its output."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.elementwise import clamped_mul, gelu_mul, kv_write, rotary, silu_mul
from kernels.cpu.paged_attention import AttentionGroup, paged_attention
from runtime.models.config import GATE_UP, OUT, QKV, ROUTER, SITES_PER_LAYER, ModelConfig
from runtime.models.families import NormKind
from runtime.models.layers import Angles, Linear, RmsNorm, Rotary, rounded_to
from runtime.models.weights import Experts, LayerWeights, Mlp, SharedExpert, Weights
from runtime.parallel.group import RankGroup

Groups = Mapping[int, Sequence[AttentionGroup]]  # by the window of a layer's attention; 0: the whole context


class Lora(Protocol):
    """What the decoder asks of a batch's adapters: each call changes `y` in place, on the rows that carry one."""

    def apply(self, site: int, x: Tensor, y: Tensor) -> None: ...

    def embed(self, token_ids: Tensor, x: Tensor) -> None: ...

    def norm(self, site: int, norm: RmsNorm, x: Tensor, y: Tensor) -> None: ...

    def apply_logits(self, x: Tensor, y: Tensor) -> None: ...

    def of_rows(self, rows: Tensor) -> "Lora | None":
        """The adapters of some rows, (n,) in ascending order, which lie side by side from now on; None for none."""
        ...


class Decoder:
    """The forward pass of one model, or of a rank's part. It holds weights and no other state, without autograd."""

    def __init__(self, config: ModelConfig, weights: Weights, group: RankGroup | None = None):
        self.config, self.group = config, group or RankGroup()
        self.weights = weights
        self.rotaries = [Rotary(rope, config.head_dim, weights.embedding.device) for rope in config.ropes]
        self.gated: Callable[[Tensor], Tensor] = gelu_mul if config.gelu else silu_mul
        if config.experts is not None and config.experts.limit:
            self.gated = partial(clamped_mul, limit=config.experts.limit)
        self.embedding_scale = config.embedding_scale(partial(rounded_to, weights.embedding.dtype))

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        kv: list[Tensor],
        groups: Groups,
        logit_rows: Tensor,
        lora: Lora | None,
    ) -> Tensor:
        """Write every token's K and V, and return the logits of `logit_rows`, (n, vocab) float32, on rank 0.

        `token_ids`, `positions` and `slots` (the slot mapping: where each token's K/V is written) are (T,) int64,
        `kv` has a tensor (slots, 2, kv_heads, head_dim) for each layer, `groups` the attention of each window of
        `config.windows`, `logit_rows` is (n,) int64. With `lora` None, exactly the operations of a model without
        adapters run.
        """
        config, weights = self.config, self.weights
        x = F.embedding(token_ids, weights.embedding)
        if lora is not None:
            lora.embed(token_ids, x)
        if self.embedding_scale != 1.0:
            x = x * self.embedding_scale
        angles = [rotary(positions, x.dtype) for rotary in self.rotaries]
        for index, layer in enumerate(weights.layers):
            turns = angles[config.rope_of(index)] if config.turned(index) else None
            x = self._attention(layer, index, x, turns, slots, kv[index], groups[config.window(index)], lora)
            x = self._mlp(layer, index, x, lora)
        x = _norm(weights.norm, config.last_norm_site, x.index_select(0, logit_rows), lora)
        logits = weights.lm_head(x)
        if lora is not None:
            lora.apply_logits(x, logits)
        logits = self.group.gather(logits, config.vocab_size).float()
        if config.logits_cap:
            return (logits / config.logits_cap).tanh_() * config.logits_cap
        return logits if config.logits_scaling == 1.0 else logits / config.logits_scaling

    def _attention(
        self,
        layer: LayerWeights,
        index: int,
        x: Tensor,
        angles: Angles | None,
        slots: Tensor,
        kv: Tensor,
        groups: Sequence[AttentionGroup],
        lora: Lora | None,
    ) -> Tensor:
        config, site = self.config, index * SITES_PER_LAYER
        rows, q_heads, kv_heads, head_dim = len(x), config.num_heads, config.num_kv_heads, config.head_dim
        normed = self._normed(layer.attention_norm, index, "attention", x, lora)
        heads = _project(layer.qkv, site + QKV, normed, lora).view(rows, q_heads + 2 * kv_heads, head_dim)
        # Queries, keys and values lie side by side, so one call rotates queries and keys in place, and one writes keys
        # and values to the cache
        turned = heads[:, : q_heads + kv_heads]
        source = turned if layer.qk_norm is None else layer.qk_norm(turned)
        if angles is not None:
            rotary(source, angles.cos, angles.sin, turned, angles.partner)
        elif source is not turned:
            turned.copy_(source)
        kv_write(kv, slots, heads[:, q_heads:].view(rows, 2, kv_heads, head_dim))
        how = config.attention_scale, config.attention_cap, layer.sinks
        mixed = paged_attention(heads[:, :q_heads], kv, groups, *how)
        out = self.group.add_up(_project(layer.o, site + OUT, mixed, lora))
        return self._add(x, self._normed(layer.after_attention, index, "after_attention", out, lora))

    def _mlp(self, layer: LayerWeights, index: int, x: Tensor, lora: Lora | None) -> Tensor:
        normed, mlp = self._normed(layer.mlp_norm, index, "mlp", x, lora), layer.mlp
        if isinstance(mlp, Experts):
            out = self._experts(mlp, index, normed, lora)
        else:
            out = self._gated_mlp(mlp, index * SITES_PER_LAYER + GATE_UP, normed, lora)
        out = self.group.add_up(out)
        return self._add(x, self._normed(layer.after_mlp, index, "after_mlp", out, lora))

    def _normed(self, norm: RmsNorm | None, layer: int, kind: NormKind, x: Tensor, lora: Lora | None) -> Tensor:
        if norm is None:
            return x
        return norm(x) if lora is None else _norm(norm, self.config.norm_site(layer, kind), x, lora)

    def _gated_mlp(self, mlp: Mlp, site: int, x: Tensor, lora: Lora | None) -> Tensor:
        return _project(mlp.down, site + 1, self.gated(_project(mlp.gate_up, site, x, lora)), lora)

    def _experts(self, experts: Experts, index: int, x: Tensor, lora: Lora | None) -> Tensor:
        """Each row's chosen experts, weighted: an expert computes its rows together."""
        config = self.config.experts
        assert config is not None
        scores = _project(experts.router, index * SITES_PER_LAYER + ROUTER, x, lora).float().softmax(-1)
        weights, chosen = scores.topk(config.chosen)
        if config.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            rows, place = (chosen == expert).nonzero(as_tuple=True)
            own = None if lora is None else lora.of_rows(rows)
            y = self._gated_mlp(experts.each[expert], self.config.expert_site(index, expert), x[rows], own)
            out.index_add_(0, rows, y * weights[rows, place, None].to(y.dtype))
        return out if experts.shared is None else out.add_(self._shared(experts.shared, index, x, lora))

    def _shared(self, shared: SharedExpert, index: int, x: Tensor, lora: Lora | None) -> Tensor:
        site = self.config.shared_site(index)
        y = self._gated_mlp(shared.mlp, site, x, lora)
        return y if shared.gate is None else y * _project(shared.gate, site + 2, x, lora).sigmoid()

    def _add(self, residual: Tensor, y: Tensor) -> Tensor:
        return residual.add_(y, alpha=self.config.residual_multiplier)


def _norm(norm: RmsNorm, site: int, x: Tensor, lora: Lora | None) -> Tensor:
    y = norm(x)
    if lora is not None:
        lora.norm(site, norm, x, y)
    return y


def _project(linear: Linear, site: int, x: Tensor, lora: Lora | None) -> Tensor:
    y = linear(x)
    if lora is not None:
        lora.apply(site, x, y)
    return y
