"""The base model's own tensors, read from its checkpoint to compare them with the copies that an adapter may hold."""

from collections.abc import Callable, Iterable
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from runtime.adapter_format.errors import ITS_BASE, WITHOUT_COPIES, InvalidAdapter
from runtime.adapter_format.safetensors_header import LENGTH_BYTES, exact_json_object
from runtime.adapter_format.weight_dtypes import HELD, rounded, widened
from runtime.config import EngineConfig
from runtime.models.text_part import text_name

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class StoredTensor(NamedTuple):
    """A tensor of the base as its checkpoint stores it."""

    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    data: memoryview  # its raw bytes


BaseTensor = Callable[[str], StoredTensor]  # by the tensor's name; raises InvalidAdapter for one that the base lacks


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


def base_tensors(engine: EngineConfig) -> BaseTensor | None:
    """Return a reader of the checkpoint that an engine serves; None for an engine with random weights."""
    directory = Path(engine.model)

    def read(name: str) -> StoredTensor:
        with _file(directory, name).open("rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            entries = exact_json_object(file.read(length), name)  # a base has dtypes that an adapter has not
            entry = next((entry for stored, entry in entries.items() if text_name(stored) == name), None)
            if entry is None or entry["dtype"] not in HELD:
                raise _quantized(name) if entry or _holds_module(entries, name) else _missing(name)
            data = memoryview(mmap(file.fileno(), 0, access=ACCESS_READ))
        start, stop = (LENGTH_BYTES + length + offset for offset in entry["data_offsets"])
        return StoredTensor(entry["dtype"], tuple(entry["shape"]), data[start:stop])

    return read if engine.load_format == "safetensors" else None


def differs_by(chunks: Iterable[memoryview], dtype: str, base: StoredTensor) -> float | None:
    """Return the largest difference of a copy from the base's tensor that rounding to the copy's dtype explains.

    It is 0 for a copy of equal values, and None for one that differs by more. The copy comes in `chunks`, and is
    compared in float32, which holds the values of every dtype exactly.
    """
    stored = np.frombuffer(base.data, HELD[base.dtype])
    largest, done = 0.0, 0
    for chunk in chunks:
        copied = widened(np.frombuffer(chunk, HELD[dtype]), dtype)
        own = widened(stored[done : done + len(copied)], base.dtype)
        done += len(copied)
        if np.array_equal(copied, own):
            continue
        if not np.array_equal(copied, widened(rounded(own, dtype), dtype)):
            return None
        largest = max(largest, float(np.abs(copied - own).max()))
    return largest


def _file(directory: Path, name: str) -> Path:
    index = directory / INDEX
    if not index.exists():
        return directory / SINGLE
    files = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
    for stored, file in files.items():
        if text_name(stored) == name:
            return directory / file
    raise _quantized(name) if _holds_module(files, name) else _missing(name)


def _holds_module(stored: Iterable[str], name: str) -> bool:
    """Whether there are other tensors of the module of a weight, in which it is quantised."""
    module = name.removesuffix("weight")
    return any(text_name(each).startswith(module) for each in stored)


def _quantized(name: str) -> InvalidAdapter:
    return InvalidAdapter(name, "is quantised in this base, so that a copy cannot be compared", WITHOUT_COPIES)


def _missing(name: str) -> InvalidAdapter:
    return InvalidAdapter(name, "is not in the base, which an adapter cannot extend", ITS_BASE)
