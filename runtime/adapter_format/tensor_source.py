"""Reads the tensors of an untrusted adapter from a file or from arrays in memory."""

from collections.abc import Iterator, Mapping
from io import BufferedReader
from typing import Protocol

import numpy as np

from runtime.adapter_format.errors import InvalidAdapter
from runtime.adapter_format.safetensors_header import CAST, FILE, ITEM_BYTES, TensorEntry, consecutive, read_header
from runtime.adapter_format.weight_dtypes import NAMES

CHUNK_BYTES = 1024 * 1024  # a multiple of every item size


class TensorSource(Protocol):
    """Tensors by the names that their author gave them.

    `chunks` yields one tensor's bytes piece by piece; a piece is valid until the next one is read.
    """

    @property
    def tensors(self) -> Mapping[str, TensorEntry]: ...

    def chunks(self, name: str) -> Iterator[memoryview]: ...


class FileTensors:
    """The tensors of a safetensors file. Raises InvalidAdapter for its header, and in `chunks` for truncated data."""

    def __init__(self, file: BufferedReader) -> None:
        header = read_header(file)
        self.tensors = header.tensors
        self._file, self._data_offset = file, header.data_offset
        self._chunk = memoryview(bytearray(CHUNK_BYTES))

    def chunks(self, name: str) -> Iterator[memoryview]:
        entry = self.tensors[name]
        self._file.seek(self._data_offset + entry.start)
        left = entry.stop - entry.start
        while left:
            count = self._file.readinto(self._chunk[:left])
            if not count or count % ITEM_BYTES[entry.dtype]:
                raise InvalidAdapter(FILE, "was truncated while it was read")
            left -= count
            yield self._chunk[:count]


class ArrayTensors:
    """The tensors of float32, float16 and uint16 arrays; uint16 holds the bits of bfloat16."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        shapes = {}
        for name, array in arrays.items():
            dtype = NAMES.get(array.dtype)
            if dtype is None:
                raise InvalidAdapter(
                    name, f"is {array.dtype}, expected float32, float16 or uint16 (bfloat16's bits)", CAST
                )
            shapes[name] = dtype, array.shape
        self.tensors = consecutive(shapes)
        self._arrays = arrays

    def chunks(self, name: str) -> Iterator[memoryview]:
        data = np.ascontiguousarray(self._arrays[name]).reshape(-1).view(np.uint8).data
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]
