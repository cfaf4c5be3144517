"""The tensors of a checkpoint, by the names of an unquantised one: all of each, or a rank's part."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from runtime.models.config import ModelConfig
from runtime.models.cuts import part_of, quantized_part
from runtime.models.shards import Shard, TensorCut
from runtime.models.stacked_experts import BLOCKS, SCALES
from runtime.models.text_part import is_vision, text_name
from runtime.quantization.formats import InvalidWeight
from runtime.quantization.modules import QuantizedModules
from runtime.quantization.weight import QuantizedWeight

_log = logging.getLogger(__name__)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WEIGHT = ".weight"
FLOATS = ("F32", "F16", "BF16")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}


class InvalidCheckpoint(ValueError):
    """The weights do not match the configuration; the message names the tensor or the file."""


class _Stored(NamedTuple):
    """A tensor in an open file, under the file's own name."""

    file: Any
    name: str

    def tensor(self) -> Tensor:
        tensor: Tensor = self.file.get_tensor(self.name)
        return tensor

    def part(self, cut: TensorCut) -> Tensor:
        """Read a part, and nothing else of the file."""
        if cut.is_whole:
            return self.tensor()
        entry = self.file.get_slice(self.name)
        part = torch.zeros(cut.shape(tuple(entry.get_shape())), dtype=DTYPES[entry.get_dtype()])
        for source, target in cut.moves():
            part[target] = entry[source]
        return part


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


Read = Callable[[str], Tensor]  # by name
Shapes = dict[str, tuple[int, ...]]


class Source(NamedTuple):
    """Where tensors come from, by the name of the tensor that an unquantised checkpoint has."""

    read: Read  # the rank's part; dequantised in float32, if the checkpoint holds it quantised
    whole: Callable[[str], Tensor | None]  # the same of the whole tensor; None: it was made at random, or is in a stack
    # The rank's part as the checkpoint holds it quantised; None: it holds it in floats, or a part of it cannot be so
    quantized: Callable[[str], QuantizedWeight | None]


def random_tensors(shard: Shard, shapes: Shapes, device: torch.device | str) -> Source:
    """Make random tensors on the device, of a size that keeps activations near 1; norms are ones."""
    generator = torch.Generator(device).manual_seed(0)

    def read(name: str) -> Tensor:
        shape = shapes[name]
        if name.endswith((BLOCKS, SCALES)):  # any codes; scales that are small enough
            low, high = (0, 256) if name.endswith(BLOCKS) else (118, 120)
            return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator, device=device)
        if len(shape) == 1 and name.endswith("norm.weight"):
            return torch.ones(shape, device=device)
        scale: float = shape[-1] ** -0.5
        return torch.randn(shape, generator=generator, device=device) * scale

    # Parts are cut from whole tensors, so that all ranks have parts of the same ones
    return Source(lambda name: part_of(read(name), shard.tensor(name)), lambda name: None, lambda name: None)


