"""Memory that serves one file after another."""

from collections.abc import Callable

import numpy as np
import pytest

from runtime.adapters.spare_memory import SPARE_BYTES, SpareMemory

MARK = 7  # new memory is zero


def marked(spare: SpareMemory, size: int) -> np.ndarray:
    memory = spare.take(size)
    memory[:10] = MARK
    return memory


def is_marked(memory: np.ndarray) -> bool:
    return bool((memory[:10] == MARK).all())


def test_memory_that_nobody_refers_to_any_more_serves_the_next_file_of_its_size_or_less() -> None:
    spare = SpareMemory(2)
    marked(spare, 1000)
    for size in (1000, 10, 1000):
        memory = spare.take(size)
        assert memory.nbytes == size
        assert is_marked(memory)
        del memory
    larger = spare.take(1001)
    assert larger.nbytes == 1001
    assert not is_marked(larger)


@pytest.mark.parametrize(
    "part",
    [
        lambda memory: memory[500:],
        lambda memory: memory[4:8].view("<f4"),
        lambda memory: memory.data[500:].toreadonly(),
        lambda memory: np.frombuffer(memory.data[500:], np.uint8)[:10],
        lambda memory: memory.reshape(2, 500).T[3:],
    ],
)
def test_it_serves_nobody_else_while_there_is_a_part_of_it(part: Callable[[np.ndarray], object]) -> None:
    spare = SpareMemory(2)
    memory = marked(spare, 1000)
    rest = part(memory)
    del memory
    assert not is_marked(spare.take(1000))
    spare = SpareMemory(2)
    memory = marked(spare, 1000)
    rest = part(memory)
    del memory, rest
    assert is_marked(spare.take(1000))


def test_only_so_many_pieces_are_kept() -> None:
    spare = SpareMemory(2)
    pieces = [marked(spare, 100) for _ in range(3)]
    pieces.clear()
    pieces = [spare.take(100) for _ in range(3)]
    assert [is_marked(piece) for piece in pieces] == [True, True, False]


@pytest.mark.parametrize(("size", "kept"), [(SPARE_BYTES, True), (SPARE_BYTES + 1, False)])
def test_a_large_piece_goes_back_to_the_system(size: int, kept: bool) -> None:
    spare = SpareMemory(2)
    marked(spare, size)
    assert is_marked(spare.take(size)) == kept
