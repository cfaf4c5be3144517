"""The inputs of one step of the compiled kernels: integers side by side, and where the K/V and adapters of rows lie."""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from kernels.cpu.compiled import structs
from kernels.cpu.compiled.library import load
from runtime.cpu.adapted_rows import AdaptedRows, adapted_rows, base_and_adapted, logit_rows
from runtime.models.config import ModelConfig
from runtime.models.layers import Rotary
from runtime.request import Request
from runtime.scheduler import Chunk

QUERY_ROWS = 96  # query heads that one task computes together
TASKS_A_THREAD = 4  # with fewer, the partitions of a context become tasks of their own


Kind = TypeVar("Kind", bound=ctypes.Structure)


class CompiledStep(NamedTuple):
    """One step, with the memory that its structure points to."""

    chunks: list[Chunk]  # in row order
    sampling: list[Request]  # one for each of the first rows of logits; the others score prompts
    struct: structs.Step
    kept: tuple[object, ...]


class StepLayout:
    """Lays out steps for one model on a number of threads."""

    def __init__(
        self, model: ModelConfig, block_size: int, threads: int, shrunk: Tensor, lookup: Callable[[str], np.ndarray]
    ) -> None:
        self._model, self._block_size, self._threads = model, block_size, threads
        self._shrunk, self._lookup = shrunk, lookup
        self._rotaries = [Rotary(rope, model.head_dim) for rope in model.ropes]
        self._group = model.num_heads // model.num_kv_heads

    def lay_out(self, chunks: Sequence[Chunk]) -> CompiledStep:
        """Lay out the chunks of a step; rows under one adapter lie side by side."""
        ordered = sorted(chunks, key=lambda chunk: (chunk.request.adapter or "", chunk.length > 1))
        tokens: list[int] = []
        places: list[int] = []
        blocks: list[int] = []
        firsts: list[int] = []  # of each chunk's block table in `blocks`
        for request, start, length, _ in ordered:
            tokens += request.token_ids[start : start + length]
            places += range(start, start + length)
            firsts.append(len(blocks))
            blocks += request.blocks
        positions, tables = np.array(places, np.int64), np.array(blocks, np.int32)
        first_block = np.repeat(np.array(firsts), [chunk.length for chunk in ordered])
        slots = tables[first_block + positions // self._block_size] * self._block_size + positions % self._block_size
        cosines, sines = self._angles(torch.from_numpy(positions))
        adapted, of_logits = adapted_rows(ordered), logit_rows(ordered)
        runs, logit_runs = (list(map(self._run, each)) for each in (adapted, of_logits.adapted(adapted)))
        queries = list(self._queries(ordered, [tables.ctypes.data + 4 * first for first in firsts]))
        scratch = self._split(queries)
        arrays = np.array(tokens, np.int32), slots.astype(np.int32), np.array(of_logits.all, np.int32)
        each = _array(structs.Run, runs), _array(structs.Run, logit_runs), _array(structs.Queries, queries)
        struct = structs.Step(
            rows=len(tokens),
            logits=len(of_logits.all),
            runs=len(runs),
            logit_runs=len(logit_runs),
            queries=len(queries),
            token_ids=arrays[0].ctypes.data,
            slots=arrays[1].ctypes.data,
            cosines=cosines.data_ptr(),
            sines=sines.data_ptr(),
            logit_rows=arrays[2].ctypes.data,
            run=ctypes.addressof(each[0]),
            logit_run=ctypes.addressof(each[1]),
            query=ctypes.addressof(each[2]),
            shrunk=structs.Rows(self._shrunk.data_ptr(), self._shrunk.stride(0)),
        )
        sampling = [chunk.request for chunk in ordered if chunk.samples]
        return CompiledStep(ordered, sampling, struct, (arrays, each, tables, cosines, sines, scratch))

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The cosines and sines of each rope, (ropes, T, 1, head_dim)."""
        each = [rotary(positions, torch.float32) for rotary in self._rotaries]
        if len(each) == 1:
            return each[0].cos, each[0].sin
        return torch.stack([angles.cos for angles in each]), torch.stack([angles.sin for angles in each])

    def _run(self, rows: AdaptedRows) -> structs.Run:
        return structs.Run(rows.first, rows.last, self._lookup(rows.adapter).ctypes.data)

    def _queries(self, chunks: list[Chunk], tables: list[int]) -> Iterator[structs.Queries]:
        """Consecutive queries of each chunk, few enough for one task."""
        most = max(QUERY_ROWS // self._group, 1)
        row = 0
        for chunk, table in zip(chunks, tables, strict=True):
            for first, last in pairwise(base_and_adapted(chunk)):
                for position in range(first, last, most):
                    count = min(most, last - position)
                    yield structs.Queries(row, count, position, position + count, table, None, None)
                    row += count

    def _split(self, queries: list[structs.Queries]) -> object:
        """Where there are fewer tasks than threads want, make the partitions of single queries tasks of their own.

        Returns the memory of their results.
        """
        kv_heads = self._model.num_kv_heads
        if len(queries) * kv_heads >= TASKS_A_THREAD * self._threads:
            return None
        kept = []
        floats = kv_heads * self._group * load().partial_floats(self._model.head_dim)
        for one in queries:
            partitions = -(-one.visible // structs.PARTITION)
            if one.count == 1 and partitions > 1:
                partials = np.empty(partitions * floats, np.float32)
                arrived = np.zeros(kv_heads, np.int32)
                one.partials, one.arrived = partials.ctypes.data, arrived.ctypes.data
                kept.append((partials, arrived))
        return kept


def _array(kind: type[Kind], items: Sequence[Kind]) -> "ctypes.Array[Kind]":
    return (kind * len(items))(*items)
