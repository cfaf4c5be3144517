"""Block tables that are written on say at every step what the requests' own lists say."""

import random

from runtime.gpu.block_tables import BlockTables
from runtime.scheduler import Chunk
from tests.runtime.scheduler_fakes import request

B, WIDTH = 4, 64


def test_tables_are_written_on_as_requests_grow_while_full_blocks_are_exchanged_and_lists_begin_anew():
    """Blocks are exchanged as commits do it: those that the step before the last filled, or none were late."""
    for seed in range(40):
        draw = random.Random(seed)
        fresh, tables = iter(range(1, 100000)), BlockTables(WIDTH, B)
        running = [request(draw.randint(1, 60), limit=WIDTH * B) for _ in range(4)]
        done = dict.fromkeys(running, 0)
        late = {}
        for step in range(60):
            chosen = draw.sample(running, draw.randint(1, 4))
            chunks = []
            for made in chosen:
                length = draw.choice([1, 1, draw.randint(1, 9)])
                if done[made] + length > WIDTH * B or draw.random() < 0.05:  # it is preempted
                    made.blocks, done[made] = [], 0
                    late.pop(made, None)
                    length = draw.randint(1, 30)
                made.blocks += [next(fresh) for _ in range(-(-(done[made] + length) // B) - len(made.blocks))]
                chunks.append(Chunk(made, done[made], length, True))
            for chunk, table in zip(chunks, tables.of(chunks), strict=True):
                stop = -(-(chunk.start + chunk.length) // B)
                assert table.tolist() == chunk.request.blocks[:stop], f"seed {seed}, step {step}"
            for made, (since, until) in late.items():  # the step before is committed while this one runs
                for index in range(since // B, until // B):
                    if draw.random() < 0.5:
                        made.blocks[index] = next(fresh)
            late = {chunk.request: (chunk.start, chunk.start + chunk.length) for chunk in chunks}
            for chunk in chunks:
                done[chunk.request] += chunk.length
