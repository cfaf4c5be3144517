"""How an adapter lies in its extent where a rank has a part of the base: as an adapter for that part.

B of what is cut by outputs is cut as the base's weight is, and so is A of what is cut by inputs: what the ranks add to
the outputs of o and down are parts of LoRA's sum, which meet in the sum that the base needs anyway.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import msgspec
import numpy as np
from torch import Tensor

from runtime.adapter_format.canonical import AdapterConfig
from runtime.adapter_format.errors import InvalidAdapter
from runtime.adapter_format.safetensors_header import Header, consecutive
from runtime.adapter_format.tensors import BIAS_LEAF, GAIN_LEAF, MAGNITUDE_LEAF, WEIGHT_LEAF, module_of
from runtime.adapter_format.weight_dtypes import widened
from runtime.adapters.layout import AdapterLayout, LayOut
from runtime.adapters.parts import LENGTHS_LEAF, BaseWeights, Pause, adapted_sites, stored, tensor_names
from runtime.adapters.torch_base import HEAD, lengths_of
from runtime.models.config import ModelConfig
from runtime.models.shards import WHOLE, Shard, TensorCut

ReadWhole = Callable[[str], Tensor | None]  # the base's weight of a module; None: it cannot be read by itself


def lay_out_part(lay_out: Callable[..., Any], shard: Shard, base: BaseWeights, whole: ReadWhole) -> LayOut:
    """How `lay_out` lays adapters out for a rank's part; `base` has the part's weights."""
    if shard.group.size == 1:
        return partial(lay_out, base=base)
    return partial(_lay_out, lay_out, shard, base, whole)


def _lay_out(
    lay_out: Callable[..., Any],
    shard: Shard,
    base: BaseWeights,
    whole: ReadWhole,
    model: ModelConfig,
    config: AdapterConfig,
    header: Header,
) -> "CutLayout":
    adapted_sites(model, config, header)  # raises InvalidAdapter: what fits the whole model fits its parts
    cut = _cut_config(shard, config), _cut_header(shard, header)
    return CutLayout(lay_out(shard.model, *cut, base=base), shard, base, whole)


class CutLayout(NamedTuple):
    """The layout of a rank's part of an adapter, which is packed from the whole file."""

    part: AdapterLayout
    shard: Shard
    base: BaseWeights
    whole: ReadWhole

    @property
    def elements(self) -> int:
        return self.part.elements

    def check_ranks(self, most: int) -> None:
        self.part.check_ranks(most)

    def views(self, extent: Tensor) -> Any:
        return self.part.views(extent)

    def pack(
        self, config: AdapterConfig, header: Header, data: np.ndarray, extent: Tensor, pause: Callable[[], None]
    ) -> None:
        """Cut a canonical file, `data` (bytes), and write the part into an extent."""
        own = _cut_header(self.shard, header)
        part = np.zeros(max((entry.stop for entry in own.tensors.values()), default=0), np.uint8)
        for name in header.tensors:
            pause()
            source, target = stored(header, data, name)[0], stored(own, part, name)[0]
            _copy(source.reshape(-1) if name.endswith(f".{GAIN_LEAF}") else source, target, _cut_of(self.shard, name))
        for module in _with_lengths(self.shard, header):
            lengths = self._lengths(module, config.scales[module], header, data, pause)
            stored(own, part, f"{module}.{LENGTHS_LEAF}")[0][:] = lengths
        self.part.pack(_cut_config(self.shard, config), own, part, extent, pause)

    def _lengths(self, module: str, scale: float, header: Header, data: np.ndarray, pause: Pause) -> np.ndarray:
        """What DoRA divides by, of the outputs that this rank has; 1 for those that are none of the model's."""
        names = tensor_names(module, embedding=False)
        a, b = (np.ascontiguousarray(widened(*stored(header, data, name))) for name in (names.a, names.b))
        cut = self.shard.module(module)
        if cut.inputs is None:
            own = np.zeros(cut.by_output.shape(b.shape), np.float32)
            missing = np.ones(len(own), np.float32)
            for source, target in cut.by_output.moves():
                own[target], missing[target] = b[source], 0
            return self.base.lengths(module, a, own, scale, pause) + missing
        weight = self.whole(module)  # of which this rank holds some columns only
        if weight is None:
            what = "is DoRA's, and its base's weight cannot be read by itself, of which each rank has a part"
            raise InvalidAdapter(module, what, "set tensor_parallel_size (--tensor-parallel-size) to 1")
        return lengths_of(weight, a, b, scale, pause)


def _copy(source: np.ndarray, target: np.ndarray, cut: TensorCut) -> None:
    if cut.is_whole:
        target[...] = source
    for place, own in cut.moves():
        target[own] = source[place]


def _cut_config(shard: Shard, config: AdapterConfig) -> AdapterConfig:
    """The rows of the head that are other ranks' are at the place of no token."""
    if HEAD not in config.token_indices:
        return config
    start, stop, width = shard.head
    tokens = tuple(token - start if start <= token < stop else width - 1 for token in config.token_indices[HEAD])
    return msgspec.structs.replace(config, token_indices=config.token_indices | {HEAD: tokens})


def _cut_header(shard: Shard, header: Header) -> Header:
    """The tensors of the part, one behind another, with the lengths that DoRA needs."""
    parts: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, entry in header.tensors.items():
        shape = (math.prod(entry.shape),) if name.endswith(f".{GAIN_LEAF}") else entry.shape
        parts[name] = entry.dtype, _cut_of(shard, name).shape(shape)
    for module in _with_lengths(shard, header):
        parts[f"{module}.{LENGTHS_LEAF}"] = "F32", parts[f"{module}.{MAGNITUDE_LEAF}"][1]
    return Header(consecutive(parts), header.metadata, 0)


def _with_lengths(shard: Shard, header: Header) -> list[str]:
    """The modules of which a part of the base does not tell DoRA's lengths."""
    modules = (name.removesuffix(f".{MAGNITUDE_LEAF}") for name in header.tensors if name.endswith(MAGNITUDE_LEAF))
    return [module for module in modules if module in shard.modules]


def _cut_of(shard: Shard, name: str) -> TensorCut:
    module = module_of(name)
    cut, leaf = shard.module(module), name.removeprefix(f"{module}.")
    if leaf == WEIGHT_LEAF:
        return cut.weight
    if leaf in (BIAS_LEAF, "lora_B.bias"):
        return cut.bias(shard.group.rank)
    if leaf in ("lora_B.weight", MAGNITUDE_LEAF, GAIN_LEAF):
        return cut.by_output
    return cut.by_input if leaf == "lora_A.weight" else WHOLE
