import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from runtime.adapters.arena import ALIGNMENT, Arena

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


def test_high_extents_are_handed_out_from_the_top_end():
    arena = Arena(10 * UNIT)
    assert [arena.allocate(n * UNIT, high=high) for n, high in ((2, True), (1, False), (3, True), (1, False))] == [
        8 * UNIT,
        0,
        5 * UNIT,
        UNIT,
    ]
    arena.free(8 * UNIT)
    assert arena.allocate(3 * UNIT, high=True) == 2 * UNIT, "the hole of two is too small"
    assert arena.allocate(UNIT, high=True) == 9 * UNIT
    assert arena.allocate(UNIT) == 8 * UNIT
    arena.check()
    assert arena.allocate(1, high=True) is None


def test_a_window_knows_what_freeing_would_join():
    arena = Arena(5 * UNIT)
    a, b, c, _ = (arena.allocate(UNIT) for _ in range(4))
    assert arena.window(UNIT, {}).victims == []
    assert arena.window(2 * UNIT, {}) is None
    assert arena.window(2 * UNIT, {a: 1, c: 2}) is None
    assert arena.window(3 * UNIT, {a: 1, b: 2, c: 3}).victims == [a, b, c]
    assert arena.window(4 * UNIT, {a: 1, b: 2, c: 3}) is None


def test_a_window_spares_what_was_used_last_and_frees_nothing_in_vain():
    arena = Arena(8 * UNIT)
    a, b, c, d, e, f, _ = (arena.allocate(UNIT) for _ in range(7))  # and a free one at the end
    used = {a: 9, b: 2, c: 3, d: 8, e: 1, f: 4}
    assert arena.window(UNIT, used).victims == []
    assert arena.window(2 * UNIT, used) == (3 * UNIT, [b, c])
    assert arena.window(3 * UNIT, used).victims in ([b, c, d], [c, d, e], [d, e, f])
    assert arena.window(2 * UNIT, used, high=True) == (6 * UNIT, [e, f])


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

    @rule(size=st.integers(1, 10), slack=st.integers(0, UNIT - 1), high=st.booleans())
    def allocate(self, size, slack, high):
        units = self.map()
        starts = [start for start in range(24 - size + 1) if units[start : start + size] == [None] * size]
        offset = self.arena.allocate(size * UNIT - slack, high=high)
        assert offset == (starts[-1 if high else 0] * UNIT if starts else None)
        if offset is not None:
            self.held[offset] = size

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data):
        offset = data.draw(st.sampled_from(sorted(self.held)))
        del self.held[offset]
        self.arena.free(offset)

    @rule(data=st.data(), size=st.integers(1, 24), high=st.booleans())
    def ask(self, data, size, high):
        freed = data.draw(st.sets(st.sampled_from(sorted(self.held)))) if self.held else set()
        used = {offset: data.draw(st.integers(0, 9)) for offset in sorted(freed)}
        window = self.arena.window(size * UNIT, used, high=high)
        assert (window is not None) == self.fits(size, freed)
        if window is None:
            return
        start = window.stop // UNIT - size
        assert self.map(window.victims)[start : start + size] == [None] * size
        for victim in window.victims:
            left = set(window.victims) - {victim}
            assert high or not self.fits(size, left), "one would be freed in vain"
        worst = max((used[victim] for victim in window.victims), default=-1)
        assert high or worst < 0 or not self.fits(size, {offset for offset in used if used[offset] < worst})

    @invariant()
    def counted(self):
        self.arena.check()
        self.map()
        assert self.arena.used == sum(self.held.values()) * UNIT


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase
