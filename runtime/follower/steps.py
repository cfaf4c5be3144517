"""A step as rank 0 tells it, and as another rank lays it out: the same requests, of which little is known there."""

from collections.abc import Iterable, Sequence

from runtime.adapters.pool import AdapterPool
from runtime.kv.cache import KvCopy
from runtime.messages import Generate, SamplingParams
from runtime.parallel.commands import Row, Step
from runtime.request import Request
from runtime.scheduler import Chunk


def step_of(chunks: Sequence[Chunk], copies: Iterable[KvCopy], adapters: AdapterPool, block_size: int) -> Step:
    """What other ranks have to know of a step; `chunks` are in the order of their rows."""
    digests = {
        request.adapter
        for request, start, length, _ in chunks
        if request.adapter is not None and start + length > request.invocation_start
    }
    return Step(
        rows=[_row_of(chunk, block_size) for chunk in chunks],
        copies=[(copy.source, copy.target) for copy in copies],
        places={digest: adapters.placement(digest)[1] for digest in digests},
    )


def _row_of(chunk: Chunk, block_size: int) -> Row:
    request, start, length, samples = chunk
    stop = start + length
    return Row(
        token_ids=request.token_ids[start:stop],
        start=start,
        blocks=request.blocks[: -(-stop // block_size)],
        known=len(request),
        samples=samples,
        num_prompt=request.num_prompt,
        unscored=request.unscored,
        adapter=request.adapter,
        invocation_start=request.invocation_start,
    )


def chunks_of(step: Step) -> list[Chunk]:
    """The chunks of a step. Their requests have the tokens, blocks and limits that it needs, and nothing else."""
    return [_chunk_of(row) for row in step.rows]


def _chunk_of(row: Row) -> Chunk:
    token_ids = [0] * row.start + row.token_ids
    command = Generate(
        request_id="",
        token_ids=token_ids,
        params=SamplingParams(),
        adapter=row.adapter,
        invocation_start=row.invocation_start,
    )
    request = Request(command, max_tokens=0)
    request.blocks, request.num_prompt, request.unscored = row.blocks, row.num_prompt, row.unscored
    request.pending = row.known - len(token_ids)  # rows are ordered by the length of requests
    return Chunk(request, row.start, len(row.token_ids), row.samples)
