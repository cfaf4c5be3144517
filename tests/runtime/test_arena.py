import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from runtime.arena import ALIGNMENT, Arena

UNIT = ALIGNMENT


def test_extents_are_handed_out_first_fit_and_aligned():
    arena = Arena(10 * UNIT + 3)
    assert [arena.allocate(n) for n in (UNIT, UNIT + 1, 1)] == [0, UNIT, 3 * UNIT]
    arena.free(UNIT)
    assert arena.allocate(3 * UNIT) == 4 * UNIT, "the hole of two is too small"
    assert arena.allocate(2 * UNIT) == UNIT
    assert (arena.capacity, arena.used) == (10 * UNIT, 7 * UNIT)


def test_freed_neighbours_join_in_any_order():
    arena = Arena(4 * UNIT)
    offsets = [arena.allocate(UNIT) for _ in range(4)]
    assert arena.allocate(1) is None
    for index in (1, 3, 2, 0):
        arena.free(offsets[index])
        arena.check()
    assert arena.allocate(4 * UNIT) == 0


def test_would_fit_knows_what_freeing_would_join():
    arena = Arena(5 * UNIT)
    a, b, c, _ = (arena.allocate(UNIT) for _ in range(4))
    assert arena.would_fit(UNIT, ())
    assert not arena.would_fit(2 * UNIT, ())
    assert not arena.would_fit(2 * UNIT, [a, c])
    assert arena.would_fit(3 * UNIT, [a, b, c])
    assert not arena.would_fit(4 * UNIT, [a, b, c])


def test_freeing_twice_is_an_error():
    arena = Arena(UNIT)
    offset = arena.allocate(1)
    arena.free(offset)
    with pytest.raises(KeyError):
        arena.free(offset)


class AnyOrder(RuleBasedStateMachine):
    """Extents come and go against a map of units, where one extent's units carry its name."""

    def __init__(self):
        super().__init__()
        self.arena = Arena(24 * UNIT)
        self.held = {}

    def map(self, without=()):
        units = [None] * 24
        for offset, size in self.held.items():
            if offset not in without:
                for unit in range(offset // UNIT, offset // UNIT + size):
                    assert units[unit] is None, "two extents overlap"
                    units[unit] = offset
        return units

    def fits(self, size, without=()):
        units = self.map(without)
        return any(units[start : start + size] == [None] * size for start in range(24 - size + 1))

    @rule(size=st.integers(1, 10), slack=st.integers(0, UNIT - 1))
    def allocate(self, size, slack):
        expected = self.fits(size)
        offset = self.arena.allocate(size * UNIT - slack)
        assert (offset is not None) == expected
        if offset is not None:
            self.held[offset] = size

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data):
        offset = data.draw(st.sampled_from(sorted(self.held)))
        del self.held[offset]
        self.arena.free(offset)

    @rule(data=st.data(), size=st.integers(1, 24))
    def ask(self, data, size):
        freed = data.draw(st.sets(st.sampled_from(sorted(self.held)))) if self.held else set()
        assert self.arena.would_fit(size * UNIT, freed) == self.fits(size, freed)

    @invariant()
    def counted(self):
        self.arena.check()
        self.map()
        assert self.arena.used == sum(self.held.values()) * UNIT


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase
