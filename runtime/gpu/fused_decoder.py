"""The decoder on Triton kernels: one launch between two projections, and two launches a site for adapters."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import kv_write, paged_attention, rms_norm, silu_mul, tuned
from runtime.gpu.step_inputs import StepInputs
from runtime.gpu.step_lora import StepLora
from runtime.models.config import DOWN, GATE_UP, OUT, QKV, SITES_PER_LAYER, ModelConfig
from runtime.models.layers import RmsNorm, inverse_frequencies
from runtime.models.weights import LayerWeights, Weights


class FusedDecoder:
    """The forward pass of `runtime.models.decoder.Decoder` on a GPU, or in Triton's interpreter.

    Its launches depend on the shape of a step alone, so that a CUDA graph of them serves every step of that shape.
    """

    def __init__(self, config: ModelConfig, weights: Weights, block_size: int, gpu: str):
        self.config = config
        self.weights = weights
        self.scale = config.head_dim**-0.5 if config.attention_multiplier is None else config.attention_multiplier
        self.frequencies = inverse_frequencies(config.rope, config.head_dim).to(weights.embedding.device)
        self.rotary_scale = 1.0 if config.rope.attention_factor is None else config.rope.attention_factor
        self.block_size = block_size
        self.gpu = gpu

    def forward(self, step: StepInputs, kv: list[Tensor], lora: StepLora | None) -> Tensor:
        """Write every token's K and V, and return the logits of the step's `logit_rows`, (n, vocab).

        The logits are in the model's dtype, or in float32 if the model scales them. With `lora` None, exactly the
        kernels of a model without adapters run.
        """
        config, weights = self.config, self.weights
        x = F.embedding(step.token_ids, weights.embedding)
        if lora is not None:
            lora.embed(step.token_ids, x)
        if config.embedding_multiplier != 1.0:
            x.mul_(config.embedding_multiplier)
        normed = self._norm(weights.layers[0].attention_norm, x)
        for index, layer in enumerate(weights.layers):
            site = index * SITES_PER_LAYER
            mixed = self._attention(layer, site, normed, step, kv[index], lora)
            normed = self._add_norm(x, self._project(layer, OUT, site, mixed, lora), layer.mlp_norm)
            gate_up = self._project(layer, GATE_UP, site, normed, lora)
            inner = silu_mul.silu_mul(gate_up, self._tuned("silu_mul", len(x)))
            down = self._project(layer, DOWN, site, inner, lora)
            if index + 1 < len(weights.layers):
                normed = self._add_norm(x, down, weights.layers[index + 1].attention_norm)
            else:
                x.add_(down, alpha=config.residual_multiplier)
        last = self._norm(weights.norm, x.index_select(0, step.logit_rows))
        logits = weights.lm_head(last)
        if lora is not None:
            lora.apply_logits(last, logits)
        return logits if config.logits_scaling == 1.0 else logits.float() / config.logits_scaling

    def _attention(
        self, layer: LayerWeights, site: int, normed: Tensor, step: StepInputs, kv: Tensor, lora: StepLora | None
    ) -> Tensor:
        config, rows, decodes = self.config, len(normed), step.decodes
        q_heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        heads = self._project(layer, QKV, site, normed, lora).view(rows, q_heads + 2 * kv_heads, head_dim)
        norm = layer.qk_norm
        kv_write.qkv_write(
            heads,
            step.positions,
            step.slot_mapping,
            self.frequencies,
            None if norm is None else norm.plain[0],
            None if norm is None else norm.plain[q_heads],
            config.rms_norm_eps,
            kv,
            self.rotary_scale,
            self._tuned("qkv_write", rows),
        )
        q = heads[:, :q_heads]
        out = torch.empty((rows, q_heads, head_dim), dtype=q.dtype, device=q.device)
        tables, contexts = step.block_tables, step.context_lens
        if decodes:
            paged_attention.paged_decode(
                q[:decodes],
                kv,
                tables[:decodes],
                contexts[:decodes],
                self.block_size,
                self.scale,
                out[:decodes],
                self._tuned("paged_decode", decodes),
            )
        if decodes < rows:
            paged_attention.paged_prefill(
                q[decodes:],
                kv,
                tables[decodes:],
                contexts[decodes:],
                step.query_starts,
                self.block_size,
                self.scale,
                out[decodes:],
                self._tuned("paged_prefill", rows - decodes),
            )
        return out.view(rows, -1)

    def _project(self, layer: LayerWeights, which: int, site: int, x: Tensor, lora: StepLora | None) -> Tensor:
        linear = (layer.qkv, layer.o, layer.gate_up, layer.down)[which]
        y = linear(x)
        if lora is not None:
            lora.apply(site + which, x, y)
        return y

    def _norm(self, norm: RmsNorm, x: Tensor) -> Tensor:
        return rms_norm.rms_norm(x, norm.weight, norm.floor, self._tuned("rms_norm", len(x)))

    def _add_norm(self, residual: Tensor, y: Tensor, norm: RmsNorm) -> Tensor:
        alpha, config = self.config.residual_multiplier, self._tuned("add_rms_norm", len(y))
        return rms_norm.add_rms_norm(residual, y, alpha, norm.weight, norm.floor, config)

    def _tuned(self, kernel: str, rows: int) -> Any:
        return tuned.lookup(self.gpu, kernel, rows, self.weights.embedding.dtype).config
