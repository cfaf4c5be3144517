"""The base model's own tensors, for adapters that repeat one: an equal copy is accepted, another is not."""

import json
from mmap import ACCESS_READ, mmap
from pathlib import Path

from runtime.adapter_format.canonical import BaseTensor, InvalidAdapter
from runtime.adapter_format.safetensors_header import read_header
from runtime.adapter_format.tensors import StoredTensor
from runtime.config import EngineConfig

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def base_tensors(engine: EngineConfig) -> BaseTensor | None:
    """A reader of the checkpoint that an engine serves; None when its weights are made up."""
    directory = Path(engine.model)

    def read(name: str) -> StoredTensor:
        with _file(directory, name).open("rb") as file:
            header = read_header(file)
            if name not in header.tensors:
                raise InvalidAdapter(name, "is not in the base, which an adapter cannot extend")
            entry = header.tensors[name]
            data = memoryview(mmap(file.fileno(), 0, access=ACCESS_READ))
        start = header.data_offset + entry.start
        return StoredTensor(entry.dtype, entry.shape, data[start : start + entry.stop - entry.start])

    return read if engine.load_format == "safetensors" else None


def _file(directory: Path, name: str) -> Path:
    index = directory / _INDEX
    if not index.exists():
        return directory / _SINGLE
    files = json.loads(index.read_bytes())["weight_map"]
    if name not in files:
        raise InvalidAdapter(name, "is not in the base, which an adapter cannot extend")
    return directory / files[name]
