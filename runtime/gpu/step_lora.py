"""The adapters of one step for the fused decoder: two launches a site, one if all are hot, whatever the ranks."""

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import tuned
from kernels.grouped_lora import DECODE, PREFILL, ExpandConfig, ShrinkConfig, embedding_shrink, expand, shrink
from kernels.lora_tiles import Tiles
from runtime.gpu.expert_sorting import row_slots
from runtime.gpu.hot_adapters import HotLinear
from runtime.gpu.step_inputs import StepInputs, StepShape
from runtime.models.config import ModelConfig
from runtime.models.layers import Linear

DECODE_HEIGHT, PREFILL_HEIGHT = DECODE.heights[0], PREFILL.heights[1]  # the most rows of a tile; not measured
DECODE_SPLITS = max(config.split_k for config in DECODE.shrink)
PREFILL_SPLITS = max(config.split_k for config in PREFILL.shrink)


class LoraMemory(NamedTuple):
    """Device memory of the LoRA kernels. The addresses do not change while the engine runs, so graphs may use them."""

    arena: Tensor  # the weights of resident adapters
    table: Tensor  # the offset table, see kernels.offset_table
    between: Tensor  # (rows, width) float32, the results of a shrink, which its expand reads
    hots: Tensor  # by slot, see HotAdapters
    widths: list[list[int]]  # of each site's parts

    @classmethod
    def of(
        cls, model: ModelConfig, arena: Tensor, table: Tensor, hots: Tensor, tokens: int, decodes: int, width: int
    ) -> "LoraMemory":
        """Memory for steps of at most `tokens` rows, or `decodes` decoding requests, and `width` ranks at a site."""
        chosen = 1 if model.experts is None else model.experts.chosen
        rows = max(tokens * PREFILL_SPLITS, decodes * DECODE_SPLITS) * chosen
        widths = [[part.out_features for part in site.parts] for site in model.sites()]
        between = torch.empty((rows, width), dtype=torch.float32, device=arena.device)
        return cls(arena, table, between, hots, widths)


class StepLora:
    """The adapters of one step, of which the shape says what they need."""

    def __init__(self, model: ModelConfig, memory: LoraMemory, step: StepInputs, shape: StepShape, gpu: str):
        self._memory = memory
        tokens = len(step.token_ids)
        splits = DECODE_SPLITS if step.tiles.height == DECODE_HEIGHT else PREFILL_SPLITS
        # Slices of one buffer keep its strides for every width: Triton compiles a kernel for the strides' divisibility.
        self._between = memory.between[: tokens * splits].unflatten(0, (tokens, splits))[..., : shape.ranks]
        self._step, self._embedding, self._hot = step, shape.embedding, shape.hot
        self._embed_site, self._lm_head_site = model.embed_site, model.lm_head_site
        self._gpu = gpu
        self._configs: dict[tuple[str, int], Any] = {}

    def project(self, site: int, linear: Linear, x: Tensor) -> Tensor:
        """The linear's outputs, with LoRA on the rows under an adapter."""
        if self._hot and isinstance(linear, HotLinear):
            y, t = linear.with_shrinks(x)
            self._expand(t, y, site, self._step.tiles, self._memory.hots, linear.hot_ranks)
            return y
        y = linear(x)
        self.apply(site, x, y)
        return y

    def apply(self, site: int, x: Tensor, y: Tensor) -> None:
        """y += LoRA(x) in place, on the rows under an adapter."""
        self._apply(site, x, y, self._step.tiles)

    def apply_sorted(self, site: int, x: Tensor, y: Tensor, tiles: Tiles) -> None:
        """As `apply`, for rows that are sorted by expert; `site` is that of the first expert."""
        splits = self._between.shape[1]
        between = self._memory.between[: len(x) * splits].unflatten(0, (len(x), splits))[..., : self._between.shape[2]]
        self._apply(site, x, y, tiles, between)

    @cached_property
    def row_slots(self) -> Tensor:
        """The slot of each row's adapter, BASE for none."""
        return row_slots(self._step.tiles, len(self._step.token_ids))

    @property
    def most_slots(self) -> int:
        return len(self._memory.table)

    @property
    def adapters(self) -> int:
        """The most adapters that the step can have: it has a tile for each."""
        return len(self._step.tiles.fields)

    def apply_logits(self, x: Tensor, y: Tensor) -> None:
        """As `apply`, for the head and the sampled rows."""
        if len(self._step.logit_tiles.fields):
            self._apply(self._lm_head_site, x, y, self._step.logit_tiles)

    def embed(self, token_ids: Tensor, x: Tensor) -> None:
        """x += A[:, token_ids]ᵀ B in place, on the rows under an adapter of the embedding."""
        if not self._embedding:
            return
        arena, table, *_ = self._memory
        t = embedding_shrink(token_ids, self._embed_site, arena, table, self._step.tiles, self._between)
        self._expand(t, x, self._embed_site, self._step.tiles)

    def _apply(self, site: int, x: Tensor, y: Tensor, tiles: Tiles, between: Tensor | None = None) -> None:
        arena, table, *_ = self._memory
        config: ShrinkConfig = self._tuned("shrink", len(x))
        t = self._between if between is None else between
        self._expand(shrink(x, site, arena, table, tiles, t, config), y, site, tiles)

    def _expand(
        self, t: Tensor, y: Tensor, site: int, tiles: Tiles, hots: Tensor | None = None, hot_ranks: int = 0
    ) -> None:
        arena, table, *_ = self._memory
        config: ExpandConfig = self._tuned("expand", len(y))
        expand(t, y, site, arena, table, tiles, self._memory.widths[site], config, hots, hot_ranks)

    def _tuned(self, kernel: str, rows: int) -> Any:
        config = self._configs.get((kernel, rows))
        if config is None:
            kind = "decode" if self._step.tiles.height == DECODE_HEIGHT else "prefill"
            config = self._configs[kernel, rows] = tuned.lookup(self._gpu, f"{kind} {kernel}", rows).config
        return config


def tile_height(decodes: int, tokens: int) -> int:
    """The tile height of a step: low if every row is a decoding request's."""
    return DECODE_HEIGHT if decodes == tokens else PREFILL_HEIGHT
