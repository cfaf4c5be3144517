"""The decoder as a program of the compiled kernels."""

import torch
from torch import Tensor

from kernels.cpu.compiled import structs
from kernels.cpu.compiled.program import Form, Part, Pool, Program
from runtime.cpu.weight_panels import WeightPanels
from runtime.models.config import DOWN, GATE_UP, OUT, QKV, SITES_PER_LAYER, ModelConfig
from runtime.models.layers import Linear, RmsNorm
from runtime.models.weights import Checkpoint, LayerWeights

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
        q, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self._x = _buffer(rows, config.hidden_size)
        self._normed = _buffer(rows, config.hidden_size)
        self._qkv = _buffer(rows, q + 2 * kv_width)
        self._mixed = _buffer(rows, q)
        self._inner = _buffer(rows, config.intermediate_size)
        self._last = _buffer(logits, config.hidden_size)
        self.logits = _buffer(logits, config.vocab_size)
        self.best = (structs.Best * logits)()
        self._record(checkpoint, kv)

    def _record(self, checkpoint: Checkpoint, kv: list[Tensor]) -> None:
        config, program = self.config, self.program
        embedding = self._panels.embedding(checkpoint.embedding())
        head = embedding if config.tie_embeddings else self._panels.head(checkpoint.lm_head())
        program.embed(embedding, self._x, config.embed_site, config.embedding_multiplier)
        for index in range(config.num_layers):
            self._layer(checkpoint.layer(index), index * SITES_PER_LAYER, kv[index])
        self._norm(checkpoint.norm(), self._x, self._last, of_logits=True)
        # A row's logits are scaled as they are written
        scale = 1.0 / config.logits_scaling
        program.linear(self._last, [Part(head, None)], self.logits, config.lm_head_site, scale=scale, of_logits=True)
        program.find_best(self.logits, self.best)

    def _layer(self, layer: LayerWeights, site: int, kv: Tensor) -> None:
        self._attention(layer, site, kv)
        self._mlp(layer, site)

    def _attention(self, layer: LayerWeights, site: int, kv: Tensor) -> None:
        config, program = self.config, self.program
        heads, head_dim = config.num_heads, config.head_dim
        scale = head_dim**-0.5 if config.attention_multiplier is None else config.attention_multiplier
        norms, eps = None, 0.0
        if layer.qk_norm is not None:  # a row for each query head and then each key head, the same within either
            plain, eps = layer.qk_norm.plain.float(), layer.qk_norm.eps
            norms = plain[0], plain[heads]
        self._norm(layer.attention_norm, self._x, self._normed)
        self._linear(layer.qkv, site + QKV, self._normed, self._qkv)
        program.rotate_write(self._qkv, kv, heads, norms, eps)
        program.attention(self._qkv, kv, self._mixed, heads, self.block_size, scale)
        self._linear(layer.o, site + OUT, self._mixed, self._x, "add", config.residual_multiplier)

    def _mlp(self, layer: LayerWeights, site: int) -> None:
        self._norm(layer.mlp_norm, self._x, self._normed)
        self._linear(layer.gate_up, site + GATE_UP, self._normed, self._inner, "gated")
        self._linear(layer.down, site + DOWN, self._inner, self._x, "add", self.config.residual_multiplier)

    def _norm(self, norm: RmsNorm, x: Tensor, out: Tensor, *, of_logits: bool = False) -> None:
        self.program.rms_norm(x, norm.plain.float(), norm.eps, out, of_logits=of_logits)

    def _linear(
        self, linear: Linear, site: int, x: Tensor, out: Tensor, form: Form = "store", scale: float = 1.0
    ) -> None:
        widths = [part.out_features for part in self.config.sites()[site].parts]
        biases = [None] * len(widths) if linear.bias is None else torch.split(linear.bias.float(), widths)
        weights = self._panels.projection(linear, widths)
        parts = [Part(*part) for part in zip(weights, biases, strict=True)]
        self.program.linear(x, parts, out, site, form, scale)

    def forward(self, step: structs.Step) -> None:
        """Write every token's K and V, and `logits` and `best` for the step's rows of logits."""
        self.program.run(step)

    def best_of(self, rows: int) -> list[structs.Best]:
        """The first rows of `best`."""
        return self.best[:rows]


def _buffer(rows: int, width: int) -> Tensor:
    return torch.zeros(rows, width + PADDING)[:, :width]
