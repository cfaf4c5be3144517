"""The decoder on Triton kernels: one launch between two projections, and one or two a site for adapters."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import kv_write, paged_attention, rms_norm, silu_mul, tuned
from kernels.interpreter import shared_bytes
from runtime.gpu.fused_experts import FusedExperts
from runtime.gpu.step_inputs import StepInputs
from runtime.gpu.step_lora import StepLora, tile_height
from runtime.models.config import DOWN, GATE_UP, OUT, QKV, SITES_PER_LAYER, ModelConfig
from runtime.models.layers import CutProjectionNorms, ProjectionNorms, RmsNorm, inverse_frequencies, rounded_to
from runtime.models.weights import Experts, LayerWeights, Mlp, Weights
from runtime.parallel.group import RankGroup


class FusedDecoder:
    """The forward pass of `runtime.models.decoder.Decoder` on a GPU, or in Triton's interpreter.

    Its launches depend on the shape of a step alone, so that a CUDA graph of them serves every step of that shape.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        block_size: int,
        longest: int,
        gpu: str,
        group: RankGroup | None = None,
    ):
        self.config, self.group = config, group or RankGroup()
        self.weights = weights
        self.frequencies = [
            inverse_frequencies(rope, config.head_dim).to(weights.embedding.device) for rope in config.ropes
        ]
        self.embedding_scale = config.embedding_scale(partial(rounded_to, weights.embedding.dtype))
        self.gated: Callable[..., Tensor] = silu_mul.gelu_mul if config.gelu else silu_mul.silu_mul
        if config.experts is not None and config.experts.limit:
            self.gated = partial(silu_mul.clamped_mul, limit=config.experts.limit)
        self.experts = {
            index: FusedExperts(config, index, layer.mlp)
            for index, layer in enumerate(weights.layers)
            if isinstance(layer.mlp, Experts)
        }
        self.linears = {  # by site
            index * SITES_PER_LAYER + which: linear
            for index, layer in enumerate(weights.layers)
            for which, linear in enumerate((layer.qkv, layer.o, *(layer.mlp if isinstance(layer.mlp, Mlp) else ())))
        }
        self.block_size = block_size
        self.longest = longest  # tokens of a context
        self.shared_bytes = paged_attention.H100_SHARED_BYTES
        if weights.embedding.is_cuda:
            self.shared_bytes = shared_bytes(weights.embedding.device)
        self.gpu = gpu
        self._configs: dict[tuple[str, int], Any] = {}

    def forward(self, step: StepInputs, kv: list[Tensor], lora: StepLora | None) -> Tensor:
        """Write every token's K and V, and return the logits of the step's `logit_rows`, (n, vocab), on rank 0.

        The logits are in the model's dtype, or in float32 if the model scales them. With `lora` None, exactly the
        kernels of a model without adapters run.
        """
        config, weights = self.config, self.weights
        x = F.embedding(step.token_ids, weights.embedding)
        if lora is not None:
            lora.embed(step.token_ids, x)
        if self.embedding_scale != 1.0:
            x.mul_(self.embedding_scale)
        first = weights.layers[0].attention_norm
        normed = x if first is None else self._norm(first, x)
        for index, layer in enumerate(weights.layers):
            site = index * SITES_PER_LAYER
            mixed = self._attention(layer, index, normed, step, kv[index], lora)
            out = self.group.add_up(self._project(site + OUT, mixed, lora))
            normed = self._add(x, out, layer.after_attention, layer.mlp_norm)
            down = self.group.add_up(self._mlp(index, normed, step, lora))
            following = weights.layers[index + 1].attention_norm if index + 1 < len(weights.layers) else None
            normed = self._add(x, down, layer.after_mlp, following)
        last = self._norm(weights.norm, x.index_select(0, step.logit_rows))
        logits = weights.lm_head(last)
        if lora is not None:
            lora.apply_logits(last, logits)
        logits = self.group.gather(logits, config.vocab_size)
        if config.logits_cap:
            return (logits.float() / config.logits_cap).tanh_() * config.logits_cap
        return logits if config.logits_scaling == 1.0 else logits.float() / config.logits_scaling

    def _attention(
        self, layer: LayerWeights, index: int, normed: Tensor, step: StepInputs, kv: Tensor, lora: StepLora | None
    ) -> Tensor:
        config, rows, decodes = self.config, len(normed), step.decodes
        heads = self._project(index * SITES_PER_LAYER + QKV, normed, lora).view(rows, -1, config.head_dim)
        self._write_kv(layer, index, heads, step, kv)
        q = heads[:, : config.num_heads]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        tables, contexts, scale = step.block_tables, step.context_lens, config.attention_scale
        seen = config.window(index), config.attention_cap, layer.sinks
        if decodes:
            chosen = self._tuned("paged_decode", decodes).of_batch(decodes, config.num_kv_heads, self.longest)
            read = kv, tables[:decodes], contexts[:decodes], self.block_size, scale
            paged_attention.paged_decode(q[:decodes], *read, out[:decodes], chosen, *seen)
        if decodes < rows:
            tiled = self._tuned("paged_prefill", rows - decodes).of_heads(config.head_dim, self.shared_bytes)
            of_prompts = kv, tables[decodes:], contexts[decodes:], step.query_starts, self.block_size, scale
            paged_attention.paged_prefill(q[decodes:], *of_prompts, out[decodes:], tiled, *seen)
        return out.view(rows, -1)

    def _write_kv(self, layer: LayerWeights, index: int, heads: Tensor, step: StepInputs, kv: Tensor) -> None:
        """Norm and turn queries and keys, the queries in place, and write keys and values to the cache."""
        config, norm, rope = self.config, layer.qk_norm, self.config.rope_of(index)
        if isinstance(norm, ProjectionNorms):
            self._norm_projections(norm, heads)
            norm = None
        elif isinstance(norm, CutProjectionNorms):
            turned = heads[:, : config.num_heads + config.num_kv_heads]
            turned.copy_(norm(turned))
            norm = None
        kv_write.qkv_write(
            heads,
            step.positions,
            step.slot_mapping,
            self.frequencies[rope],
            None if norm is None else norm.plain[0],
            None if norm is None else norm.plain[config.num_heads],
            config.rms_norm_eps,
            kv,
            config.ropes[rope].attention_factor or 1.0,
            self._tuned("qkv_write", len(heads)),
            config.turned(index),
            config.rope.interleaved,
        )

    def _mlp(self, index: int, normed: Tensor, step: StepInputs, lora: StepLora | None) -> Tensor:
        if index in self.experts:
            return self.experts[index].forward(normed, tile_height(step.decodes, len(normed)), lora, self._gated)
        site = index * SITES_PER_LAYER
        return self._project(site + DOWN, self._gated(self._project(site + GATE_UP, normed, lora)), lora)

    def _gated(self, gate_up: Tensor) -> Tensor:
        return self.gated(gate_up, config=self._tuned("silu_mul", len(gate_up)))

    def _project(self, site: int, x: Tensor, lora: StepLora | None) -> Tensor:
        linear = self.linears[site]
        return linear(x) if lora is None else lora.project(site, linear, x)

    def _norm(self, norm: RmsNorm, x: Tensor) -> Tensor:
        return rms_norm.rms_norm(x, norm.weight, norm.floor, self._tuned("rms_norm", len(x)))

    def _norm_projections(self, norms: ProjectionNorms, heads: Tensor) -> None:
        """Normalise all query heads together, and all key heads, in place."""
        rows, first = heads.flatten(1), 0
        for norm in norms:
            columns = rows[:, first : first + len(norm.plain)]
            columns.copy_(self._norm(norm, columns))
            first += len(norm.plain)

    def _add(self, residual: Tensor, y: Tensor, after: RmsNorm | None, norm: RmsNorm | None) -> Tensor:
        """Add to the residual stream, through `after` if there is one; returns what the next projection reads."""
        if after is not None:
            y = self._norm(after, y)
        if norm is not None:
            return self._add_norm(residual, y, norm)
        return residual.add_(y, alpha=self.config.residual_multiplier)

    def _add_norm(self, residual: Tensor, y: Tensor, norm: RmsNorm) -> Tensor:
        alpha, config = self.config.residual_multiplier, self._tuned("add_rms_norm", len(y))
        return rms_norm.add_rms_norm(residual, y, alpha, norm.weight, norm.floor, config)

    def _tuned(self, kernel: str, rows: int) -> Any:
        config = self._configs.get((kernel, rows))
        if config is None:
            found = tuned.lookup(self.gpu, kernel, rows, self.weights.embedding.dtype)
            config = self._configs[kernel, rows] = found.config
        return config
