"""Names that requests have a catalog read from the store before its next turn of following: which, and how many."""

import asyncio
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from service.catalog.files import AdapterStorage, StoredFiles
from service.catalog.lookups import LOOKUPS_PER_SECOND, MOST_UNDER_WAY, Lookups
from service.catalog.record import Condition
from service.catalog.seen import Seen
from service.errors import RequestError, answer_of
from service.keys.caller import ALL_SCOPES, ANYONE, Caller
from storage.local import LocalStore
from storage.store import StoreUnavailable
from tests.service.catalog.catalogs import FREE, opened, publish, run


class CountedStore(LocalStore):
    """Counts the reads of objects; `gate` can hold them up, and `reachable` refuse them."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.reads: list[str] = []
        self.reachable = True
        self.reading, self.gate = threading.Event(), threading.Event()
        self.gate.set()

    def get(self, key: str) -> Any:
        self.reads.append(key)
        self.reading.set()
        assert self.gate.wait(20)
        if not self.reachable:
            raise StoreUnavailable("no answer")
        return super().get(key)


def counted(directory: Path) -> tuple[CountedStore, AdapterStorage]:
    store = CountedStore(directory)
    return store, AdapterStorage(store, StoredFiles(store))


def refusal(error: RequestError) -> tuple[int, str, str | None]:
    return answer_of(error).status, error.code, error.param


def test_a_name_that_another_catalog_has_just_written_is_found_and_one_that_nobody_wrote_is_not(tmp_path: Path) -> None:
    async def program() -> None:
        store, storage = counted(tmp_path)
        async with opened(tmp_path) as theirs, opened(storage) as mine:
            version, seen = await publish(theirs, "poet"), Seen(mine, ANYONE)
            await seen.know("poet")
            found = seen.resolve("poet")
            assert found is not None
            assert found.record == version.record
            await seen.know("nobody")
            assert seen.resolve("nobody") is None
            assert store.reads == ["names/poet.json", "names/nobody.json"]
            await seen.know("poet")
            assert len(store.reads) == 2, "a name that is known is not read again"

    run(program())


def test_a_generation_that_another_catalog_has_just_written_is_served_when_it_is_asked_for(tmp_path: Path) -> None:
    async def program() -> None:
        async with opened(tmp_path) as theirs, opened(tmp_path) as mine:
            seen = Seen(mine, ANYONE)
            await publish(theirs, "poet")
            await seen.know("poet")
            second = await publish(theirs, "poet", seed=1)
            await seen.know("poet", 1)
            assert seen.resolve("poet") is not None
            assert seen.resolve("poet").digest != second.digest, "the first generation is enough"
            await seen.know("poet", 2)
            assert seen.resolve("poet").digest == second.digest
            with pytest.raises(RequestError) as refused:
                await seen.know("poet", 3)
            assert refusal(refused.value) == (412, "generation_not_reached", "X-Adapter-Generation")
            await theirs.delete("poet", FREE)
            await seen.know("poet", 3)
            assert seen.resolve("poet") is None, "404 is what its reader says"

    run(program())


def test_a_condition_is_judged_by_the_store_where_memory_says_that_it_fails(tmp_path: Path) -> None:
    async def program() -> None:
        async with opened(tmp_path) as theirs, opened(tmp_path) as mine:
            first = await publish(theirs, "poet")
            match, free = Condition(frozenset({first.digest})), Condition(None, True)
            await Seen(mine, ANYONE).reconsider("poet", match)
            mine.versions.require("poet", match)
            await theirs.delete("poet", FREE)
            await Seen(mine, ANYONE).reconsider("poet", free)
            mine.versions.require("poet", free)

    run(program())


def test_strangers_guesses_cost_the_store_a_bounded_number_of_reads(tmp_path: Path) -> None:
    async def program() -> None:
        store, storage = counted(tmp_path)
        async with opened(storage) as mine:
            now = [0.0]
            mine._lookups = Lookups(lambda: now[0])
            seen = Seen(mine, ANYONE)
            for guess in range(500):
                await seen.know(f"guess-{guess}")
            assert len(store.reads) == LOOKUPS_PER_SECOND
            with pytest.raises(RequestError) as refused:
                await seen.know("poet", 1)
            assert refusal(refused.value) == (503, "generation_unknown", "X-Adapter-Generation")
            now[0] += 0.5
            for guess in range(500):
                await seen.know(f"guess-{guess}")
            assert len(store.reads) == LOOKUPS_PER_SECOND + LOOKUPS_PER_SECOND // 2
            now[0] += 1
            store.reads.clear()
            await seen.know("no name\n")
            await Seen(mine, Caller(id="team", scopes=ALL_SCOPES, adapter_prefix="team-")).know("guess-1")
            assert store.reads == [], "what cannot be a name, or is hidden from the caller, is not read"

    run(program())


def test_requests_that_come_for_one_name_share_its_read(tmp_path: Path) -> None:
    async def program() -> None:
        store, storage = counted(tmp_path)
        async with opened(tmp_path) as theirs, opened(storage) as mine:
            await publish(theirs, "poet")
            store.gate.clear()
            first = asyncio.create_task(mine.look_up("poet"))
            assert await asyncio.to_thread(store.reading.wait, 20)
            others = [asyncio.create_task(mine.look_up("poet")) for _ in range(50)]
            await asyncio.sleep(0)
            store.gate.set()
            assert await asyncio.gather(first, *others) == [True] * 51
            assert store.reads == ["names/poet.json"] * 2, "those that came during a read share the next one"

    run(program())


def test_a_store_that_does_not_answer_holds_up_few_threads_and_no_request_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.catalog.catalog._LOOKUP_SECONDS", 0.05)

    async def program() -> None:
        store, storage = counted(tmp_path)
        async with opened(storage) as mine:
            store.gate.clear()
            asked = await asyncio.gather(*(mine.look_up(f"guess-{guess}") for guess in range(15)))
            assert asked == [False] * 15
            assert len(store.reads) == MOST_UNDER_WAY
            store.gate.set()
            await mine.until_idle()
            store.reachable = False
            with pytest.raises(StoreUnavailable):
                await mine.look_up("poet")

    run(program())


def test_a_name_whose_object_somebody_took_away_stays_known(tmp_path: Path) -> None:
    async def program() -> None:
        async with opened(tmp_path) as mine:
            await publish(mine, "poet")
            shutil.rmtree(tmp_path / "names")
            assert await mine.look_up("poet")
            assert [version.name for version in mine.versions.list()] == ["poet"]

    run(program())
