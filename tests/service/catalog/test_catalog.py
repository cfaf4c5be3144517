"""The catalog without HTTP: corruption, full disks, and what holds on to what."""

import asyncio
import logging
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest

from runtime.models.config import ModelConfig
from service.catalog.blobs import Blobs
from service.catalog.files import AdapterStorage, StoredFiles, local_storage
from service.errors import RequestError, answer_of
from service.metrics import Metrics
from storage.local import LocalStore
from storage.store import StoreFull
from tests.service.adapters.adapter_bundles import TINY
from tests.service.catalog.adapter_engine import AdapterEngine
from tests.service.catalog.catalogs import FREE, blob, files, opened, prepared, publish, run, stored


def over(store: LocalStore) -> AdapterStorage:
    return AdapterStorage(store, StoredFiles(store))


def test_a_corrupt_name_is_skipped_and_no_file_is_collected_while_it_may_point_at_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    digests = stored(tmp_path, "broken", "strange", "whole")
    (tmp_path / "names/broken.json").write_bytes(b'{"name": "bro')
    record = msgspec.json.decode((tmp_path / "names/strange.json").read_bytes())
    (tmp_path / "names/strange.json").write_bytes(msgspec.json.encode(record | {"digest": "../../etc/passwd"}))
    (tmp_path / "names/other.json").write_bytes(msgspec.json.encode(record))
    before = files(tmp_path)

    async def program() -> None:
        engine = AdapterEngine()
        async with opened(tmp_path, engine) as catalog:
            assert [version.name for version in catalog.versions.list()] == ["whole"]
            assert list(engine.registered) == [digests["whole"]]
            with pytest.raises(Exception, match="names/"):
                await catalog.collect(-1)
            assert files(tmp_path) == before
            assert (await publish(catalog, "broken")).generation == 1  # and it can be healed

    with caplog.at_level(logging.ERROR):
        run(program())
    for name in ("broken.json", "strange.json", "other.json"):
        assert any(name in message for message in caplog.messages)


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_a_file_that_does_not_match_its_digest_fails_with_the_reason_until_it_is_sent_again(
    tmp_path: Path, damage: str
) -> None:
    digest = stored(tmp_path, "poet", "neighbour")["poet"]
    file = tmp_path / blob(digest)
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:-1] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))

    async def program() -> None:
        engine = AdapterEngine()
        async with opened(tmp_path, engine) as catalog:
            engine.want(digest)
            await catalog.until_idle()
            assert ("missing" if damage == "missing" else "corrupt") in engine.failed[digest]
            assert digest not in engine.registered

            healed = await publish(catalog, "poet")
            assert (healed.digest, healed.generation) == (digest, 1)
            assert file.read_bytes() == content
            assert engine.registered[digest] == file

    run(program())


def test_a_whole_file_that_the_engine_did_not_find_is_told_to_it_again(tmp_path: Path) -> None:
    digest = stored(tmp_path, "poet")["poet"]

    async def program() -> None:
        engine = AdapterEngine()
        async with opened(tmp_path, engine) as catalog:
            engine.want(digest)
            await catalog.until_idle()
            assert engine.registered == {digest: tmp_path / blob(digest)}
            assert engine.failed == {}

    run(program())


def test_an_adapter_checked_against_another_base_is_not_given_to_the_engine(tmp_path: Path) -> None:
    stored(tmp_path, "poet")

    async def program(model: ModelConfig, max_rank: int, reason: str) -> None:
        engine = AdapterEngine()
        async with opened(tmp_path, engine, model, max_rank) as catalog:
            version = catalog.versions.resolve("poet")
            assert version is not None
            assert reason in (catalog.versions.failure(version) or "")
            assert engine.registered == {}
            with pytest.raises(RequestError, match="cannot be served") as refused, catalog.versions.using(version):
                pass
            assert (answer_of(refused.value).status, refused.value.code) == (503, "adapter_failed")

    run(program(msgspec.structs.replace(TINY, hidden_size=32), 8, "another shape"))
    run(program(TINY, 1, "rank 2"))


