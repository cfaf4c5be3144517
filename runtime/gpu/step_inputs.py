"""The integers of a step: token ids, positions, slot mapping, block tables, tiles. One copy uploads them all."""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.lora_tiles import BASE, TILE_FIELDS, Tiles, lay_tiles, most_tiles
from runtime.request import Request
from runtime.scheduler import Chunk

ALIGNMENT = 16  # integers; Triton compiles a kernel once more for pointers that are not aligned
NO_SLOT = -1  # the slot mapping of a padding row: its K/V are not written

IntArray = npt.NDArray[np.int32]


class StepShape(NamedTuple):
    """The sizes of a step's parts, and what is launched for its adapters. A CUDA graph serves one shape."""

    tokens: int  # rows: first one for each decoding request, then those of the prefills
    decodes: int  # requests with one row
    prefills: int  # requests with several rows
    width: int  # blocks of the longest block table
    logits: int  # rows that are sampled, or score a prompt
    tiles: int  # tiles of rows under adapters; 0 if no row is under one
    logit_tiles: int  # tiles of sampled rows under adapters; 0 if no adapter adapts the head
    height: int  # the most rows of a tile
    ranks: int = 0  # ranks at a site that programs are launched for
    embedding: bool = False  # an adapter may adapt the embedding
    hot: bool = False  # all adapters are hot: nothing is shrunk by a launch of its own

    @classmethod
    def largest(cls, tokens: int, requests: int, width: int, height: int, scored: int = 0) -> "StepShape":
        """A shape with room for all steps of at most `tokens` tokens, `scored` of them scored, and `requests` requests.

        `height` is the least tile height of any step: the lower the tiles, the more there are.
        """
        tiles = most_tiles(tokens, requests, height)
        logits = requests + scored
        return cls(tokens, requests, requests, width, logits, tiles, logits, height)

    @property
    def prompt_tokens(self) -> int:
        """Rows of the prefills."""
        return self.tokens - self.decodes

    @property
    def sizes(self) -> tuple[int, ...]:
        """Integers of each part, in the order in which they lie: the block tables last."""
        requests = self.decodes + self.prefills
        tiles, logit_tiles = TILE_FIELDS * self.tiles, TILE_FIELDS * self.logit_tiles
        each = (requests, self.prefills + 1, self.logits, tiles, logit_tiles, requests * self.width)
        return (self.tokens, self.tokens, self.tokens, *each)

    @property
    def total(self) -> int:
        """Integers of all parts, each padded to ALIGNMENT."""
        return self.used(self.width)

    def used(self, longest: int) -> int:
        """Integers up to the last of block tables of at most `longest` blocks."""
        *others, _ = self.sizes
        return sum(map(_aligned, others)) + _aligned((self.decodes + self.prefills) * longest)


class StepInputs(NamedTuple):
    """The parts of a step of T tokens and S requests. All tensors are int32."""

    token_ids: Tensor  # (T,); a token that the previous step samples is -1 - i for the i-th sampled row of that step
    positions: Tensor  # (T,)
    slot_mapping: Tensor  # (T,), the slot of the KV cache that each token's K and V are written to
    block_tables: Tensor  # (S, width), a column after the other: those that no table reaches need no upload
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
        return parts_of(self._hosts[self._turn], shape)

    def on_device(self, shape: StepShape) -> StepInputs:
        """The tensors that kernels read after `upload`. Their addresses depend on the shape alone."""
        return parts_of(self._device, shape)

    def upload(self, shape: StepShape, longest: int) -> None:
        """Copy the step that was written to the device, in stream order with the kernels, without waiting.

        Of the block tables, the first `longest` blocks are copied.
        """
        if self._uploads:
            used = shape.used(longest)
            self._device[:used].copy_(self._hosts[self._turn][:used], non_blocking=True)
            self._uploads[self._turn].record()
            self._turn = (self._turn + 1) % len(self._hosts)


def step_shape(chunks: Sequence[Chunk], block_size: int, tiles: int, height: int) -> StepShape:
    """The shape of a step of these chunks, without padding and what adapters need; chunks of one token come first."""
    decodes = count_decodes(chunks)
    return StepShape(
        tokens=sum(chunk.length for chunk in chunks),
        decodes=decodes,
        prefills=len(chunks) - decodes,
        width=longest_table(chunks, block_size),
        logits=sum(chunk.samples + len(chunk.scored) for chunk in chunks),
        tiles=tiles,
        logit_tiles=0,
        height=height,
    )


def count_decodes(chunks: Sequence[Chunk]) -> int:
    """How many chunks are of one token."""
    return sum(chunk.length == 1 for chunk in chunks)


