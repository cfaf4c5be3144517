"""The decoder as a program of the compiled kernels."""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.cpu.compiled import structs
from kernels.cpu.compiled.panels import Panels
from kernels.cpu.compiled.program import Form, Part, Pool, Program
from runtime.cpu.panel_base import EMBEDDING, HEAD, PanelBase
from runtime.models.config import DOWN, GATE_UP, OUT, QKV, SITES_PER_LAYER, ModelConfig
from runtime.models.layers import Linear, RmsNorm
from runtime.models.weights import LayerWeights, Weights

PADDING = 16  # floats between rows: rows of 4 KiB would all lie in the same lines of the first cache
Pack = Callable[[Tensor], Panels]


class CompiledDecoder:
    """The forward pass of one model, recorded once for up to `rows` rows and `logits` rows of logits.

    `weights` lose each matrix when it has been packed, so that there is never a second copy of the model.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        kv: list[Tensor],
        block_size: int,
        pool: Pool,
        rows: int,
        logits: int,
        pack: Pack,
    ) -> None:
        self.config = config
        self.program = Program(pool)
        self.block_size = block_size
        self._pack = pack
        self.base = PanelBase()  # the weights by module
        q, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self._x = _buffer(rows, config.hidden_size)
        self._normed = _buffer(rows, config.hidden_size)
        self._qkv = _buffer(rows, q + 2 * kv_width)
        self._mixed = _buffer(rows, q)
        self._inner = _buffer(rows, config.intermediate_size)
        self._last = _buffer(logits, config.hidden_size)
        self.logits = _buffer(logits, config.vocab_size)
        self.best = (structs.Best * logits)()
        self._record(weights, kv)

    def _record(self, weights: Weights, kv: list[Tensor]) -> None:
        config, program = self.config, self.program
        embedding = self._pack(weights.embedding)
        head = embedding if config.tie_embeddings else self._pack(weights.lm_head.weight)
        self.base.panels |= {EMBEDDING: embedding, HEAD: head}
        program.embed(embedding, self._x, config.embed_site, config.embedding_multiplier)
        for index in range(config.num_layers):
            layer, site = weights.layers.pop(0), index * SITES_PER_LAYER
            self._attention(layer, site, kv[index], 2 * index)
            self._mlp(layer, site, 2 * index + 1)
        self._norm(weights.norm, self._x, self._last, 2 * config.num_layers, of_logits=True)
        # A row's logits are scaled as they are written
        scale = 1.0 / config.logits_scaling
        program.linear(self._last, [Part(head, None)], self.logits, config.lm_head_site, scale=scale, of_logits=True)
        program.find_best(self.logits, self.best)

    def _attention(self, layer: LayerWeights, site: int, kv: Tensor, norm: int) -> None:
        config, program = self.config, self.program
        heads, head_dim = config.num_heads, config.head_dim
        scale = head_dim**-0.5 if config.attention_multiplier is None else config.attention_multiplier
        norms, eps = None, 0.0
        if layer.qk_norm is not None:  # a row for each query head and then each key head, the same within either
            plain, eps = layer.qk_norm.plain.float(), layer.qk_norm.eps
            norms = plain[0], plain[heads]
        self._norm(layer.attention_norm, self._x, self._normed, norm)
        self._linear(layer.qkv, site + QKV, self._normed, self._qkv)
        program.rotate_write(self._qkv, kv, heads, norms, eps)
        program.attention(self._qkv, kv, self._mixed, heads, self.block_size, scale)
        self._linear(layer.o, site + OUT, self._mixed, self._x, "add", config.residual_multiplier)

    def _mlp(self, layer: LayerWeights, site: int, norm: int) -> None:
        self._norm(layer.mlp_norm, self._x, self._normed, norm)
        self._linear(layer.gate_up, site + GATE_UP, self._normed, self._inner, "gated")
        self._linear(layer.down, site + DOWN, self._inner, self._x, "add", self.config.residual_multiplier)

    def _norm(self, norm: RmsNorm, x: Tensor, out: Tensor, index: int, *, of_logits: bool = False) -> None:
        """`index` is the norm's place in `ModelConfig.norms`."""
        site = self.config.norm_site(index)
        self.program.rms_norm(x, norm.plain.float(), norm.eps, out, of_logits=of_logits, site=site)

    def _linear(
        self, linear: Linear, site: int, x: Tensor, out: Tensor, form: Form = "store", scale: float = 1.0
    ) -> None:
        modules = [part.module for part in self.config.sites()[site].parts]
        widths = [part.out_features for part in self.config.sites()[site].parts]
        biases = [None] * len(widths) if linear.bias is None else torch.split(linear.bias.float(), widths)
        weights = map(self._pack, torch.split(linear.weight, widths))
        parts = [Part(*part) for part in zip(weights, biases, strict=True)]
        for module, part in zip(modules, parts, strict=True):
            self.base.panels[module] = part.weight
            if part.bias is not None:
                self.base.biases[module] = part.bias
        self.program.linear(x, parts, out, site, form, scale)

    def forward(self, step: structs.Step) -> None:
        """Write every token's K and V, and `logits` and `best` for the step's rows of logits."""
        self.program.run(step)

    def best_of(self, rows: int) -> list[structs.Best]:
        """The first rows of `best`."""
        return self.best[:rows]


def _buffer(rows: int, width: int) -> Tensor:
    return torch.zeros(rows, width + PADDING)[:, :width]
