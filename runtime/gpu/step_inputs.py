"""What a step's kernels read besides weights and K/V: integers, laid out on the host and uploaded in one copy."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.lora_tiles import BASE, TILE_FIELDS, Tiles, lay_tiles
from runtime.chunk import Chunk
from runtime.request import Request

ALIGNMENT = 16  # integers: kernels are compiled for pointers that are aligned, and would be again for others
NO_SLOT = -1  # of a padding row: its K/V go nowhere


class StepShape(NamedTuple):
    """How large the parts of a step are; a CUDA graph is captured for one.

    `tokens` rows, of which the first `decodes` are a request each; then `prefills` requests with several. `width`
    blocks of the longest table, `logits` rows that are sampled, `tiles` and `logit_tiles` under adapters, 0 where none
    applies to any row or to any logits, of `height` rows at most.
    """

    tokens: int
    decodes: int
    prefills: int
    width: int
    logits: int
    tiles: int
    logit_tiles: int
    height: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Integers of each part, in the order of StepInputs."""
        requests = self.decodes + self.prefills
        tiles, logit_tiles = TILE_FIELDS * self.tiles, TILE_FIELDS * self.logit_tiles
        each = (requests * self.width, requests, self.prefills + 1, self.logits, tiles, logit_tiles)
        return (self.tokens, self.tokens, self.tokens, *each)

    @property
    def total(self) -> int:
        """Integers of all parts, each of which begins aligned."""
        return sum(map(_aligned, self.sizes))


class StepInputs(NamedTuple):
    """The parts, all int32. `token_ids`, `positions` and `slots` (where K/V go) are (T,), `block_tables` (S, width).

    `context_lens` (S,) count each request's tokens, the step's among them. `query_starts` (prefills + 1,) say where
    each prefill's rows begin behind the `decodes`. Tiles without a height are of no adapters.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    block_tables: Tensor
    context_lens: Tensor
    query_starts: Tensor
    logit_rows: Tensor
    tiles: Tiles
    logit_tiles: Tiles
    decodes: int


class StepBuffer:
    """Room for any step of at most `capacity` integers on the host and on the device, at addresses that stay.

    A CUDA device has two on the host, by turns: one may still be on its way when the next step is written.
    """

    def __init__(self, capacity: int, device: torch.device):
        on_cuda = device.type == "cuda"
        self._hosts = [torch.zeros(capacity, dtype=torch.int32, pin_memory=on_cuda) for _ in range(1 + on_cuda)]
        self._uploads = [torch.cuda.Event() for _ in self._hosts] if on_cuda else []
        self._device = torch.zeros(capacity, dtype=torch.int32, device=device) if on_cuda else self._hosts[0]
        self._turn = 0

    def on_host(self, shape: StepShape) -> StepInputs:
        """Where a step of a shape is to be written; what was there has been uploaded."""
        if self._uploads:
            self._uploads[self._turn].synchronize()
        return _parts(self._hosts[self._turn], shape)

    def on_device(self, shape: StepShape) -> StepInputs:
        """Where kernels find it after `upload`: for a shape always in the same places."""
        return _parts(self._device, shape)

    def upload(self, shape: StepShape) -> None:
        """Copy what was written, in order with the kernels and without waiting."""
        if self._uploads:
            self._device[: shape.total].copy_(self._hosts[self._turn][: shape.total], non_blocking=True)
            self._uploads[self._turn].record()
            self._turn = (self._turn + 1) % len(self._hosts)


def step_shape(chunks: Sequence[Chunk], block_size: int, tiles: int, logit_tiles: int, height: int) -> StepShape:
    """The shape of a step of these chunks, decoding ones first, and no padding."""
    decodes = sum(chunk.length == 1 for chunk in chunks)
    longest = max(chunk.start + chunk.length for chunk in chunks)
    return StepShape(
        tokens=sum(chunk.length for chunk in chunks),
        decodes=decodes,
        prefills=len(chunks) - decodes,
        width=-(-longest // block_size),
        logits=sum(chunk.samples for chunk in chunks),
        tiles=tiles,
        logit_tiles=logit_tiles,
        height=height,
    )


def write_step(
    chunks: Sequence[Chunk],
    shape: StepShape,
    block_size: int,
    slots_of: Sequence[int],
    out: StepInputs,
    carried: Mapping[Request, int] = MappingProxyType({}),
) -> None:
    """Lay chunks out in a shape that has room for them; `slots_of` is each chunk's adapter slot, BASE for none.

    A token that nobody knows yet, as the step before samples it, is -1 - i where it is the i-th of that step's: which,
    `carried` says of a request. Rows and requests that are left over read nothing, write nothing and give zeros.
    """
    parts = [_numpy(part) for part in out[:7]]
    token_ids, positions, slots, tables, contexts, starts, logit_rows = parts
    lora_slots = np.full(shape.tokens, BASE, np.int32)
    row = sampled = 0
    for index, (chunk, lora_slot) in enumerate(zip(chunks, slots_of, strict=True)):
        request, start, length, samples = chunk
        stop, rows = start + length, slice(row, row + length)
        blocks = np.array(request.blocks[: -(-stop // block_size)], np.int32)
        place = np.arange(start, stop, dtype=np.int32)
        token_ids[rows] = request.token_ids[start:stop] or [-1 - carried[request]]
        positions[rows] = place
        slots[rows] = blocks[place // block_size] * block_size + place % block_size
        tables[index, : len(blocks)] = blocks
        contexts[index] = stop
        lora_slots[row + min(max(request.invocation_start - start, 0), length) : row + length] = lora_slot
        row += length
        if samples:
            logit_rows[sampled] = row - 1
            sampled += 1
    token_ids[row:], positions[row:], slots[row:] = 0, 0, NO_SLOT
    contexts[len(chunks) :] = 0
    logit_rows[sampled:] = 0
    lengths = (chunk.length for chunk in chunks[shape.decodes :])
    starts[:] = [0, *accumulate(lengths)]
    if shape.tiles:
        lay_tiles(lora_slots, shape.height, _numpy(out.tiles.fields))
    if shape.logit_tiles:
        wanted = lora_slots[logit_rows]
        wanted[sampled:] = BASE
        lay_tiles(wanted, shape.height, _numpy(out.logit_tiles.fields))


def _parts(buffer: Tensor, shape: StepShape) -> StepInputs:
    tokens, positions, slots, tables, contexts, starts, logits, tiles, logit_tiles = _cut(buffer, shape.sizes)
    return StepInputs(
        tokens,
        positions,
        slots,
        tables.view(-1, shape.width),
        contexts,
        starts,
        logits,
        Tiles(tiles.view(-1, TILE_FIELDS), shape.height),
        Tiles(logit_tiles.view(-1, TILE_FIELDS), shape.height),
        shape.decodes,
    )


def _cut(buffer: Tensor, sizes: Sequence[int]) -> Iterator[Tensor]:
    first = 0
    for size in sizes:
        yield buffer[first : first + size]
        first += _aligned(size)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _numpy(part: Tensor) -> np.ndarray:
    return part.numpy()