def test_a_full_disk_is_said_so_and_changes_nothing(tmp_path: Path) -> None:
    class FullStore(LocalStore):
        full_from = "nothing"

        def put(self, key: str, *arguments: Any, **options: Any) -> str:
            if key.startswith(self.full_from):
                raise StoreFull("no room")
            return super().put(key, *arguments, **options)

    async def program() -> None:
        store, engine = FullStore(tmp_path), AdapterEngine()
        async with opened(over(store), engine) as catalog:
            old = await publish(catalog, "poet")
            before, registered = files(tmp_path), dict(engine.registered)
            for store.full_from in ("blobs/", "names/"):
                with pytest.raises(StoreFull):
                    await publish(catalog, "poet", seed=1, pin=True)
                with pytest.raises(StoreFull):
                    await publish(catalog, "other", seed=2)
                await catalog.until_idle()
                await catalog.collect(-1)
                assert files(tmp_path) == before
                assert catalog.versions.list() == [old]
                assert engine.registered == registered
                assert engine.pins == {}
                catalog.versions.check()

    run(program())


def test_a_version_that_is_used_outlives_its_name_and_no_longer(tmp_path: Path) -> None:
    async def program() -> None:
        engine = AdapterEngine()
        async with opened(tmp_path, engine) as catalog:
            version = await publish(catalog, "poet")
            with catalog.versions.using(version), catalog.versions.using(version):
                await catalog.delete("poet", FREE)
                catalog.versions.check()
                assert catalog.versions.resolve("poet") is None
                assert catalog.versions.draining("poet") is version
                await catalog.collect(-1)
                assert files(tmp_path) == [blob(version.digest)]
                assert engine.retired == []
            assert catalog.versions.draining("poet") is None
            await catalog.until_idle()
            assert engine.retired == [version.digest]
            await catalog.collect(-1)
            assert files(tmp_path) == []
            with pytest.raises(RequestError) as refused, catalog.versions.using(version):
                pass
            assert (answer_of(refused.value).status, refused.value.code) == (404, "model_not_found")

    run(program())


def test_the_same_bytes_coming_back_while_they_go_are_served(tmp_path: Path) -> None:
    async def program() -> None:
        engine = AdapterEngine()
        async with opened(tmp_path, engine) as catalog:
            for _ in range(20):
                version = await publish(catalog, "poet")
                await catalog.delete("poet", FREE)
            version = await publish(catalog, "poet")
            await catalog.until_idle()
            catalog.versions.check()
            assert engine.registered == {version.digest: tmp_path / blob(version.digest)}
            assert files(tmp_path) == [blob(version.digest), "names/poet.json"]

    run(program())


def test_a_file_that_is_wanted_again_before_it_went_stays(tmp_path: Path) -> None:
    async def program() -> None:
        storage, engine = local_storage(tmp_path), AdapterEngine()
        blobs = Blobs(storage, engine, Metrics())
        summary, file = prepared(storage.files.scratch, seed=0)
        await blobs.keep(summary.digest, summary.bytes, file, ephemeral=False)
        blobs.serve(summary.digest)
        blobs.release(summary.digest)
        await blobs.keep(summary.digest, summary.bytes, file, ephemeral=False)
        await blobs.until_idle()
        blobs.check({summary.digest: 1})
        assert engine.retired == []
        await blobs.close()
        storage.close()

    run(program())


@pytest.mark.parametrize("steps", range(6))
def test_a_digest_that_is_used_for_a_moment_while_it_is_discarded_leaves_the_engine(tmp_path: Path, steps: int) -> None:
    async def program() -> None:
        storage, engine = local_storage(tmp_path), AdapterEngine()
        blobs = Blobs(storage, engine, Metrics())
        summary, file = prepared(storage.files.scratch, seed=0)
        await blobs.keep(summary.digest, summary.bytes, file, ephemeral=False)
        blobs.serve(summary.digest)
        blobs.release(summary.digest)
        for _ in range(steps):
            await asyncio.sleep(0)
        blobs.adopt(summary.digest, summary.bytes)
        blobs.serve(summary.digest)
        assert summary.digest in engine.registered
        blobs.release(summary.digest)
        await blobs.until_idle()
        blobs.check({})
        assert engine.registered == {}
        await blobs.close()
        storage.close()

    run(program())


