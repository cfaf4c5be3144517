"""What an adapter changes of each projection, embedding and norm: one description for every layout."""

import math
from collections.abc import Callable, Iterator
from functools import reduce
from typing import NamedTuple, Protocol

import numpy as np

from runtime.adapter_format.canonical import AdapterConfig
from runtime.adapter_format.errors import InvalidAdapter
from runtime.adapter_format.safetensors_header import Header
from runtime.adapter_format.tensors import (
    BIAS_LEAF,
    GAIN_LEAF,
    MAGNITUDE_LEAF,
    ROWS_LEAF,
    TRAIN_AGAIN,
    WEIGHT_LEAF,
)
from runtime.adapter_format.weight_dtypes import HELD, widened
from runtime.models.config import ModelConfig
from runtime.models.sites import Part, Site

Pause = Callable[[], None]


LENGTHS_LEAF = "lengths"  # what DoRA divides by, where a rank's part of the base does not tell it


class BaseWeights(Protocol):
    """The base's own weights, as a runner computes with them: DoRA and trained biases depend on them."""

    def bias(self, module: str) -> np.ndarray | None:
        """A projection's bias, (out,) float32; None if it has none."""
        ...

    def lengths(self, module: str, a: np.ndarray, b: np.ndarray, scale: float, pause: Pause) -> np.ndarray:
        """‖W + scale · BA‖ for each output of a module, (out,) float32; `a` (rank, in) and `b` (out, rank) are float32.

        Calls `pause` before each piece of some milliseconds.
        """
        ...


class AdaptedPart(NamedTuple):
    """What an adapter changes of one module: y = (W x + scale · BAx) · gain + bias, where W may be its own."""

    module: str
    place: int  # among the site's projections
    columns: slice  # of the site's output
    inputs: int
    rank: int  # 0: it has no A and B
    lora_bias: bool
    own_bias: bool  # instead of the base's
    dora: bool  # gains that depend on the base
    own_gains: bool  # of IA³: they scale the base's bias too
    own_weight: bool  # instead of the base's; a norm's weight too
    tokens: tuple[int, ...]  # the rows of the embedding or the head that it replaces, as the file has them
    embedding: bool
    offset: float = 0.0  # of a norm: what is added to its weight

    @property
    def is_norm(self) -> bool:
        return self.inputs == 0

    @property
    def gains(self) -> bool:
        return self.dora or self.own_gains

    @property
    def width(self) -> int:
        width: int = self.columns.stop - self.columns.start
        return width

    def has_bias(self, base: BaseWeights | None) -> bool:
        """Whether anything is added to the outputs. Raises InvalidAdapter where that depends on a base not at hand."""
        depends = self.dora or (self.own_bias and not self.own_weight)
        if depends and _known(base, self.module).bias(self.module) is not None:
            return True
        return self.lora_bias or self.own_bias

    def ordered_tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """The tokens in ascending order, int32, and the row of each in the file."""
        order = np.argsort(np.array(self.tokens))
        return np.array(self.tokens, np.int32)[order], order


class TensorNames(NamedTuple):
    """The tensors of one module in a canonical file."""

    a: str
    b: str
    bias: str


def tensor_names(module: str, embedding: bool) -> TensorNames:
    """Return the names of a module's tensors; an embedding's A and B have names of their own."""
    a, b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    return TensorNames(f"{module}.{a}", f"{module}.{b}", f"{module}.lora_B.bias")


def adapted_sites(model: ModelConfig, config: AdapterConfig, header: Header) -> list[list[AdaptedPart]]:
    """Return the changed parts of each site: of `model.sites()`, then of `model.norm_modules()`.

    Raises InvalidAdapter for tensors that do not fit this model.
    """
    norms = [Site(0, (Part(module, model.hidden_size),)) for module in model.norm_modules()]
    sites = [*model.sites(), *norms]
    found = [list(_adapted_parts(site, i == model.embed_site, config, header)) for i, site in enumerate(sites)]
    if model.norm_offset:
        found = [
            [part._replace(offset=model.norm_offset) if part.is_norm else part for part in parts] for parts in found
        ]
    placed = {part.module for parts in found for part in parts if part.rank}
    for module in config.scales.keys() ^ placed:
        raise InvalidAdapter(module, "is not a projection of this model")
    return found


def _adapted_parts(site: Site, embedding: bool, config: AdapterConfig, header: Header) -> Iterator[AdaptedPart]:
    column, tensors = 0, header.tensors
    for place, (module, width) in enumerate(site.parts):
        columns = slice(column, column + width)
        column += width
        names = tensor_names(module, embedding)
        rank = 0
        if names.a in tensors and names.b in tensors:
            a, b = tensors[names.a].shape, tensors[names.b].shape
            if a != (a[0], site.in_features) or b != (width, a[0]):
                raise InvalidAdapter(module, f"has A {list(a)} and B {list(b)}, which do not fit this model")
            rank = a[0]
        part = AdaptedPart(
            module=module,
            place=place,
            columns=columns,
            inputs=site.in_features,
            rank=rank,
            lora_bias=names.bias in tensors,
            own_bias=f"{module}.{BIAS_LEAF}" in tensors,
            dora=f"{module}.{MAGNITUDE_LEAF}" in tensors,
            own_gains=f"{module}.{GAIN_LEAF}" in tensors,
            own_weight=f"{module}.{WEIGHT_LEAF}" in tensors,
            tokens=config.token_indices.get(module, ()),
            embedding=embedding,
        )
        _check_replacements(part, header)
        if rank or part.own_gains or part.own_bias or part.own_weight or part.tokens:
            yield part


