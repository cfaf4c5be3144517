"""Composes the canonical file of a weighted sum of adapters from their canonical files.

A sum of low-rank products is one product: each module's A matrices lie below one another, (sum of ranks, in), and its
B matrices, each multiplied by its weight and scale, side by side, (out, sum of ranks). A module has the ranks of those
parts only that adapt it. The file is float32 with scale 1, so whatever reads it needs to know nothing of mixes.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from io import BufferedReader
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from blake3 import blake3

from runtime.adapter_format.canonical import CONFIG_KEY, AdapterConfig, read_canonical
from runtime.adapter_format.errors import InvalidAdapter
from runtime.adapter_format.safetensors_header import FILE, Header, write_header
from runtime.adapter_format.tensor_source import CHUNK_BYTES
from runtime.adapter_format.weight_dtypes import HELD, widened

A_LEAVES = ("lora_A.weight", "lora_embedding_A")
BIAS_LEAF = "lora_B.bias"
B_LEAVES = ("lora_B.weight", "lora_embedding_B", BIAS_LEAF)


class Part(NamedTuple):
    """One adapter of a mix."""

    path: Path  # of its canonical file
    weight: float


class Mix(NamedTuple):
    """What was composed."""

    digest: str  # BLAKE3 of the file, in hex
    rank: int  # the largest of all modules
    bytes: int  # the file's size


def compose(parts: Sequence[Part], target: Path, *, max_rank: int) -> Mix:
    """Write the canonical file of the sum of weight·delta over all parts to `target`; parts in one order, same bytes.

    All headers are checked before any data is read; the data passes through in pieces. A weight times a scale times a
    value is rounded once to float32. Raises InvalidAdapter for parts of different aLoRA invocations or shapes, for a
    module whose ranks add up to more than `max_rank`, and for a product that overflows float32; OSError. It leaves no
    file at `target` then.
    """
    with ExitStack() as stack:
        opened = [_open(part, stack) for part in parts]
        header, rank = _header(opened, max_rank)
        digest, size = blake3(), 0
        try:
            with target.open("xb") as out:
                for chunk in chain([header], _data(opened)):
                    digest.update(chunk)
                    size += out.write(chunk)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
    return Mix(digest.hexdigest(), rank, size)


class _Opened(NamedTuple):
    """One part whose header has been read."""

    file: BufferedReader
    config: AdapterConfig
    header: Header
    weight: float

    def factor(self, name: str) -> float:
        """What a B or a bias is multiplied by."""
        return self.weight * self.config.scales[_module(name)]

    def read(self, name: str, first: int, count: int) -> np.ndarray:
        """Some rows of a tensor as float32, (count, columns)."""
        entry = self.header.tensors[name]
        columns = entry.shape[1] if len(entry.shape) > 1 else 1
        held = HELD[entry.dtype]
        self.file.seek(self.header.data_offset + entry.start + first * columns * held.itemsize)
        content = self.file.read(count * columns * held.itemsize)
        if len(content) < count * columns * held.itemsize:
            raise InvalidAdapter(FILE, "was truncated while it was read")
        return widened(np.frombuffer(content, held), entry.dtype).reshape(count, columns)


def _open(part: Part, stack: ExitStack) -> _Opened:
    config, header, _ = read_canonical(part.path)
    for name in header.tensors:
        if not name.endswith((*A_LEAVES, *B_LEAVES)):
            reason = "is more than LoRA (DoRA, a trained bias, rows or modules of its own), which PEFT does not add up"
            raise InvalidAdapter(name, reason, "serve this adapter alone")
    return _Opened(stack.enter_context(part.path.open("rb")), config, header, part.weight)


def _module(name: str) -> str:
    return name.partition(".lora_")[0]


def _names(parts: Sequence[_Opened]) -> list[str]:
    return sorted({name for part in parts for name in part.header.tensors})


def _having(parts: Sequence[_Opened], name: str) -> list[_Opened]:
    return [part for part in parts if name in part.header.tensors]


def _header(parts: Sequence[_Opened], max_rank: int) -> tuple[bytes, int]:
    """The beginning of the file, and the largest rank."""
    invocation = parts[0].config.alora_invocation_tokens
    if any(part.config.alora_invocation_tokens != invocation for part in parts):
        what = "differs between the parts of the mix, expected one for all"
        raise InvalidAdapter("alora_invocation_tokens", what, "mix adapters of one invocation")
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    largest = 0
    for name in _names(parts):
        found = [part.header.tensors[name].shape for part in _having(parts, name)]
        stacked = 0 if name.endswith(A_LEAVES) else 1  # the axis of the ranks
        if len({shape[:stacked] + shape[stacked + 1 :] for shape in found}) > 1:
            what = f"has shapes {', '.join(map(str, found))} in the parts, which do not fit together"
            raise InvalidAdapter(name, what, "mix adapters of one base")
        shape = found[0]
        if not name.endswith(BIAS_LEAF):
            rank = sum(each[stacked] for each in found)
            if rank > max_rank:
                what = f"has rank {rank} in the mix, and max_lora_rank is {max_rank}"
                raise InvalidAdapter(_module(name), what, f"mix fewer, or start the server with --max-lora-rank {rank}")
            largest = max(largest, rank)
            shape = (*shape[:stacked], rank, *shape[stacked + 1 :])
        shapes[name] = "F32", shape
    scales = dict.fromkeys(map(_module, shapes), 1.0)
    config = AdapterConfig(alora_invocation_tokens=invocation, scales=scales)
    return write_header(shapes, {CONFIG_KEY: msgspec.json.encode(config, order="sorted").decode()}), largest


def _data(parts: Sequence[_Opened]) -> Iterator[bytes]:
    """The tensors in the header's order, in pieces of about CHUNK_BYTES."""
    for name in _names(parts):
        adding = _having(parts, name)
        blocks: Iterator[np.ndarray]
        if name.endswith(A_LEAVES):
            blocks = (block for part in adding for block in _rows(part, name))
        elif name.endswith(BIAS_LEAF):
            blocks = _scaled([adding], name)
        else:
            blocks = _scaled([[part] for part in adding], name)
        for block in blocks:
            yield block.tobytes()


def _rows(part: _Opened, name: str) -> Iterator[np.ndarray]:
    rows, columns = part.header.tensors[name].shape
    step = max(1, CHUNK_BYTES // (4 * columns))
    for first in range(0, rows, step):
        yield part.read(name, first, min(step, rows - first))


def _scaled(groups: Sequence[Sequence[_Opened]], name: str) -> Iterator[np.ndarray]:
    """Blocks of rows: the groups' columns side by side, each the weighted sum of its parts, rounded once."""
    tensors = [group[0].header.tensors[name] for group in groups]
    rows, widths = tensors[0].shape[0], [1 if len(each.shape) == 1 else each.shape[1] for each in tensors]
    step = max(1, CHUNK_BYTES // (4 * sum(widths)))
    for first in range(0, rows, step):
        count = min(step, rows - first)
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused below
            columns = [
                sum(
                    (part.read(name, first, count).astype(np.float64) * part.factor(name) for part in group),
                    np.float64(0),
                )
                for group in groups
            ]
            block = np.concatenate(columns, axis=1).astype("<f4")
        if not np.isfinite(block).all():
            what = "overflows float32 when it is multiplied by its weight in the mix"
            raise InvalidAdapter(name, what, "give it a smaller weight")
        yield block
