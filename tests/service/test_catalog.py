"""The catalog without HTTP: kills, corruption, full disks, and what holds on to what."""

import asyncio
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from runtime.adapter_format import AdapterSummary, canonicalise
from runtime.models.config import ModelConfig
from service.adapter_version import AdapterVersion, Condition, Upload
from service.blobs import Blobs
from service.catalog import Catalog
from service.responses import ApiError
from storage.local import LocalStore
from storage.store import StoreFull
from tests.service.adapter_service import TINY, FakeEngine, bundle

FREE = Condition()
ROOT = Path(__file__).parents[2]


@asynccontextmanager
async def opened(
    directory: Path, engine: FakeEngine | None = None, model: ModelConfig = TINY, max_rank: int = 8
) -> AsyncIterator[Catalog]:
    catalog = await Catalog.open(directory, engine or FakeEngine(), model, max_rank)
    yield catalog
    await catalog.close()
    catalog.check()


def prepared(staged: Path, seed: int) -> tuple[AdapterSummary, Path]:
    config, content = bundle(seed)
    (staged / "weights").write_bytes(content)
    file = staged / "canonical"
    return canonicalise(staged / "weights", config, TINY, file, max_rank=8), file


async def publish(catalog: Catalog, name: str, seed: int = 0, ephemeral: bool = False) -> AdapterVersion:
    async with catalog.staging(ephemeral) as staged:
        summary, file = prepared(staged, seed)
        return (await catalog.publish(name, Upload(summary, file, "test", ephemeral), FREE))[0]


def files(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def run(program: Coroutine[Any, Any, None]) -> None:
    asyncio.run(program)


def stored(directory: Path, *names: str) -> dict[str, str]:
    """Fill a store with one adapter a name, and return their digests."""
    digests = {}

    async def program() -> None:
        async with opened(directory) as catalog:
            for seed, name in enumerate(names):
                digests[name] = (await publish(catalog, name, seed)).digest

    asyncio.run(program())
    return digests


KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from service.catalog import Catalog
from service.adapter_version import Condition
from storage.local import LocalStore
from tests.service.adapter_service import TINY, FakeEngine
from tests.service.test_catalog import publish

directory, operation, prefix, moment = Path(sys.argv[1]), *sys.argv[2:]

class KilledStore(LocalStore):
    def put(self, key, *arguments, **options):
        return self._around("put", key, lambda: super(KilledStore, self).put(key, *arguments, **options))

    def delete(self, key):
        return self._around("delete", key, lambda: super(KilledStore, self).delete(key))

    def _around(self, call, key, work):
        here = call == operation and key.startswith(prefix)
        if here and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = work()
        if here and moment == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

async def main():
    catalog = Catalog(KilledStore(directory), FakeEngine(), TINY, 8)
    await catalog.load()
    if operation == "put":
        await publish(catalog, "second", seed=1)
    else:
        await catalog.delete("first", Condition())
        await catalog.close()

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("operation", "prefix", "moment", "names"),
    [
        ("put", "blobs/", "before", ["first"]),
        ("put", "blobs/", "after", ["first"]),
        ("put", "names/", "before", ["first"]),
        ("put", "names/", "after", ["first", "second"]),
        ("delete", "names/", "before", ["first"]),
        ("delete", "names/", "after", []),
        ("delete", "blobs/", "before", []),
        ("delete", "blobs/", "after", []),
    ],
)
def test_a_kill_at_any_step_shows_all_or_nothing_and_is_cleaned_at_the_next_start(
    tmp_path: Path, operation: str, prefix: str, moment: str, names: list[str]
) -> None:
    stored(tmp_path, "first")
    command = [sys.executable, "-c", KILLED, str(tmp_path), operation, prefix, moment]
    killed = subprocess.run(command, cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL

    async def program() -> None:
        async with opened(tmp_path) as catalog:
            assert [version.name for version in catalog.list()] == names
            assert [catalog.failure(version) for version in catalog.list()] == [None] * len(names)
            kept = {f"blobs/{version.digest}.safetensors" for version in catalog.list()}
            assert files(tmp_path) == sorted([*kept, *(f"names/{name}.json" for name in names)])

    run(program())


def test_a_corrupt_name_is_skipped_and_its_blob_is_not_thrown_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    digests = stored(tmp_path, "broken", "strange", "whole")
    (tmp_path / "names/broken.json").write_bytes(b'{"name": "bro')
    record = msgspec.json.decode((tmp_path / "names/strange.json").read_bytes())
    (tmp_path / "names/strange.json").write_bytes(msgspec.json.encode(record | {"digest": "../../etc/passwd"}))
    (tmp_path / "names/other.json").write_bytes(msgspec.json.encode(record))
    (tmp_path / "names/stray").write_bytes(b"\xff")
    before = files(tmp_path)

    async def program() -> None:
        engine = FakeEngine()
        async with opened(tmp_path, engine) as catalog:
            assert [version.name for version in catalog.list()] == ["whole"]
            assert list(engine.registered) == [digests["whole"]]
            assert files(tmp_path) == before
            assert (await publish(catalog, "broken")).generation == 1  # and it can be healed

    with caplog.at_level(logging.ERROR):
        run(program())
    for name in ("broken.json", "strange.json", "other.json", "stray"):
        assert any(name in message for message in caplog.messages)


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_a_blob_that_does_not_match_its_digest_is_refused_with_the_reason(tmp_path: Path, damage: str) -> None:
    digest = stored(tmp_path, "poet", "neighbour")["poet"]
    blob = tmp_path / f"blobs/{digest}.safetensors"
    content = blob.read_bytes()
    if damage == "missing":
        blob.unlink()
    else:
        blob.write_bytes(content[:-1] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))

    async def program() -> None:
        engine = FakeEngine()
        async with opened(tmp_path, engine) as catalog:
            version = catalog.resolve("poet")
            assert version is not None
            assert "missing" in (catalog.failure(version) or "") or "corrupt" in (catalog.failure(version) or "")
            assert digest not in engine.registered
            with pytest.raises(ApiError, match="cannot be served") as refused, catalog.using(version):
                pass
            assert (refused.value.status, refused.value.code) == (503, "adapter_failed")
            neighbour = catalog.resolve("neighbour")
            assert neighbour is not None
            assert catalog.failure(neighbour) is None

            healed = await publish(catalog, "poet")
            assert (healed.digest, healed.generation, catalog.failure(healed)) == (digest, 1, None)
            assert blob.read_bytes() == content
            assert digest in engine.registered

    run(program())


