"""Reads the header of a safetensors file strictly and writes one deterministically.

A file is eight bytes with the header's length (little endian), the header as JSON, and the tensors' data.
No data is read here: the header is checked against the file's size.
"""

import io
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple, NoReturn

from runtime.adapter_format.errors import CONVERT, InvalidAdapter, shown

MAX_HEADER_BYTES = 8 * 1024 * 1024  # A and B of three projections of 128 experts in 48 layers take 6 MB
LENGTH_BYTES = 8
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
ALIGNMENT = 8  # of the data's start, as the safetensors library pads it
FILE = "weights"  # the name of the whole file in errors

GATHER = (
    "set stage3_gather_16bit_weights_on_model_save of DeepSpeed's ZeRO-3, or use its zero_to_fp32.py, and save again"
)
CAST = "save the adapter's own weights in one of these, without quantising them"
AGAIN = "download it again, or save the adapter again with PEFT's save_pretrained"
_FOREIGN_BYTES = 512
# How files begin that are sent in place of another one, what they are, and what to do
_FOREIGN: tuple[tuple[bytes, str, str], ...] = (
    (
        rb"version https://git-lfs\.github\.com/spec",
        "is a Git LFS pointer, not the file that it points to",
        "fetch that with git lfs pull",
    ),
    (rb"\s*<(?:!doctype|html|\?xml)", "is a web page", "download the file itself, from the hub with hf download"),
    (rb"PK\x03\x04.{20,80}?/data\.pkl", "is a pickle of PyTorch (.bin, .pt)", CONVERT),
    (rb"PK\x03\x04", "is a zip archive", "unpack it, and send the files that are in it"),
    (rb"\x80[\x02-\x05]", "is a pickle (.bin, .pt)", CONVERT),
    (rb"GGUF", "is a GGUF file", "send the adapter from which it was made, as PEFT saved it"),
    (rb"\x1f\x8b", "is compressed with gzip", "unpack it, or send a tar.gz as application/gzip"),
    (
        rb"Entry not found|Invalid (?:username|credentials)|Access to|Repository not found",
        "is an error of the hub in place of the file",
        "check the repository's name and HF_TOKEN, and fetch it again",
    ),
)


def foreign_format(start: bytes) -> tuple[str, str] | None:
    """Return what a file is that begins so, and what to do about it; None for one that may be what was expected."""
    for pattern, what, step in _FOREIGN:
        if re.match(pattern, start, re.IGNORECASE | re.DOTALL):
            return what, step
    return None


class TensorEntry(NamedTuple):
    """The description of one tensor in a header."""

    dtype: str  # F32, F16 or BF16
    shape: tuple[int, ...]
    start: int  # bytes from the start of the data
    stop: int


class Header(NamedTuple):
    """The header of a file."""

    tensors: dict[str, TensorEntry]  # by name, in the header's order
    metadata: dict[str, str]
    data_offset: int  # where the data starts, in bytes from the start of the file


