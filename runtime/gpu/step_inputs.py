"""The integers of a step: token ids, positions, slot mapping, block tables, tiles. One copy uploads them all."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.lora_tiles import BASE, TILE_FIELDS, Tiles, lay_tiles, most_tiles
from runtime.request import Request
from runtime.scheduler import Chunk

ALIGNMENT = 16  # integers; Triton compiles a kernel once more for pointers that are not aligned
NO_SLOT = -1  # the slot mapping of a padding row: its K/V are not written


class StepShape(NamedTuple):
    """The sizes of a step's parts. A CUDA graph serves one shape."""

    tokens: int  # rows: first one for each decoding request, then those of the prefills
    decodes: int  # requests with one row
    prefills: int  # requests with several rows
    width: int  # blocks of the longest block table
    logits: int  # rows that are sampled, or score a prompt
    tiles: int  # tiles of rows under adapters; 0 if no row is under one
    logit_tiles: int  # tiles of sampled rows under adapters; 0 if no adapter adapts the head
    height: int  # the most rows of a tile

    @classmethod
    def largest(cls, tokens: int, requests: int, width: int, height: int, scored: int = 0) -> "StepShape":
        """A shape with room for all steps of at most `tokens` tokens, `scored` of them scored, and `requests` requests.

        `height` is the least tile height of any step: the lower the tiles, the more there are.
        """
        tiles = most_tiles(tokens, requests, height)
        logits = requests + scored
        return cls(tokens, requests, requests, width, logits, tiles, logits, height)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Integers of each part, in the order of StepInputs."""
        requests = self.decodes + self.prefills
        tiles, logit_tiles = TILE_FIELDS * self.tiles, TILE_FIELDS * self.logit_tiles
        each = (requests * self.width, requests, self.prefills + 1, self.logits, tiles, logit_tiles)
        return (self.tokens, self.tokens, self.tokens, *each)

    @property
    def total(self) -> int:
        """Integers of all parts, each padded to ALIGNMENT."""
        return sum(map(_aligned, self.sizes))


class StepInputs(NamedTuple):
    """The parts of a step of T tokens and S requests. All tensors are int32."""

    token_ids: Tensor  # (T,); a token that the previous step samples is -1 - i for the i-th sampled row of that step
    positions: Tensor  # (T,)
    slot_mapping: Tensor  # (T,), the slot of the KV cache that each token's K and V are written to
    block_tables: Tensor  # (S, width)
    context_lens: Tensor  # (S,), the tokens of each request, this step's included
    query_starts: Tensor  # (prefills + 1,), the first row of each prefill, counted from the first prefill's
    logit_rows: Tensor  # (logits,), the rows that are sampled, and then those that score a prompt
    tiles: Tiles  # of all rows
    logit_tiles: Tiles  # of the sampled rows
    decodes: int


class StepBuffer:
    """Memory for steps of at most `capacity` integers on the host and on the device, at fixed addresses.

    For a CUDA device there are two host buffers, used in turn: the upload of one may not have ended when the next step
    is written.
    """

    def __init__(self, capacity: int, device: torch.device):
        on_cuda = device.type == "cuda"
        self._hosts = [torch.zeros(capacity, dtype=torch.int32, pin_memory=on_cuda) for _ in range(1 + on_cuda)]
        self._uploads = [torch.cuda.Event() for _ in self._hosts] if on_cuda else []
        self._device = torch.zeros(capacity, dtype=torch.int32, device=device) if on_cuda else self._hosts[0]
        self._turn = 0

    def on_host(self, shape: StepShape) -> StepInputs:
        """The host tensors to write a step to, after waiting until the buffer's last upload has ended."""
        if self._uploads:
            self._uploads[self._turn].synchronize()
        return _parts(self._hosts[self._turn], shape)

    def on_device(self, shape: StepShape) -> StepInputs:
        """The tensors that kernels read after `upload`. Their addresses depend on the shape alone."""
        return _parts(self._device, shape)

    def upload(self, shape: StepShape) -> None:
        """Copy the step that was written to the device, in stream order with the kernels, without waiting."""
        if self._uploads:
            self._device[: shape.total].copy_(self._hosts[self._turn][: shape.total], non_blocking=True)
            self._uploads[self._turn].record()
            self._turn = (self._turn + 1) % len(self._hosts)


def step_shape(chunks: Sequence[Chunk], block_size: int, tiles: int, logit_tiles: int, height: int) -> StepShape:
    """The shape of a step of these chunks, without padding; chunks of one token come first."""
    decodes = sum(chunk.length == 1 for chunk in chunks)
    longest = max(chunk.start + chunk.length for chunk in chunks)
    return StepShape(
        tokens=sum(chunk.length for chunk in chunks),
        decodes=decodes,
        prefills=len(chunks) - decodes,
        width=-(-longest // block_size),
        logits=sum(chunk.samples + len(chunk.scored) for chunk in chunks),
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
    """Write the parts of a step to `out`, which has a shape with room for the chunks.

    `slots_of` is each chunk's adapter slot, BASE for none. `carried` names the requests whose next token the previous
    step samples, with the index of their row among its sampled rows; such a token is written as -1 - index. Padding
    rows and padding requests read nothing, write no K/V and give zeros.
    """
    parts = [part.numpy() for part in out[:7]]
    token_ids, positions, slot_mapping, tables, contexts, starts, logit_rows = parts
    lora_slots = np.full(shape.tokens, BASE, np.int32)
    row = sampled = 0
    scored: list[int] = []
    for index, (chunk, lora_slot) in enumerate(zip(chunks, slots_of, strict=True)):
        request, start, length, samples = chunk
        stop, rows = start + length, slice(row, row + length)
        blocks = np.array(request.blocks[: -(-stop // block_size)], np.int32)
        place = np.arange(start, stop, dtype=np.int32)
        token_ids[rows] = request.token_ids[start:stop] or [-1 - carried[request]]
        positions[rows] = place
        slot_mapping[rows] = blocks[place // block_size] * block_size + place % block_size
        tables[index, : len(blocks)] = blocks
        contexts[index] = stop
        lora_slots[row + min(max(request.invocation_start - start, 0), length) : row + length] = lora_slot
        scored += (row + each for each in chunk.scored)
        row += length
        if samples:
            logit_rows[sampled] = row - 1
            sampled += 1
    token_ids[row:], positions[row:], slot_mapping[row:] = 0, 0, NO_SLOT
    contexts[len(chunks) :] = 0
    used = sampled + len(scored)
    logit_rows[sampled:used], logit_rows[used:] = scored, 0
    lengths = (chunk.length for chunk in chunks[shape.decodes :])
    starts[:] = [0, *accumulate(lengths)]
    if shape.tiles:
        lay_tiles(lora_slots, shape.height, out.tiles.fields.numpy())
    if shape.logit_tiles:
        sampled_slots = lora_slots[logit_rows]
        sampled_slots[used:] = BASE
        lay_tiles(sampled_slots, shape.height, out.logit_tiles.fields.numpy())


def _parts(buffer: Tensor, shape: StepShape) -> StepInputs:
    tokens, positions, slot_mapping, tables, contexts, starts, logits, tiles, logit_tiles = _cut(buffer, shape.sizes)
    return StepInputs(
        tokens,
        positions,
        slot_mapping,
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