def longest_table(chunks: Sequence[Chunk], block_size: int) -> int:
    """The most blocks that a chunk's request has up to the chunk's end."""
    return -(-max((chunk.start + chunk.length for chunk in chunks), default=0) // block_size)


def slots_of_rows(chunks: Sequence[Chunk], slots: Sequence[int]) -> IntArray:
    """The adapter slot of each row, BASE for none, where `slots` is that of each chunk."""
    rows = np.repeat(np.array(slots, np.int32), [chunk.length for chunk in chunks])
    row = 0
    for request, start, length, _ in chunks:
        if start < request.invocation_start:
            rows[row : row + min(request.invocation_start - start, length)] = BASE
        row += length
    return rows


def write_step(
    chunks: Sequence[Chunk],
    shape: StepShape,
    block_size: int,
    tables: Sequence[IntArray],
    row_slots: IntArray,
    out: StepInputs,
    carried: Mapping[Request, int] = MappingProxyType({}),
) -> None:
    """Write the parts of a step to `out`, which has a shape with room for the chunks.

    `tables` are the blocks of each chunk's request up to the chunk's end, `row_slots` is what `slots_of_rows` returns.
    `carried` names the requests whose next token the previous step samples, with the index of their row among its
    sampled rows; such a token is written as -1 - index. Padding rows and padding requests read nothing, write no K/V
    and give zeros: those of decodes lie before the prefills, the others at the end.
    """
    parts = [part.numpy() for part in out[:7]]
    token_ids, positions, slot_mapping, block_tables, contexts, starts, logit_rows = parts
    token_ids[:], positions[:], slot_mapping[:], contexts[:] = 0, 0, NO_SLOT, 0
    decodes = count_decodes(chunks)
    places = [chunk.start for chunk in chunks[:decodes]]
    token_ids[:decodes] = [_token(chunk, carried) for chunk in chunks[:decodes]]
    positions[:decodes] = places
    slot_mapping[:decodes] = [
        blocks[place // block_size] * block_size + place % block_size
        for place, blocks in zip(places, tables, strict=False)
    ]
    contexts[:decodes] = [place + 1 for place in places]
    ends = [shape.decodes]
    for chunk, blocks in zip(chunks[decodes:], tables[decodes:], strict=True):
        rows, stop = slice(ends[-1], ends[-1] + chunk.length), chunk.start + chunk.length
        place = np.arange(chunk.start, stop, dtype=np.int32)
        token_ids[rows] = chunk.request.token_ids[chunk.start : stop]
        positions[rows] = place
        slot_mapping[rows] = blocks[place // block_size] * block_size + place % block_size
        contexts[shape.decodes + len(ends) - 1] = stop
        ends.append(rows.stop)
    starts[:] = ends[-1] - shape.decodes
    starts[: len(ends)] = [end - shape.decodes for end in ends]
    indices = [*range(decodes), *range(shape.decodes, shape.decodes + len(chunks) - decodes)]
    for index, blocks in zip(indices, tables, strict=True):
        block_tables[index, : len(blocks)] = blocks
    firsts = [*range(decodes), *ends[:-1]]
    sampled = [first + chunk.length - 1 for first, chunk in zip(firsts, chunks, strict=True) if chunk.samples]
    scored = [first + row for first, chunk in zip(firsts, chunks, strict=True) for row in chunk.scored]
    used = len(sampled) + len(scored)
    logit_rows[:used], logit_rows[used:] = sampled + scored, 0
    if shape.tiles:
        padded = np.full(shape.tokens, BASE, np.int32)
        padded[:decodes], padded[shape.decodes : ends[-1]] = row_slots[:decodes], row_slots[decodes:]
        lay_tiles(padded, shape.height, out.tiles.fields.numpy())
        if shape.logit_tiles:
            sampled_slots = padded[logit_rows]
            sampled_slots[used:] = BASE
            lay_tiles(sampled_slots, shape.height, out.logit_tiles.fields.numpy())


def _token(chunk: Chunk, carried: Mapping[Request, int]) -> int:
    token_ids = chunk.request.token_ids
    return token_ids[chunk.start] if chunk.start < len(token_ids) else -1 - carried[chunk.request]


def parts_of(buffer: Tensor, shape: StepShape) -> StepInputs:
    """The parts of a step of this shape in a buffer of integers."""
    tokens, positions, slot_mapping, contexts, starts, logits, tiles, logit_tiles, tables = _cut(buffer, shape.sizes)
    return StepInputs(
        tokens,
        positions,
        slot_mapping,
        tables.view(shape.width, -1).t(),
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