def test_an_adapter_checked_against_another_base_is_not_given_to_the_engine(tmp_path: Path) -> None:
    stored(tmp_path, "poet")

    async def program(model: ModelConfig, max_rank: int, reason: str) -> None:
        engine = FakeEngine()
        async with opened(tmp_path, engine, model, max_rank) as catalog:
            version = catalog.resolve("poet")
            assert version is not None
            assert reason in (catalog.failure(version) or "")
            assert engine.registered == {}

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
        store = FullStore(tmp_path)
        catalog = Catalog(store, engine := FakeEngine(), TINY, 8)
        await catalog.load()
        old = await publish(catalog, "poet")
        before, registered = files(tmp_path), dict(engine.registered)
        for store.full_from in ("blobs/", "names/"):
            with pytest.raises(StoreFull):
                await publish(catalog, "poet", seed=1)
            with pytest.raises(StoreFull):
                await publish(catalog, "other", seed=2)
            await catalog.settle()
            assert files(tmp_path) == before
            assert catalog.list() == [old]
            assert engine.registered == registered
            catalog.check()
        await catalog.close()

    run(program())


def test_a_version_that_is_used_outlives_its_name_and_no_longer(tmp_path: Path) -> None:
    async def program() -> None:
        engine = FakeEngine()
        async with opened(tmp_path, engine) as catalog:
            version = await publish(catalog, "poet")
            with catalog.using(version), catalog.using(version):
                await catalog.delete("poet", FREE)
                catalog.check()
                assert catalog.resolve("poet") is None
                assert catalog.draining("poet") is version
                assert version.path.exists()
                assert engine.retired == []
            assert catalog.draining("poet") is None
            await catalog.settle()
            assert not version.path.exists()
            assert engine.retired == [version.digest]
            with pytest.raises(ApiError) as refused, catalog.using(version):
                pass
            assert (refused.value.status, refused.value.code) == (404, "model_not_found")

    run(program())


def test_the_same_bytes_coming_back_while_they_go_are_served(tmp_path: Path) -> None:
    async def program() -> None:
        engine = FakeEngine()
        async with opened(tmp_path, engine) as catalog:
            for _ in range(20):
                version = await publish(catalog, "poet")
                await catalog.delete("poet", FREE)
            version = await publish(catalog, "poet")
            await catalog.settle()
            catalog.check()
            assert version.path.exists()
            assert engine.registered == {version.digest: version.path}

    run(program())


def test_a_blob_that_is_wanted_again_before_it_went_stays(tmp_path: Path) -> None:
    async def program() -> None:
        store, engine = LocalStore(tmp_path), FakeEngine()
        blobs = Blobs(store, engine)
        summary, file = prepared(store.scratch.path, seed=0)
        await blobs.keep(summary.digest, file, ephemeral=False)
        blobs.serve(summary.digest, load=False)
        blobs.release(summary.digest)
        await blobs.keep(summary.digest, file, ephemeral=False)
        await blobs.settle()
        blobs.check({summary.digest: 1})
        assert engine.retired == []
        blobs.close()
        store.close()

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
        catalog = Catalog(HeldStore(tmp_path), FakeEngine(), TINY, 8)
        await catalog.load()
        upload = asyncio.create_task(publish(catalog, "poet"))
        assert await asyncio.to_thread(writing.wait, 20)
        upload.cancel()
        await asyncio.gather(upload, return_exceptions=True)
        assert upload.cancelled()
        go_on.set()
        await catalog.settle()
        version = catalog.resolve("poet")
        assert version is not None
        assert files(tmp_path) == [f"blobs/{version.digest}.safetensors", "names/poet.json"]
        catalog.check()
        await catalog.close()

    run(program())


def test_a_name_that_another_process_changed_is_not_overwritten_unseen(tmp_path: Path) -> None:
    async def program() -> None:
        async with opened(tmp_path) as mine, opened(tmp_path) as theirs:
            await publish(theirs, "poet", seed=1)
            with pytest.raises(ApiError) as refused:
                await publish(mine, "poet", seed=2)
            assert (refused.value.status, refused.value.code) == (409, "adapter_changed")
            assert mine.list() == []
            await publish(mine, "poet", seed=2)

    run(program())


def test_a_start_beside_another_process_deletes_nothing_that_it_may_be_writing(tmp_path: Path) -> None:
    async def program() -> None:
        store = LocalStore(tmp_path)
        store.put("blobs/about-to-be-named.safetensors", b"x")
        async with opened(tmp_path):
            assert files(tmp_path) == ["blobs/about-to-be-named.safetensors"]
        store.close()
        async with opened(tmp_path):
            assert files(tmp_path) == []

    run(program())
