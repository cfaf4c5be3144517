"""The disk cache under any order of what can happen to it, recounted after each."""

import tempfile
from collections import Counter
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from storage.cache import DiskCache
from storage.store import Corrupt, StoreFull, StoreUnavailable

CAPACITY = 300
SIZES = [0, 10, 90, 100, 150, 299, 300, 301]
FILES = {blake3(bytes([number]) * size).hexdigest(): bytes([number]) * size for number, size in enumerate(SIZES)}
digests = st.sampled_from(sorted(FILES))


class CacheStates(RuleBasedStateMachine):
    """What must be true whatever came before: bytes are right, held files stay, room is never exceeded."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.cache = DiskCache(Path(self.directory.name), CAPACITY)
        self.held: Counter[str] = Counter()
        self.corrupt: set[str] = set()

    def teardown(self) -> None:
        self.cache.close()
        self.directory.cleanup()

    def held_here(self) -> set[str]:
        return {digest for digest in self.held if self.cache.has(digest)}

    @rule(digest=digests)
    def fetch_and_hold(self, digest: str) -> None:
        self.hold(digest)
        self.fetch(digest)

    @rule(digest=digests)
    def fetch(self, digest: str) -> None:
        content, was_here = FILES[digest], self.cache.has(digest)
        brought = []

        def download(path: Path) -> None:
            brought.append(path)
            path.write_bytes(content)

        kept = self.held_here() - {digest}
        held = sum(len(FILES[other]) for other in kept)
        try:
            path = self.cache.fetch(digest, len(content), download)
        except StoreFull:
            assert held + len(content) > CAPACITY
        else:
            assert held + len(content) <= CAPACITY
            assert path.read_bytes() == content
            assert bool(brought) == (not was_here or digest in self.corrupt)
        assert kept <= self.held_here()
        self.corrupt.discard(digest)

    @rule(digest=digests, damage=st.sampled_from(["shorter", "longer", "other", "nothing"]))
    def fetch_what_is_not_it(self, digest: str, damage: str) -> None:
        content = FILES[digest]
        if self.cache.has(digest):
            return

        def download(path: Path) -> None:
            if damage == "nothing":
                path.write_bytes(b"half")
                raise StoreUnavailable("broken off")
            path.write_bytes({"shorter": content[:-1], "longer": content + b"x", "other": b"z" * len(content)}[damage])

        if content or damage == "longer":
            with pytest.raises((Corrupt, StoreFull, StoreUnavailable)):
                self.cache.fetch(digest, len(content), download)
            assert not self.cache.has(digest)

    @rule(digest=digests)
    def add(self, digest: str) -> None:
        upload = self.cache.scratch.path / "upload"
        upload.write_bytes(FILES[digest])
        was_here, kept = self.cache.has(digest), self.held_here()
        self.cache.add(digest, upload)
        assert not upload.exists()
        assert kept <= self.held_here()
        if self.cache.has(digest):
            self.corrupt.discard(digest)
        assert self.cache.has(digest) or not was_here

    @rule(digest=digests)
    def hold(self, digest: str) -> None:
        self.cache.hold(digest)
        self.held[digest] += 1

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(self.held)))
        self.cache.release(digest)
        self.held -= Counter([digest])

    @rule(digest=digests)
    def damage(self, digest: str) -> None:
        if self.cache.has(digest) and FILES[digest]:
            self.cache.path(digest).write_bytes(b"z" * len(FILES[digest]))
            self.corrupt.add(digest)

    @rule(capacity=st.sampled_from([CAPACITY, CAPACITY, 100]))
    def reopen(self, capacity: int) -> None:
        before = {digest for digest in FILES if self.cache.has(digest)}
        self.cache.close()
        self.cache = DiskCache(Path(self.directory.name), capacity)
        after = {digest for digest in FILES if self.cache.has(digest)}
        assert after == before if capacity == CAPACITY else after <= before
        self.held.clear()
        if capacity != CAPACITY:
            self.cache.close()
            self.cache = DiskCache(Path(self.directory.name), CAPACITY)

    @invariant()
    def the_books_are_right(self) -> None:
        self.cache.check()
        here = {digest for digest in FILES if self.cache.has(digest)}
        assert self.cache.files == len(here)
        assert self.cache.bytes_used == sum(len(FILES[digest]) for digest in here)
        self.corrupt &= here


TestCacheStates = CacheStates.TestCase
TestCacheStates.settings = settings(max_examples=60, stateful_step_count=40)
