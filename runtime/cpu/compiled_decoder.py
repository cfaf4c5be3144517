"""The decoder as a program of the compiled kernels."""

from functools import partial

import torch
from torch import Tensor

from kernels.cpu.compiled import structs
from kernels.cpu.compiled.program import Form, Part, Pool, Program
from runtime.cpu.panel_base import EMBEDDING, HEAD, PanelBase
from runtime.cpu.weight_panels import WeightPanels
from runtime.models.config import DOWN, GATE_UP, OUT, QKV, ROUTER, SITES_PER_LAYER, ModelConfig
from runtime.models.experts import SITES_PER_EXPERT
from runtime.models.families import NormKind
from runtime.models.layers import Linear, ProjectionNorms, RmsNorm, rounded_to
from runtime.models.weights import Checkpoint, Experts, LayerWeights, SharedExpert

PADDING = 16  # floats between rows: rows of 4 KiB would all lie in the same lines of the first cache


class CompiledDecoder:
    """The forward pass of one model, recorded once for up to `rows` rows and `logits` rows of logits.

    Each layer is read and packed before the next, so that there is never a second copy of the model.
    """

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        kv: list[Tensor],
        block_size: int,
        pool: Pool,
        rows: int,
        logits: int,
        panels: WeightPanels,
    ) -> None:
        self.config = config
        self.program = Program(pool)
        self.block_size = block_size
        self._panels = panels
        self.base = PanelBase()  # the weights by module
        q, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self._x = _buffer(rows, config.hidden_size)
        self._normed = _buffer(rows, config.hidden_size)
        self._qkv = _buffer(rows, q + 2 * kv_width)
        self._mixed = _buffer(rows, q)
        self._inner = _buffer(rows, config.intermediate_size)
        if config.experts is not None:
            pairs = rows * config.experts.chosen
            self._scores = _buffer(rows, config.experts.count)
            self._shared_inner, self._shared_gate = _buffer(rows, config.experts.shared_size), _buffer(rows, 1)
            self._gathered, self._expert_inner = (
                _buffer(pairs, width) for width in (config.hidden_size, config.experts.intermediate_size)
            )
        self._sites = config.sites()
        self._last = _buffer(logits, config.hidden_size)
        self.logits = _buffer(logits, config.vocab_size)
        self.best = (structs.Best * logits)()
        self._record(checkpoint, kv)

    def _record(self, checkpoint: Checkpoint, kv: list[Tensor]) -> None:
        config, program = self.config, self.program
        embedding = self._panels.embedding(checkpoint.embedding())
        head = embedding if config.tie_embeddings else self._panels.head(checkpoint.lm_head())
        for module, weight in ((EMBEDDING, embedding), (HEAD, head)):
            self.base.add(module, [Part(weight, None)])
        multiplier = config.embedding_scale(partial(rounded_to, checkpoint.dtype))
        program.embed(embedding, self._x, config.embed_site, multiplier)
        for index in checkpoint.layers():
            self._layer(checkpoint.layer(index), index, kv[index])
        self._norm(checkpoint.norm(), self._x, self._last, config.last_norm_site, of_logits=True)
        # A row's logits are scaled as they are written
        form: Form = "capped" if config.logits_cap else "store"
        scale = config.logits_cap or 1.0 / config.logits_scaling
        program.linear(self._last, [Part(head, None)], self.logits, config.lm_head_site, form, scale, of_logits=True)
        program.find_best(self.logits, self.best)

    def _layer(self, layer: LayerWeights, index: int, kv: Tensor) -> None:
        self._attention(layer, index, kv)
        self._mlp(layer, index)

    def _attention(self, layer: LayerWeights, index: int, kv: Tensor) -> None:
        config, program, site = self.config, self.program, index * SITES_PER_LAYER
        normed = self._normed_rows(layer.attention_norm, index, "attention")
        self._linear(layer.qkv, site + QKV, normed, self._qkv)
        program.rotate_write(
            self._qkv,
            kv,
            config.num_heads,
            self._qk_norms(layer),
            config.rms_norm_eps,
            rope=config.rope_of(index),
            turned=config.turned(index),
            interleaved=config.rope.interleaved,
        )
        how = config.attention_scale, config.window(index), config.attention_cap, layer.sinks
        program.attention(self._qkv, kv, self._mixed, config.num_heads, self.block_size, *how)
        self._linear(layer.o, site + OUT, self._mixed, *self._target(layer.after_attention))
        self._add_normed(layer.after_attention, index, "after_attention")

    def _qk_norms(self, layer: LayerWeights) -> tuple[Tensor, Tensor] | None:
        """The weights of a layer's norms of queries and keys: of each head, or of all together."""
        norm = layer.qk_norm
        if isinstance(norm, ProjectionNorms):
            return norm.q.plain.float(), norm.k.plain.float()
        assert norm is None or isinstance(norm, RmsNorm), "several ranks compute with kernels torch"
        # A row for each query head and then each key head, the same within either
        return None if norm is None else (norm.plain[0].float(), norm.plain[self.config.num_heads].float())

    def _mlp(self, layer: LayerWeights, index: int) -> None:
        normed, site = self._normed_rows(layer.mlp_norm, index, "mlp"), index * SITES_PER_LAYER
        gate: Form = "gated_gelu" if self.config.gelu else "gated"
        if isinstance(layer.mlp, Experts):
            assert layer.after_mlp is None, "no family with experts has such a norm"
            self._experts(layer.mlp, index, normed, gate)
            return
        self._linear(layer.mlp.gate_up, site + GATE_UP, normed, self._inner, gate)
        self._linear(layer.mlp.down, site + DOWN, self._inner, *self._target(layer.after_mlp))
        self._add_normed(layer.after_mlp, index, "after_mlp")

    def _experts(self, experts: Experts, index: int, normed: Tensor, gate: Form) -> None:
        config, bias = self.config.experts, experts.router.bias
        assert config is not None
        weight, site = self._panels.router(experts.router), index * SITES_PER_LAYER + ROUTER
        router = Part(weight, None if bias is None else bias.float())
        self.base.add(self._sites[site].parts[0].module, [router])
        self.program.linear(normed, [router], self._scores, site)
        first = self.config.expert_site(index, 0)
        packed: list[tuple[list[Part], Part]] = []
        while experts.each:  # each is dropped when it has been packed
            mlp, site = experts.each.pop(0), first + SITES_PER_EXPERT * len(packed)
            [down] = self._parts(mlp.down, site + 1)
            packed.append((self._parts(mlp.gate_up, site), down))
        self.program.experts(
            normed,
            self._scores,
            self._gathered,
            self._expert_inner,
            self._x,
            packed,
            first,
            config.chosen,
            normalised=config.normalised,
            gate="gated_clamped" if config.limit else gate,
            limit=config.limit or 1.0,
            scale=self.config.residual_multiplier,
        )
        if experts.shared is not None:
            self._shared(experts.shared, index, normed, gate)

    def _shared(self, shared: SharedExpert, index: int, normed: Tensor, form: Form) -> None:
        site, scale = self.config.shared_site(index), self.config.residual_multiplier
        if shared.gate is not None:
            gate = Part(self._panels.router(shared.gate), None)
            self.base.add(self._sites[site + 2].parts[0].module, [gate])
            self.program.linear(normed, [gate], self._shared_gate, site + 2)
        self._linear(shared.mlp.gate_up, site, normed, self._shared_inner, form)
        down, gates = self._parts(shared.mlp.down, site + 1), None if shared.gate is None else self._shared_gate
        self.program.linear(self._shared_inner, down, self._x, site + 1, "add", scale, gates=gates)

    def _normed_rows(self, norm: RmsNorm | None, layer: int, kind: NormKind) -> Tensor:
        """The residual stream as a projection reads it."""
        if norm is None:
            return self._x
        self._norm(norm, self._x, self._normed, self.config.norm_site(layer, kind))
        return self._normed

    def _target(self, norm: RmsNorm | None) -> tuple[Tensor, Form, float]:
        """Where a projection goes whose outputs are added to the residual stream, through a norm if there is one."""
        return (self._x, "add", self.config.residual_multiplier) if norm is None else (self._normed, "store", 1.0)

    def _add_normed(self, norm: RmsNorm | None, layer: int, kind: NormKind) -> None:
        if norm is None:
            return
        assert self.config.residual_multiplier == 1.0, "no family scales what such a norm gives"
        self._norm(norm, self._normed, self._x, self.config.norm_site(layer, kind), add=True)

    def _norm(
        self, norm: RmsNorm, x: Tensor, out: Tensor, site: int, *, of_logits: bool = False, add: bool = False
    ) -> None:
        self.program.rms_norm(x, norm.plain.float(), norm.eps, out, of_logits=of_logits, add=add, site=site)

    def _linear(
        self, linear: Linear, site: int, x: Tensor, out: Tensor, form: Form = "store", scale: float = 1.0
    ) -> None:
        self.program.linear(x, self._parts(linear, site), out, site, form, scale)

    def _parts(self, linear: Linear, site: int) -> list[Part]:
        """The packed projections of a site."""
        modules, fused = self._sites[site].parts, self.config.fused_width(site)
        widths = [part.out_features for part in modules] if fused is None else [fused, fused]
        biases = [None] * len(widths) if linear.bias is None else torch.split(linear.bias.float(), widths)
        weights = self._panels.projection(linear, widths)
        parts = [Part(*part) for part in zip(weights, biases, strict=True)]
        each = [[part] for part in parts] if fused is None else [parts]
        for (module, _), own in zip(modules, each, strict=True):
            self.base.add(module, own)
        return parts

    def forward(self, step: structs.Step) -> None:
        """Write every token's K and V, and `logits` and `best` for the step's rows of logits."""
        self.program.run(step)

    def best_of(self, rows: int) -> list[structs.Best]:
        """The first rows of `best`."""
        return self.best[:rows]


def _buffer(rows: int, width: int) -> Tensor:
    return torch.zeros(rows, width + PADDING)[:, :width]