def test_an_ephemeral_adapter_touches_no_disk_and_goes_with_its_name(tmp_path: Path) -> None:
    async def program() -> None:
        engine = AdapterEngine()
        async with opened(tmp_path, engine) as catalog:
            version = await publish(catalog, "step", ephemeral=True)
            file = engine.registered[version.digest]
            assert file.is_relative_to(catalog.blobs._memory.path)
            assert files(tmp_path) == []
            engine.want(version.digest)
            await catalog.until_idle()
            assert engine.registered[version.digest] == file
            await catalog.delete("step", FREE)
            await catalog.until_idle()
            assert not file.exists()

    run(program())


def test_an_ephemeral_adapter_outlives_a_stored_one_of_the_same_bytes(tmp_path: Path) -> None:
    async def program() -> None:
        engine = AdapterEngine()
        async with opened(tmp_path, engine) as catalog:
            digest = (await publish(catalog, "stored")).digest
            await publish(catalog, "passing", ephemeral=True)
            await catalog.delete("stored", FREE)
            local_storage(tmp_path).store.delete(blob(digest))  # as another process' collector may do
            engine.want(digest)
            await catalog.until_idle()
            assert engine.registered[digest].exists()

    run(program())


def test_a_file_that_was_collected_while_it_was_named_is_stored_again(tmp_path: Path) -> None:
    class CollectedStore(LocalStore):
        def put(self, key: str, *arguments: Any, **options: Any) -> str:
            if key.startswith("names/"):
                for entry in self.list("blobs/"):
                    self.delete(entry.key)
            return super().put(key, *arguments, **options)

    async def program() -> None:
        async with opened(over(CollectedStore(tmp_path))) as catalog:
            version = await publish(catalog, "poet")
            assert files(tmp_path) == [blob(version.digest), "names/poet.json"]

    run(program())


def test_a_damaged_file_that_nobody_has_read_yet_is_replaced_by_an_upload(tmp_path: Path) -> None:
    file = tmp_path / blob(stored(tmp_path, "poet")["poet"])
    content = file.read_bytes()
    file.write_bytes(content + b"and more")

    async def program() -> None:
        async with opened(tmp_path) as catalog:
            await publish(catalog, "poet")
            assert file.read_bytes() == content

    run(program())


def test_a_cancelled_upload_whose_name_is_being_written_is_finished(tmp_path: Path) -> None:
    writing, go_on = threading.Event(), threading.Event()

    class HeldStore(LocalStore):
        def put(self, key: str, *arguments: Any, **options: Any) -> str:
            if key.startswith("names/"):
                writing.set()
                assert go_on.wait(20)
            return super().put(key, *arguments, **options)

    async def program() -> None:
        async with opened(over(HeldStore(tmp_path))) as catalog:
            upload = asyncio.create_task(publish(catalog, "poet"))
            assert await asyncio.to_thread(writing.wait, 20)
            upload.cancel()
            await asyncio.gather(upload, return_exceptions=True)
            assert upload.cancelled()
            go_on.set()
            await catalog.until_idle()
            version = catalog.versions.resolve("poet")
            assert version is not None
            assert files(tmp_path) == [blob(version.digest), "names/poet.json"]

    run(program())


def test_what_nobody_names_is_collected_once_it_is_old_enough(tmp_path: Path) -> None:
    async def program() -> None:
        storage = local_storage(tmp_path)
        storage.store.put("blobs/about-to-be-named.safetensors", b"x")
        storage.store.put("blobs/notes.txt", b"not ours")
        async with opened(storage) as catalog:
            version = await publish(catalog, "poet")
            kept = ["blobs/notes.txt", "names/poet.json", blob(version.digest)]
            assert await catalog.collect(60) == (0, 0)
            assert await catalog.collect(-1) == (1, 1)
            assert files(tmp_path) == sorted(kept)

    run(program())
