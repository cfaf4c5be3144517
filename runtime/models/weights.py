"""Loads a checkpoint's tensors: checks names and shapes, stacks and packs them for the decoder."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from runtime.models.config import GATE_UP, ROUTER, SITES_PER_LAYER, ModelConfig
from runtime.models.cuts import part_of
from runtime.models.experts import ExpertsConfig
from runtime.models.layers import CutProjectionNorms, Linear, ProjectionNorms, RmsNorm
from runtime.models.shards import Shard
from runtime.models.sites import Site
from runtime.models.stacked_experts import Projection, read_stacked, stacked_shapes
from runtime.models.stored_tensors import (
    EMBEDDING,
    HEAD,
    WEIGHT,
    Shapes,
    Source,
    open_tensors,
    random_tensors,
)
from runtime.output.progress import progress
from runtime.parallel.group import RankGroup

QkNorms = RmsNorm | ProjectionNorms | CutProjectionNorms | None


class LayerWeights(NamedTuple):
    """The weights of one layer."""

    attention_norm: RmsNorm | None
    qkv: Linear
    qk_norm: QkNorms  # of heads: a row for each query head and then each key head
    sinks: Tensor | None  # (heads,) float32, what a score would be that no token has
    o: Linear
    after_attention: RmsNorm | None
    mlp_norm: RmsNorm | None
    mlp: "Mlp | Experts"
    after_mlp: RmsNorm | None


class Mlp(NamedTuple):
    """One gated MLP."""

    gate_up: Linear
    down: Linear


class SharedExpert(NamedTuple):
    """An MLP that every row goes through beside its experts."""

    mlp: Mlp
    gate: Linear | None  # one output, whose sigmoid the MLP's are multiplied by


class Experts(NamedTuple):
    """Routed experts, each a gated MLP."""

    router: Linear
    each: list[Mlp]
    shared: SharedExpert | None


class Weights(NamedTuple):
    embedding: Tensor
    layers: list[LayerWeights]
    norm: RmsNorm
    lm_head: Linear


def load_weights(
    config: ModelConfig,
    directory: Path,
    dtype: torch.dtype,
    load_format: Literal["safetensors", "dummy"],
    device: torch.device | str = "cpu",
    *,
    pack: bool = True,
) -> Weights:
    """Load the whole model; the parameters are those of `open_checkpoint`."""
    return open_checkpoint(config, directory, dtype, load_format, device, pack=pack).weights()


def open_checkpoint(
    config: ModelConfig,
    directory: Path,
    dtype: torch.dtype,
    load_format: Literal["safetensors", "dummy"],
    device: torch.device | str = "cpu",
    *,
    shard: Shard | None = None,
    pack: bool = True,
    keep_quantized: bool = False,
    bars: bool = False,
) -> "Checkpoint":
    """Check a checkpoint's names and shapes, for weights that are read in `dtype` to `device` as they are asked for.

    With a `shard`, only that part of each tensor is read. `load_format` "dummy" reads no file and makes random weights,
    the same at every start. Without `pack`, the weights
    of projections stay (out, in), for kernels with a layout of their own; with `keep_quantized`, those whose parts are
    all quantised stay so. `bars` shows as a bar how many layers are read. Raises InvalidCheckpoint, naming tensors that
    are missing, unused, of a different shape or not floating point.
    """
    shard, shapes = shard or Shard(config, RankGroup()), tensor_shapes(config)
    dummy = load_format == "dummy"
    source = random_tensors(shard, shapes, device) if dummy else open_tensors(shard, shapes, directory)
    return Checkpoint(shard, dtype, device, pack, keep_quantized, source, bars)


def tensor_shapes(config: ModelConfig) -> Shapes:
    """Return the shape of every tensor that a checkpoint of this model must hold, by name."""
    sites = config.sites()
    shapes: Shapes = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_layers):
        for site, bias in zip(_layer_sites(sites, layer), _site_biases(config, layer), strict=True):
            shapes |= _site_shapes(site, bias)
        if config.sinks:
            shapes[f"model.layers.{layer}.self_attn.sinks"] = (config.num_heads,)
        for norm in filter(None, config.norms):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (config.hidden_size,)
        for norm, heads in _qk_norms(config).items():
            shapes[f"model.layers.{layer}.self_attn.{norm}.weight"] = (heads * config.head_dim,)
    if config.experts is not None:
        stacked = [stacked_shapes(config.experts, layer, config.hidden_size) for layer in config.experts.layers]
        modules = sites[config.shared_site(config.experts.layers[0]) if stacked[0] else config.lm_head_site + 1 :]
        for each in (*stacked, *(_site_shapes(site, bias=False) for site in modules)):
            shapes |= each
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_embeddings:
        shapes[HEAD] = (config.head_width, config.hidden_size)
    return shapes


def _site_shapes(site: Site, bias: bool) -> Shapes:
    shapes: Shapes = {}
    for module, out in site.parts:
        shapes[f"{module}.weight"] = (out, site.in_features)
        if bias:
            shapes[f"{module}.bias"] = (out,)
    return shapes


def _layer_sites(sites: Sequence[Site], layer: int) -> Sequence[Site]:
    return sites[layer * SITES_PER_LAYER : (layer + 1) * SITES_PER_LAYER]


def _qk_norms(config: ModelConfig) -> dict[str, int]:
    """Return the norms of queries and keys, each with the heads that its weights cover."""
    if config.qk_norm == "none":
        return {}
    whole = config.qk_norm == "projections"
    return {"q_norm": config.num_heads if whole else 1, "k_norm": config.num_kv_heads if whole else 1}


def _site_biases(config: ModelConfig, layer: int) -> tuple[bool, bool, bool, bool]:
    of_experts = config.experts is not None and config.has_experts(layer)
    third = config.experts.names.router_bias if config.experts is not None and of_experts else config.mlp_bias
    return config.qkv_bias, config.o_bias, third, config.mlp_bias


class Checkpoint:
    """Builds the decoder's weights from a checkpoint's tensors; keeps no reference to a tensor that it has returned.

    A caller that takes one layer after another and packs it never has the whole model in 16 bits.
    """

    def __init__(
        self,
        shard: Shard,
        dtype: torch.dtype,
        device: torch.device | str,
        pack: bool,
        keep_quantized: bool,
        source: Source,
        bars: bool,
    ):
        self.shard, self.dtype, self.device, self.source = shard, dtype, device, source
        self.pack, self.keep_quantized, self._bars = pack, keep_quantized, bars
        self.config = shard.model
        self.shapes, self.sites = tensor_shapes(self.config), self.config.sites()

    def weights(self) -> Weights:
        embedding = self.embedding()
        return Weights(
            embedding=embedding,
            layers=[self.layer(index) for index in self.layers()],
            norm=self.norm(),
            lm_head=self.tied_head(embedding) if self.config.tie_embeddings else self.lm_head(),
        )

    def embedding(self) -> Tensor:
        return self._stacked([EMBEDDING])

    def norm(self) -> RmsNorm:
        return self._norm("model.norm.weight")

    def tied_head(self, embedding: Tensor) -> Linear:
        """The head of a model that takes its embedding for it."""
        return Linear(part_of(embedding, self.shard.tensor(HEAD)), pack=self.pack)

    def lm_head(self) -> Linear:
        """The head of a model that does not take its embedding for it."""
        return self._linear(self.sites[self.config.lm_head_site])

    def layers(self) -> Iterable[int]:
        """The number of each layer, while it is shown how many of them have been read."""
        return progress(range(self.config.num_layers), "loading the model", bars=self._bars, unit="layer")

    def layer(self, index: int) -> LayerWeights:
        prefix, norms = f"model.layers.{index}", self.config.norms
        qkv, o = map(self._linear, _layer_sites(self.sites, index)[:GATE_UP])
        return LayerWeights(
            attention_norm=self._layer_norm(prefix, norms.attention),
            qkv=qkv,
            qk_norm=self._qk_norm(f"{prefix}.self_attn"),
            sinks=self._stacked([f"{prefix}.self_attn.sinks"]).float() if self.config.sinks else None,
            o=o,
            after_attention=self._layer_norm(prefix, norms.after_attention),
            mlp_norm=self._layer_norm(prefix, norms.mlp),
            mlp=self._experts(index)
            if self.config.has_experts(index)
            else self._mlp(index * SITES_PER_LAYER + GATE_UP),
            after_mlp=self._layer_norm(prefix, norms.after_mlp),
        )

    def _mlp(self, site: int) -> Mlp:
        return Mlp(*map(self._linear, self.sites[site : site + 2]))

    def _experts(self, layer: int) -> Experts:
        assert self.config.experts is not None
        router = self._linear(self.sites[layer * SITES_PER_LAYER + ROUTER])
        return Experts(router, self._routed(layer, self.config.experts), self._shared(layer, self.config.experts))

    def _routed(self, layer: int, experts: ExpertsConfig) -> list[Mlp]:
        if experts.names.stacked is None:
            return [self._mlp(self.config.expert_site(layer, expert)) for expert in range(experts.count)]
        each = read_stacked(experts, layer, self.source.read, keep_quantized=self.keep_quantized)
        return [Mlp(*map(self._of_stack, projections)) for projections in each]

    def _of_stack(self, projection: Projection) -> Linear:
        weight, bias = projection.weight, None if projection.bias is None else self._own(projection.bias)
        if isinstance(weight, Tensor):
            return Linear(self._own(weight), bias, pack=self.pack)
        return Linear(None, bias, quantized=weight)

    def _shared(self, layer: int, experts: ExpertsConfig) -> SharedExpert | None:
        if not experts.shared_size:
            return None
        first = self.config.shared_site(layer)
        gate = self.sites[first + 2]
        return SharedExpert(self._mlp(first), self._linear(gate) if gate.parts else None)

    def whole(self, module: str) -> Tensor | None:
        """Read all of a module's weight, (out, in), of which a rank may have a part; None if it is no tensor there."""
        weight = self.source.whole(module + WEIGHT)
        return None if weight is None else weight.to(self.dtype)

    def _own(self, weight: Tensor) -> Tensor:
        """A copy of a part of a tensor in the dtype and on the device of all weights."""
        return torch.empty(weight.shape, dtype=self.dtype, device=self.device).copy_(weight)

    def _linear(self, site: Site) -> Linear:
        biases = [f"{part.module}.bias" for part in site.parts]
        bias = self._stacked(biases) if biases[0] in self.shapes else None
        names = [part.module + WEIGHT for part in site.parts]
        quantized = [self.source.quantized(name) for name in names] if self.keep_quantized else [None]
        if None not in quantized:
            return Linear(None, bias, quantized=[one for one in quantized if one is not None])
        return Linear(self._stacked(names), bias, pack=self.pack)

    def _norm(self, name: str) -> RmsNorm:
        weight, offset = self._stacked([name]), self.config.norm_offset
        return RmsNorm(weight.float() + offset if offset else weight, self.config.rms_norm_eps)

    def _layer_norm(self, layer: str, name: str | None) -> RmsNorm | None:
        return None if name is None else self._norm(f"{layer}.{name}.weight")

    def _qk_norm(self, attention: str) -> QkNorms:
        """Build the norm of queries and keys, which lie side by side: of heads, a row of weights for each."""
        if self.config.qk_norm == "none":
            return None
        q, k = (self._norm(f"{attention}.{name}.weight") for name in ("q_norm", "k_norm"))
        if self.config.qk_norm == "projections":
            norms, shard = ProjectionNorms(q, k), self.shard
            return norms if shard.group.size == 1 else CutProjectionNorms(norms, shard.widths, shard.group)
        heads = (q.plain.expand(self.config.num_heads, -1), k.plain.expand(self.config.num_kv_heads, -1))
        return RmsNorm(torch.cat(heads), self.config.rms_norm_eps)

    def _stacked(self, names: Sequence[str]) -> Tensor:
        """Stack the named tensors along the first dimension, each copied from the file into the result directly."""
        heights = [self.shapes[name][0] for name in names]
        out = torch.empty((sum(heights), *self.shapes[names[0]][1:]), dtype=self.dtype, device=self.device)
        for name, part in zip(names, torch.split(out, heights), strict=True):
            part.copy_(self.source.read(name))
        return out