def _check_replacements(part: AdaptedPart, header: Header) -> None:
    """A store may hold files of other models, so shapes are checked again."""
    width, inputs = part.width, part.inputs
    matrix = (inputs, width) if part.embedding else (width, inputs) if inputs else (width,)
    expected: list[tuple[bool, str, tuple[int, ...]]] = [
        (part.own_bias, f"{part.module}.{BIAS_LEAF}", (width,)),
        (part.dora, f"{part.module}.{MAGNITUDE_LEAF}", (width,)),
        (part.own_weight, f"{part.module}.{WEIGHT_LEAF}", matrix),
        (bool(part.tokens), rows_name(part, header), (len(part.tokens), width if part.embedding else inputs)),
    ]
    if part.own_gains and math.prod(header.tensors[f"{part.module}.{GAIN_LEAF}"].shape) != width:
        raise InvalidAdapter(f"{part.module}.{GAIN_LEAF}", f"does not fit this model, expected {width} values")
    for present, name, shape in expected:
        if present and (name not in header.tensors or header.tensors[name].shape != shape):
            raise InvalidAdapter(name, f"does not fit this model, expected shape {list(shape)}")


def rows_name(part: AdaptedPart, header: Header) -> str:
    """The tensor of a part's rows; those of a tied head are the embedding's."""
    own = f"{part.module}.{ROWS_LEAF}"
    return own if own in header.tensors else f"model.embed_tokens.{ROWS_LEAF}"


def stored(header: Header, data: np.ndarray, name: str) -> tuple[np.ndarray, str]:
    """Return a tensor as the file holds it, and its dtype there."""
    dtype, shape, start, stop = header.tensors[name]
    held = data[header.data_offset + start : header.data_offset + stop].view(HELD[dtype])
    return held.reshape(shape), dtype


class PartContent(NamedTuple):
    """A part's tensors in a canonical file in memory, `data` (bytes), with what follows from the base's."""

    part: AdaptedPart
    scale: float
    header: Header
    data: np.ndarray
    base: BaseWeights | None

    def exact(self, name: str) -> np.ndarray:
        """A tensor in float32."""
        return widened(*stored(self.header, self.data, name))

    def norm_weight(self) -> np.ndarray:
        """What a norm multiplies by, (out,) float32."""
        weight: np.ndarray = self.exact(f"{self.part.module}.{WEIGHT_LEAF}") + np.float32(self.part.offset)
        return weight

    def gains(self, pause: Pause) -> np.ndarray:
        """What multiplies each output, (out,) float32. Raises InvalidAdapter where a row of DoRA has no length."""
        if self.part.own_gains:
            return self.exact(f"{self.part.module}.{GAIN_LEAF}").reshape(-1)
        module, names = self.part.module, tensor_names(self.part.module, self.part.embedding)
        if f"{module}.{LENGTHS_LEAF}" in self.header.tensors:
            lengths = self.exact(f"{module}.{LENGTHS_LEAF}")
        else:
            a, b = (np.ascontiguousarray(self.exact(name)) for name in (names.a, names.b))
            lengths = _known(self.base, module).lengths(module, a, b, self.scale, pause)
        if not lengths.all():
            what = "divides by a row of zeros: the base's and BA cancel out"
            raise InvalidAdapter(f"{module}.{MAGNITUDE_LEAF}", what, TRAIN_AGAIN)
        with np.errstate(all="ignore"):  # what overflows is refused
            gains: np.ndarray = self.exact(f"{module}.{MAGNITUDE_LEAF}") / lengths
        if not np.isfinite(gains).all():
            what = "overflows float32 when it is divided by its row's length"
            raise InvalidAdapter(f"{module}.{MAGNITUDE_LEAF}", what, TRAIN_AGAIN)
        return gains

    def bias(self, gains: np.ndarray | None) -> np.ndarray:
        """What is added to the outputs, (out,) float32. Outputs of the base's weight have its bias, scaled."""
        part, module = self.part, self.part.module
        terms = []
        if part.lora_bias:
            terms.append(np.float32(self.scale) * self.exact(tensor_names(module, part.embedding).bias))
        if part.own_weight and part.own_bias:
            terms.append(self.exact(f"{module}.{BIAS_LEAF}"))
        elif part.own_bias or gains is not None:
            before = _known(self.base, module).bias(module)
            before = np.zeros(part.width, np.float32) if before is None else before
            after = self.exact(f"{module}.{BIAS_LEAF}") if part.own_bias else before
            terms.append(after - (before if gains is None else gains * before))
        return reduce(np.add, terms)

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """The tokens in ascending order, (n,) int32, and their rows, (n, hidden) float32."""
        tokens, order = self.part.ordered_tokens()
        return tokens, self.exact(rows_name(self.part, self.header))[order]


def _known(base: BaseWeights | None, module: str) -> BaseWeights:
    if base is None:
        raise InvalidAdapter(module, "depends on the base's weights, which are not at hand")
    return base
