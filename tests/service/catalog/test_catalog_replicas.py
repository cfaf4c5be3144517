"""Several catalogs on one store: each sees what the others wrote, and none overwrites it unseen."""

import asyncio
import logging
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from service.catalog.catalog import Catalog
from service.catalog.files import AdapterStorage, StoredFiles, local_storage
from service.catalog.record import Condition
from service.errors import RequestError, answer_of, request_error
from service.metrics import Metrics
from storage import identity
from storage.local import LocalStore
from storage.store import StoreLost, StoreUnavailable
from tests.service.adapters.adapter_bundles import TINY
from tests.service.catalog.adapter_engine import AdapterEngine
from tests.service.catalog.catalogs import FREE, NEVER, blob, files, opened, publish, run


def test_names_that_another_process_writes_replaces_and_deletes_are_followed(tmp_path: Path) -> None:
    async def program() -> None:
        engine = AdapterEngine()
        async with opened(tmp_path) as theirs, opened(tmp_path, engine) as mine:
            first = await publish(theirs, "poet", pin=True)
            await mine.refresh()
            await mine.until_idle()
            seen = mine.versions.resolve("poet")
            assert seen is not None
            assert (seen.digest, seen.generation) == (first.digest, 1)
            assert engine.pins == {first.digest: "device"}

            second = await publish(theirs, "poet", seed=1, pin=False)
            with mine.versions.using(seen):
                await mine.refresh()
                replaced = mine.versions.resolve("poet")
                assert replaced is not None
                assert (replaced.digest, replaced.generation) == (second.digest, 2)
                assert mine.versions.draining("poet") is seen
                assert first.digest in engine.registered, "a request runs on it"
            await mine.until_idle()
            assert list(engine.registered) == [second.digest]
            assert engine.pins == {}

            await theirs.delete("poet", FREE)
            await mine.refresh()
            await mine.until_idle()
            assert mine.versions.list() == []
            assert engine.registered == {}

    run(program())


def test_a_catalog_follows_the_store_by_itself(tmp_path: Path) -> None:
    async def program() -> None:
        async with opened(tmp_path) as theirs:
            storage = local_storage(tmp_path)
            mine = await Catalog.open(
                storage,
                AdapterEngine(),
                Metrics(),
                TINY,
                max_rank=8,
                refresh_seconds=0.01,
                collect_after_seconds=NEVER,
            )
            await publish(theirs, "poet")
            async with asyncio.timeout(20):
                while mine.versions.resolve("poet") is None:
                    await asyncio.to_thread(storage.store.get, "names/poet.json")  # something that takes a while
            await mine.close()

    run(program())


def test_of_two_writers_the_later_wins_and_the_generations_count_both(tmp_path: Path) -> None:
    async def program() -> None:
        async with opened(tmp_path) as mine, opened(tmp_path) as theirs:
            await publish(theirs, "poet", seed=1)
            late = await publish(mine, "poet", seed=2)  # it had seen no such name yet
            assert late.generation == 2
            await theirs.refresh()
            seen = theirs.versions.resolve("poet")
            assert seen is not None
            assert seen.record == late.record

    run(program())


def test_a_condition_that_another_process_has_made_false_is_refused(tmp_path: Path) -> None:
    async def program() -> None:
        async with opened(tmp_path) as mine, opened(tmp_path) as theirs:
            first = await publish(mine, "poet", seed=1)
            await theirs.refresh()
            second = await publish(theirs, "poet", seed=2)
            for change in (
                publish(mine, "poet", seed=3, condition=Condition(frozenset({first.digest}))),
                mine.delete("poet", Condition(frozenset({first.digest}))),
                mine.set_pin("poet", "device", Condition(frozenset({first.digest}))),
            ):
                with pytest.raises(RequestError) as refused:
                    await change
                assert (answer_of(refused.value).status, refused.value.param) == (412, "If-Match")
            await theirs.delete("poet", FREE)
            with pytest.raises(RequestError) as gone:
                await mine.delete("poet", FREE)
            assert gone.value.code == "adapter_not_found"
            again = await publish(mine, "poet", seed=2, condition=Condition(None, True))
            assert (again.digest, again.generation) == (second.digest, 1)

    run(program())


def test_many_writers_of_one_name_lose_nothing_and_agree_in_the_end(tmp_path: Path) -> None:
    async def program() -> None:
        async with opened(tmp_path) as one, opened(tmp_path) as two, opened(tmp_path) as three:
            catalogs = [one, two, three]

            async def write(turn: int) -> int:
                catalog = catalogs[turn % 3]
                while True:
                    with suppress(RequestError):  # the others were faster too often: the client sends it again
                        return (await publish(catalog, "poet", seed=turn)).generation

            generations = await asyncio.gather(*map(write, range(12)))
            assert sorted(generations) == list(range(1, 13)), "every one was written, over the one before it"
            for catalog in catalogs:
                await catalog.refresh()
            assert len({catalog.versions.list()[0].record.digest for catalog in catalogs}) == 1
            for catalog in catalogs:
                await catalog.until_idle()
            await one.collect(-1)
            assert files(tmp_path) == [blob(one.versions.list()[0].digest), "names/poet.json"]

    run(program())


def test_an_unreachable_store_keeps_what_is_known_and_is_read_again_later(tmp_path: Path) -> None:
    class FarStore(LocalStore):
        reachable = True

        def get(self, key: str) -> Any:
            if not self.reachable:
                raise StoreUnavailable("no answer")
            return super().get(key)

    async def program() -> None:
        store = FarStore(tmp_path)
        far = AdapterStorage(store, StoredFiles(store))
        async with opened(tmp_path) as theirs, opened(far) as mine:
            await publish(theirs, "poet")
            await mine.refresh()
            known = mine.versions.list()
            await publish(theirs, "poet", seed=1)
            await publish(theirs, "other", seed=2)
            store.reachable = False
            for _ in range(2):
                with pytest.raises(StoreUnavailable):
                    await mine.refresh()
                assert mine.versions.list() == known
            store.reachable = True
            await mine.refresh()
            assert [version.record for version in mine.versions.list()] == [
                version.record for version in theirs.versions.list()
            ]

    run(program())


def test_a_directory_emptied_under_a_server_loses_no_name_takes_no_upload_and_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def program() -> None:
        catalog = await Catalog.open(
            local_storage(tmp_path),
            AdapterEngine(),
            Metrics(),
            TINY,
            max_rank=8,
            refresh_seconds=0.01,
            collect_after_seconds=NEVER,
        )
        await publish(catalog, "poet")
        await catalog.refresh()
        (tmp_path / identity.FILE).unlink()
        for name in ("names", "blobs"):
            shutil.rmtree(tmp_path / name)
        async with asyncio.timeout(20):
            while not [record for record in caplog.records if record.levelno == logging.ERROR]:
                await asyncio.to_thread(files, tmp_path)  # something that takes a while
        assert [version.name for version in catalog.versions.list()] == ["poet"]
        for name in ("poet", "other"):
            with pytest.raises(StoreLost) as lost:
                await publish(catalog, name, seed=1)
            refusal = request_error(lost.value)
            assert refusal is not None
            assert answer_of(refusal).status == 503
        assert files(tmp_path) == []
        await catalog.close()

    run(program())
    [logged] = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert "was emptied or replaced while it was in use" in logged