def read_header(file: BinaryIO) -> Header:
    """Read and check a file's header; the file's position afterwards is undefined.

    Raises InvalidAdapter for a header that is over MAX_HEADER_BYTES, is not exact JSON with unique keys, or does not
    describe every byte of the data once, and for a tensor that is not F32, F16 or BF16.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return _header(file.read, size)


def header_in(content: memoryview) -> Header:
    """Do as `read_header`, for a whole file in memory."""
    length = int.from_bytes(content[:LENGTH_BYTES], "little")
    start = io.BytesIO(content[: LENGTH_BYTES + min(length, MAX_HEADER_BYTES)])  # copies the header only
    return _header(start.read, len(content))


def _header(read: Callable[[int], bytes], size: int) -> Header:
    prefix = read(LENGTH_BYTES)
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES and (what := foreign_format(prefix + read(_FOREIGN_BYTES))) is not None:
        raise InvalidAdapter(FILE, *what)
    if not size:
        raise InvalidAdapter(FILE, "is empty", GATHER)
    if len(prefix) < LENGTH_BYTES:
        raise InvalidAdapter(FILE, f"is truncated: {size} bytes, expected a safetensors header", AGAIN)
    if length > MAX_HEADER_BYTES:
        raise InvalidAdapter(FILE, f"claims a header of {length} bytes, expected at most {MAX_HEADER_BYTES}", AGAIN)
    text = read(length)
    if len(text) < length:
        claimed = f"its header claims {length} bytes and {len(text)} are there"
        raise InvalidAdapter(FILE, f"is truncated: {claimed}", AGAIN)
    fields = exact_json_object(text, FILE)
    metadata = _metadata(fields.pop("__metadata__", {}))
    tensors = {name: _entry(name, value) for name, value in fields.items()}
    _check_cover(tensors, size - LENGTH_BYTES - length)
    return Header(tensors, metadata, LENGTH_BYTES + length)


def write_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Return the header of a file that holds `tensors` (name to dtype and shape) in the given order, without gaps."""
    fields: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name, (dtype, shape, start, stop) in consecutive(tensors).items():
        fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, stop)}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def consecutive(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, TensorEntry]:
    """Return the entries of tensors (name to dtype and shape) that lie end to end in the given order."""
    entries, offset = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, offset = offset, offset + ITEM_BYTES[dtype] * math.prod(shape)
        entries[name] = TensorEntry(dtype, shape, start, offset)
    return entries


def exact_json_object(text: bytes, field: str) -> dict[str, Any]:
    """Parse a JSON object strictly: duplicate keys at any level, NaN and bad UTF-8 raise InvalidAdapter."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise InvalidAdapter(field, f"has the JSON key {shown(twice)!r} twice, expected unique keys")
        return result

    def refuse_constant(constant: str) -> NoReturn:
        raise InvalidAdapter(field, f"has the value {constant}, which is not JSON")

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse_constant)
    except InvalidAdapter:
        raise
    except (ValueError, RecursionError) as error:
        what = foreign_format(text[:_FOREIGN_BYTES]) or (f"is not JSON: {shown(str(error))}", "")
        raise InvalidAdapter(field, *what) from None
    if not isinstance(value, dict):
        raise InvalidAdapter(field, "is not a JSON object")
    return value


def _metadata(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise InvalidAdapter("__metadata__", "expected an object of strings")
    return value


def _entry(name: str, value: object) -> TensorEntry:
    if not name or not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise InvalidAdapter(name or "''", "expected a tensor with exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise InvalidAdapter(name, f"has dtype {shown(dtype)}, expected F32, F16 or BF16", CAST)
    if isinstance(shape, list) and 0 in shape:
        raise InvalidAdapter(name, f"has no values, its shape is {shown(shape)}", GATHER)
    if not isinstance(shape, list) or not all(_is_count(n) and n > 0 for n in shape):
        raise InvalidAdapter(name, f"has shape {shown(shape)}, expected a list of positive integers")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise InvalidAdapter(name, f"has data_offsets {shown(offsets)}, expected two offsets in bytes")
    start, stop = offsets
    expected = ITEM_BYTES[dtype] * math.prod(shape)
    if stop - start != expected:
        raise InvalidAdapter(name, f"spans {stop - start} bytes, expected {expected} for {dtype} {shape}")
    return TensorEntry(dtype, tuple(shape), start, stop)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_cover(tensors: Mapping[str, TensorEntry], data_bytes: int) -> None:
    """Refuse overlaps, holes, truncation and trailing bytes: the tensors must lie end to end and fill the data."""
    end = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1].start):
        if entry.start != end:
            what = "overlaps the tensor before it" if entry.start < end else "leaves a hole before it"
            raise InvalidAdapter(name, f"{what}: starts at byte {entry.start} of the data, expected {end}")
        end = entry.stop
    if end > data_bytes:
        raise InvalidAdapter(
            FILE, f"is truncated: its tensors end at byte {end} of the data, which has {data_bytes}", AGAIN
        )
    if end < data_bytes:
        raise InvalidAdapter(FILE, f"has {data_bytes - end} trailing bytes after its last tensor")
