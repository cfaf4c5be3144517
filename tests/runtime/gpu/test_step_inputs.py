"""A step's inputs against a plain restatement, row by row, in memory full of other numbers."""

import random
from contextlib import contextmanager
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch

from kernels.lora_tiles import BASE, FIRST_ROW, ROWS, SLOT, TILE_FIELDS, most_tiles
from runtime.gpu.block_tables import BlockTables
from runtime.gpu.step_inputs import (
    ALIGNMENT,
    NO_SLOT,
    StepBuffer,
    StepShape,
    longest_table,
    slots_of_rows,
    step_shape,
    write_step,
)
from runtime.gpu.step_lora import DECODE_HEIGHT, PREFILL_HEIGHT, tile_height
from runtime.scheduler import Chunk
from tests.runtime.scheduler_fakes import request

B = 4
CPU = torch.device("cpu")
PADDING = (0, 0, NO_SLOT, BASE)  # a row
JUNK = 987654  # fills the memory before a step is written


class Step(NamedTuple):
    chunks: list[Chunk]
    slots_of: list[int]
    shape: StepShape


def random_step(seed, *, decodes_only=False):
    """Chunks, decoding ones first, each with blocks and perhaps an adapter that begins anywhere."""
    draw = random.Random(seed)
    chunks, slots_of = [], []
    lengths = [1] * draw.randint(0, 6) + [draw.randint(2, 40) for _ in range(draw.randint(0, 4) * (not decodes_only))]
    for length in lengths or [1]:
        start = draw.randint(0, 50)
        samples = draw.random() < 0.6
        tokens = [draw.randrange(1000) for _ in range(start + length + (0 if samples else draw.randint(1, 9)))]
        made = request(tokens, invocation_start=draw.randint(0, len(tokens)), limit=1000)
        made.blocks = draw.sample(range(1, 5000), -(-len(tokens) // B) + draw.randint(0, 2))
        chunks.append(Chunk(made, start, length, samples))
        slots_of.append(draw.choice([BASE, 0, 1, 2]) if start + length > made.invocation_start else BASE)
    decodes, tokens = sum(chunk.length == 1 for chunk in chunks), sum(chunk.length for chunk in chunks)
    height, adapted = tile_height(decodes, tokens), sum(slot != BASE for slot in slots_of)
    tiles = most_tiles(tokens, adapted, height)
    logit_tiles = most_tiles(sum(chunk.samples for chunk in chunks), adapted, height)
    return Step(chunks, slots_of, step_shape(chunks, B, tiles, height)._replace(logit_tiles=logit_tiles))


def write(step, out, carried=MappingProxyType({})):
    tables = BlockTables(1000, B).of(step.chunks)
    write_step(step.chunks, step.shape, B, tables, slots_of_rows(step.chunks, step.slots_of), out, carried)


def written(step, buffer=None):
    """The parts of a step, written where something else was."""
    if buffer is None:
        buffer = StepBuffer(step.shape.total, CPU)
        for part in buffer.on_host(step.shape)[:7]:
            part.fill_(JUNK)
    write(step, buffer.on_host(step.shape))
    buffer.upload(step.shape, longest_table(step.chunks, B))
    return buffer.on_device(step.shape)


def slots_by_row(tiles, rows):
    """Each row's adapter as the tiles have it; no row may be in two of them, nor a tile be too high."""
    slots = [BASE] * rows
    for tile in tiles.fields.tolist():
        assert tile[ROWS] <= tiles.height
        for row in range(tile[FIRST_ROW], tile[FIRST_ROW] + tile[ROWS]):
            assert slots[row] == BASE
            slots[row] = tile[SLOT]
    return slots


def assert_is(step, inputs):
    """Compares `inputs` with the chunks, token by token; padding must have no effect."""
    shape, rows, sampled, prefill_rows = step.shape, [], [], [0]
    for index, (chunk, slot) in enumerate(zip(step.chunks, step.slots_of, strict=True)):
        made, start, length, samples = chunk
        if length > 1 and len(rows) < shape.decodes:
            rows += [PADDING] * (shape.decodes - len(rows))
        sequence = index if length == 1 else shape.decodes + len(prefill_rows) - 1
        blocks = made.blocks[: -(-(start + length) // B)]
        assert inputs.block_tables[sequence, : len(blocks)].tolist() == blocks
        assert inputs.context_lens[sequence] == start + length
        for place in range(start, start + length):
            adapter = slot if place >= made.invocation_start else BASE
            rows.append((made.token_ids[place], place, made.blocks[place // B] * B + place % B, adapter))
        if length > 1:
            prefill_rows.append(prefill_rows[-1] + length)
        if samples:
            sampled.append(len(rows) - 1)
    rows += [PADDING] * (shape.tokens - len(rows))
    got = zip(inputs.token_ids.tolist(), inputs.positions.tolist(), inputs.slot_mapping.tolist(), strict=True)
    assert list(got) == [row[:3] for row in rows]
    assert inputs.context_lens.count_nonzero() == len(step.chunks)
    assert inputs.query_starts.tolist() == prefill_rows + prefill_rows[-1:] * (shape.prefills + 1 - len(prefill_rows))
    assert inputs.logit_rows.tolist() == sampled + [0] * (shape.logits - len(sampled))
    assert inputs.decodes == shape.decodes
    adapters = [row[3] for row in rows]
    if shape.tiles:
        assert slots_by_row(inputs.tiles, shape.tokens) == adapters
        sampled_slots = [adapters[row] for row in sampled]
        expected = sampled_slots + [BASE] * (shape.logits - len(sampled))
        assert not shape.logit_tiles or slots_by_row(inputs.logit_tiles, shape.logits) == expected


@contextmanager
def named(seed):
    """Names the seed in the report of a failure."""
    try:
        yield
    except AssertionError as error:
        error.add_note(f"seed {seed}")
        raise


def test_a_step_is_what_its_chunks_say():
    for seed in range(60):
        step = random_step(seed)
        with named(seed):
            assert_is(step, written(step))


def test_padding_rows_and_padding_requests_do_nothing():
    for seed in range(60):
        step = random_step(seed, decodes_only=True)
        size = len(step.chunks) + random.Random(seed).randint(0, 5)
        tiles = size if step.shape.tiles else 0
        padded = step._replace(shape=StepShape(size, size, 0, 30, size, tiles, tiles, DECODE_HEIGHT))
        with named(seed):
            assert_is(padded, written(padded))


def test_a_step_with_prompts_may_be_padded_between_its_decodes_and_its_prompts_and_at_the_end():
    for seed in range(60):
        step, draw = random_step(seed), random.Random(seed)
        shape = step.shape
        decodes, prefills = shape.decodes + draw.randint(0, 5), shape.prefills + draw.randint(0, 5)
        tokens = decodes + shape.prompt_tokens + draw.randint(0, 20)
        tiles = shape.tiles + draw.randint(1, 3)  # a run may be cut in two by the padding
        logits = shape.logits + draw.randint(0, 3)
        padded = step._replace(shape=StepShape(tokens, decodes, prefills, 30, logits, tiles, 0, shape.height))
        with named(seed):
            assert_is(padded, written(padded))


def test_a_step_of_nothing_is_all_padding():
    step = Step([], [], StepShape(4, 4, 0, 3, 4, 4, 4, DECODE_HEIGHT))
    assert_is(step, written(step))


def test_a_token_that_the_step_before_samples_is_named_by_its_place_there():
    known, first, second = (request(tokens, limit=100) for tokens in (5, 6, 7))
    for made in (known, first, second):
        made.blocks = [1, 2, 3]
    chunks = [Chunk(known, 4, 1, True), Chunk(first, 6, 1, True), Chunk(second, 7, 1, True)]
    shape = step_shape(chunks, B, 0, DECODE_HEIGHT)
    buffer = StepBuffer(shape.total, CPU)
    write(Step(chunks, [BASE] * 3, shape), buffer.on_host(shape), {known: 1, first: 2, second: 0})
    inputs = buffer.on_device(shape)
    assert inputs.token_ids.tolist() == [known.token_ids[4], -1 - 2, -1 - 0]
    assert inputs.context_lens.tolist() == [5, 7, 8]


def test_one_buffer_serves_steps_of_all_shapes_one_after_the_other():
    steps = [random_step(seed, decodes_only=seed % 3 == 0) for seed in range(100, 160)]
    buffer = StepBuffer(max(step.shape.total for step in steps), CPU)
    for step in steps:
        assert_is(step, written(step, buffer))


def in_order(inputs):
    """The parts as they lie in the buffer."""
    first = [part for part in inputs[:7] if part is not inputs.block_tables]
    return [*first, inputs.tiles.fields, inputs.logit_tiles.fields, inputs.block_tables.t()]


def test_parts_are_as_large_as_the_shape_says_aligned_apart_and_always_at_the_same_addresses():
    for seed in range(20):
        shape = random_step(seed).shape
        buffer = StepBuffer(shape.total, CPU)
        inputs, again = buffer.on_device(shape), buffer.on_device(shape)
        parts = in_order(inputs)
        end = 0
        requests = shape.decodes + shape.prefills
        with named(seed):
            assert inputs.token_ids.shape == inputs.positions.shape == inputs.slot_mapping.shape == (shape.tokens,)
            assert inputs.block_tables.shape == (requests, shape.width)
            assert inputs.context_lens.shape == (requests,)
            assert inputs.query_starts.shape == (shape.prefills + 1,)
            assert inputs.logit_rows.shape == (shape.logits,)
            assert inputs.tiles.fields.shape == (shape.tiles, TILE_FIELDS)
            assert inputs.logit_tiles.fields.shape == (shape.logit_tiles, TILE_FIELDS)
            for part, same in zip(parts, in_order(again), strict=True):
                assert (part.dtype, part.is_contiguous()) == (torch.int32, True)
                assert part.storage_offset() % ALIGNMENT == 0
                assert part.storage_offset() >= end
                assert part.data_ptr() == same.data_ptr()
                end = part.storage_offset() + part.numel()
            assert end <= shape.total


def test_an_upload_ends_with_the_longest_table():
    shape = StepShape(20, 4, 2, 1000, 6, 0, 0, DECODE_HEIGHT)
    assert shape.used(1000) == shape.total
    assert shape.used(3) == shape.total - 6000 + 32


@pytest.mark.parametrize("requests", [1, 2, 5, 33])
def test_the_largest_shape_has_room_for_every_step(requests):
    """With every row under an adapter of its own, in every mixture of decodes and prefills, with the longest tables."""
    most_tokens, width = 37, 4
    capacity = StepShape.largest(most_tokens, requests, width, min(DECODE_HEIGHT, PREFILL_HEIGHT)).total
    for decodes in range(min(requests, most_tokens) + 1):
        for prefills in range(not decodes, min(requests - decodes, (most_tokens - decodes) // 2) + 1):
            tokens = most_tokens if prefills else decodes
            height = tile_height(decodes, tokens)
            tiles = most_tiles(tokens, decodes + prefills, height)
            logit_tiles = most_tiles(decodes + prefills, decodes + prefills, height)
            shape = StepShape(tokens, decodes, prefills, width, decodes + prefills, tiles, logit_tiles, height)
            assert shape.total <= capacity, shape


def test_a_higher_tile_never_needs_more_tiles():
    for rows in range(1, 80):
        for runs in range(1, rows + 1):
            assert most_tiles(rows, runs, PREFILL_HEIGHT) <= most_tiles(rows, runs, DECODE_HEIGHT)