def open_tensors(shard: Shard, shapes: Shapes, directory: Path) -> Source:
    """Open every file of a checkpoint and check its tensors against `shapes`, those of whole ones, before reading data.

    Raises InvalidCheckpoint.
    """
    config = shard.whole
    found: dict[str, _Stored] = {}
    for path in _files(directory):
        try:
            file: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise InvalidCheckpoint(f"{path.name} is not a readable safetensors file: {error}") from error
        for stored_name in file.offset_keys():
            name = text_name(stored_name)
            if name in found:
                raise InvalidCheckpoint(f"tensor {name} is in {path.name} and in another file of the checkpoint")
            found[name] = _Stored(file, stored_name)

    def get(name: str) -> Tensor:
        return found[name].tensor()

    matrices = [name.removesuffix(WEIGHT) for name, shape in shapes.items() if len(shape) == 2]
    of_modules = None if config.experts is not None and config.experts.mxfp4 else config.quantization
    quantized = QuantizedModules(of_modules, matrices, found)
    plain = {name: shape for name, shape in shapes.items() if name.removesuffix(WEIGHT) not in quantized}
    needed = {name for module in matrices if module in quantized for name in quantized.needed(module)}
    _check_tied_head(config, found)
    ignored = {name for name in found if name.endswith("rotary_emb.inv_freq") or (config.vision and is_vision(name))}
    ignored |= quantized.ignored()
    if config.tie_embeddings:
        ignored.add(HEAD)
    ignored |= _zero_biases(quantized, found.keys() - shapes.keys(), get)
    _check_names(needed | plain.keys(), found.keys() - (ignored - needed))
    for name, shape in plain.items():
        file, stored_name = found[name]
        _check_tensor(name, shape, file.get_slice(stored_name))

    def read_quantized(name: str) -> QuantizedWeight | None:
        module = name.removesuffix(WEIGHT)
        if module not in quantized:
            return None
        try:
            return quantized.read(module, shapes[name], get)
        except InvalidWeight as error:
            raise InvalidCheckpoint(str(error)) from error

    said: set[str] = set()

    def quantized_of_rank(name: str) -> QuantizedWeight | None:
        weight, cut = read_quantized(name), shard.module(name.removesuffix(WEIGHT))
        part = None if weight is None else quantized_part(weight, cut)
        sort = name.removesuffix(WEIGHT).rpartition(".")[2]
        if weight is not None and part is None and sort not in said:
            said.add(sort)
            _log.info("%s is dequantised, as all %s: ranks' parts begin among inputs that have one scale", name, sort)
        return part

    def read(name: str) -> Tensor:
        weight, cut = read_quantized(name), shard.tensor(name)
        if weight is None:
            return found[name].part(cut)
        part = quantized_part(weight, shard.module(name.removesuffix(WEIGHT)))
        return part_of(weight.dequantized(), cut) if part is None else part.dequantized()

    def whole(name: str) -> Tensor | None:
        weight = read_quantized(name)
        if weight is None:
            return get(name) if name in found else None
        return weight.dequantized()

    return Source(read, whole, quantized_of_rank)


def _zero_biases(quantized: QuantizedModules, names: set[str], get: Read) -> set[str]:
    """Biases of zeros, which some programs write for every module that they have quantised."""
    biases = {name for name in names if name.endswith(".bias") and name.removesuffix(".bias") in quantized}
    return {name for name in biases if not get(name).any()}


def _files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if not index.exists():
        if not (directory / SINGLE).exists():
            gguf = any(directory.glob("*.gguf"))
            advice = (
                ": GGUF is not read; save it with transformers (from_pretrained with gguf_file) first" if gguf else ""
            )
            raise InvalidCheckpoint(f"{directory} holds neither {SINGLE} nor {INDEX}{advice}")
        return [directory / SINGLE]
    try:
        names = sorted(set(msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values()))
    except msgspec.DecodeError as error:
        raise InvalidCheckpoint(f"{INDEX} must be JSON with an object weight_map of tensor to file: {error}") from error
    for name in names:
        if not (directory / name).exists():
            raise InvalidCheckpoint(f"{INDEX} names the file {name}, which does not exist")
    return [directory / name for name in names]


def _check_names(needed: set[str], found: set[str]) -> None:
    for what, names in (("lacks", needed - found), ("holds tensors that nothing uses:", found - needed)):
        if names:
            listed = sorted(names)
            more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
            raise InvalidCheckpoint(f"the checkpoint {what} {', '.join(listed[:8])}{more}")


def _check_tensor(name: str, shape: tuple[int, ...], entry: Any) -> None:
    if tuple(entry.get_shape()) != shape:
        raise InvalidCheckpoint(
            f"tensor {name} has shape {tuple(entry.get_shape())} where the configuration makes it {shape}"
        )
    supported = ("U8",) if name.endswith((BLOCKS, SCALES)) else FLOATS
    if entry.get_dtype() not in supported:
        raise InvalidCheckpoint(f"tensor {name} is {entry.get_dtype()}; supported are {', '.join(supported)}")


def _check_tied_head(config: ModelConfig, found: Mapping[str, _Stored]) -> None:
    """Refuse a head that differs from the embedding, although the configuration ties them; an equal copy is ignored."""
    if not config.tie_embeddings or not {HEAD, EMBEDDING} <= found.keys():
        return
    if not torch.equal(found[HEAD].tensor(), found[EMBEDDING].tensor()):
        raise InvalidCheckpoint(f"{HEAD} differs from {EMBEDDING}, although tie_word_embeddings is true")
